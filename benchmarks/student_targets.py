"""Which targets should a student learn? Students of one teacher, each with other settings, evaluated alike.

    python benchmarks/student_targets.py RUN "teacher:" "CRF: self_training.refine=crf" "control: control"

RUN is a run whose stages 01 to 03 are complete. A variant is a name, a colon and settings. Words that may stand among
the settings: ``control``, for targets of a single scale; ``drop``, for targets of some scales, drawn anew for each
crop; ``agree``, for a loss in which a pixel counts by how far the scales and their mirrored views agree on it;
``stride=N``, for targets at an N-th of the crop's side; ``of=NETWORK``, whose maps are learned instead of the
teacher's. A name that is ``teacher``, ``student``
or ``student_control``, up to a comma, trains nothing: it evaluates that network of the run ("student, no saliency:
pseudo_masks.saliency_weight=0"). Results go to results/student_targets.json, a record per run and variant: mIoU of
fused maps and of masks after the CRF, on every third image of the training split, at the background score that
``auto`` gives and at the oracle threshold. Trained networks and maps are kept.
"""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from smaflib import files
from smaflib.cams import at_size
from smaflib.config import load_config
from smaflib.data.masks import ground_truth_of
from smaflib.data.sample import Samples
from smaflib.evaluation import SIZES, SegmentationMetrics, best_threshold, evaluate, mean_over_classes, sweep_thresholds
from smaflib.maps import AttentionMaps, DenoisedMaps, write_attention_maps
from smaflib.pipeline import Targets, Workspace, auto_bg_score, train_student, write_maps
from smaflib.pseudo_masks import pseudo_masks
from smaflib.runs import Run, find_run
from smaflib.runs.environment import git_state
from smaflib.runtime import derive_seed
from smaflib.self_training import TARGET_STRIDE, self_train

RESULTS = Path(__file__).parent / "results" / "student_targets.json"
FINISHED = ("teacher", "student", "student_control")
FLAGS = ("control", "drop", "agree")
EVERY = 3
"""One image in so many is evaluated; the others are kept from the choice of settings."""


@dataclass(frozen=True)
class Trial:
    """What the text of a variant says.

    Attributes:
        name: of the variant.
        network: of the run, or what the trained one is called.
        settings: ``key=value``, on top of the run's.
        control: targets of a single scale.
        drop: some scales, drawn anew for each crop.
        agree: pixels count by the agreement of scales and mirrored views.
        stride: of the targets.
        teacher: the network whose maps are learned, and whose weights the student starts from.
    """

    name: str
    network: str
    settings: list[str]
    control: bool = False
    drop: bool = False
    agree: bool = False
    stride: int = TARGET_STRIDE
    teacher: str = "teacher"

    @property
    def trains(self) -> bool:
        """Whether its network is one of its own."""
        return self.network not in FINISHED

    @property
    def words(self) -> list[str]:
        """What is no setting of a config, as it was written."""
        flags = [word for word in FLAGS if getattr(self, word)]
        stride = [f"stride={self.stride}"] * (self.stride != TARGET_STRIDE)
        return flags + stride + [f"of={self.teacher}"] * (self.teacher != "teacher")


def parse(text: str) -> Trial:
    """Read the text of a variant."""
    name, _, words = text.partition(":")
    finished = name.split(",")[0].strip()
    network = finished if finished in FINISHED else "tried_" + re.sub(r"\W+", "_", name.strip())
    settings, stride, teacher = [], TARGET_STRIDE, "teacher"
    for word in words.split():
        key, _, value = word.partition("=")
        if key == "of":
            teacher = value
        elif key == "stride":
            stride = int(value)
        elif word not in FLAGS:
            settings.append(word)
    flags = {flag: flag in words.split() for flag in FLAGS}
    return Trial(name.strip(), network, settings, **flags, stride=stride, teacher=teacher)


class SomeScales(Sequence[Tensor]):
    """Denoised maps (K, H, W) per image, of scales that are drawn anew each time they are read; never of none.

    The draw depends on the seed, the image and how often it was read.
    """

    def __init__(self, maps: DenoisedMaps, seed: int) -> None:
        self.maps, self.seed, self.times_read = maps, seed, [0] * len(maps)

    def __len__(self) -> int:
        return len(self.maps)

    def __getitem__(self, index: int) -> Tensor:  # type: ignore[override]
        generator = torch.Generator().manual_seed(derive_seed(self.seed, index, self.times_read[index]))
        self.times_read[index] += 1
        self.maps.scales = drawn_scales(self.maps.maps.scales, generator)
        return self.maps[index]


def drawn_scales(scales: Sequence[float], generator: torch.Generator) -> list[float]:
    """Each with probability 1/2, in their order; drawn again if that leaves none."""
    while True:
        kept = torch.rand(len(scales), generator=generator) < 0.5
        if kept.any():
            return [scale for scale, keep in zip(scales, kept.tolist(), strict=True) if keep]


class Agreement(Sequence[Tensor]):
    """How far scales and mirrored views agree, (H, W) in [0, 1] per image.

    Args:
        maps: the mean of both views, as the chain keeps them.
        plain: of the view as it is, of the same images and scales.
        samples: for order and image labels.
    """

    def __init__(self, maps: AttentionMaps, plain: AttentionMaps, samples: Samples) -> None:
        self.maps, self.plain = maps, plain
        self.image_ids, self.image_labels = samples.image_ids, samples.image_labels

    def __len__(self) -> int:
        return len(self.image_ids)

    def __getitem__(self, index: int) -> Tensor:  # type: ignore[override]
        classes = self.image_labels[index].nonzero()[:, 0]
        means, size = self.maps.read(self.image_ids[index])
        plains, _ = self.plain.read(self.image_ids[index])
        views = [view[classes] for mean, plain in zip(means, plains, strict=True) for view in (plain, 2 * mean - plain)]
        at_image = [torch.stack([at_size(cam.clamp(min=0), size) for cam in view]) for view in views]
        return agreement(torch.stack(at_image))


def agreement(views: Tensor) -> Tensor:
    """1 where all views say the same of every class; 0 where half of them say 0 and half say 1 of some class.

    Args:
        views: (V, K, H, W) in [0, 1].

    Returns:
        (H, W) in [0, 1].
    """
    return 1 - 2 * views.std(dim=0, correction=0).amax(dim=0)


def train(work: Workspace, trial: Trial) -> None:
    """The student of a trial; those that the chain can train as well, it trains."""
    write_maps(work, trial.teacher)
    if not (trial.drop or trial.agree or trial.stride != TARGET_STRIDE):
        train_student(work, trial.network, trial.teacher, Targets(fused=not trial.control))
        return
    config, samples, runtime = work.config, work.samples(), work.make_runtime()
    if trial.control or config.self_training.refine != "none":
        raise SystemExit(f"{trial.name}: drop, agree and stride go with fused targets and self_training.refine=none")
    teacher, maps = work.network(trial.teacher), work.maps(trial.teacher)
    denoised = work.denoised(trial.teacher, samples, saliency_weight=config.target_saliency_weight)
    pixel_weights = None
    if trial.agree:
        folder = maps.folder.with_name(f"{maps.folder.name}_one_view")
        one_view = config.attention.model_copy(update={"flip": False})
        plain = write_attention_maps(teacher, samples, folder, one_view, runtime)
        pixel_weights = Agreement(maps, plain, samples)
    self_train(
        teacher,
        samples,
        SomeScales(denoised, config.seed) if trial.drop else denoised,
        config.self_training,
        work.bg_score,
        runtime,
        checkpoint=work.checkpoint(trial.network),
        target_stride=trial.stride,
        pixel_weights=pixel_weights,
    )


def percent(metrics: SegmentationMetrics) -> dict[str, float]:
    values = {"mIoU": metrics.miou} | {size: mean_over_classes(metrics.iou_of_size(size)) for size in SIZES}
    return {name: round(100 * value, 2) for name, value in values.items() if value == value}  # NaN: no such object


def score(work: Workspace, network: str, samples: Samples) -> dict[str, Any]:
    """Fused maps, and masks after the CRF, at the score that auto gives and at the oracle threshold."""
    true: Sequence[Tensor] = ground_truth_of(samples) or []
    names = samples.class_names
    maps = work.maps(network)
    write_attention_maps(work.network(network), samples, maps.folder, work.config.attention, work.make_runtime())
    fused, for_masks = work.denoised(network, samples), work.mask_maps(network, samples)
    sweep = sweep_thresholds(fused, true, names, work.config.evaluation)
    mask_sweep = sweep_thresholds(for_masks, true, names, work.config.evaluation)
    best_of_maps, oracle, auto = (
        best_threshold(sweep),
        best_threshold(mask_sweep),
        auto_bg_score(work, for_masks, samples),
    )
    single = {}
    for scale in work.config.attention.scales:
        of_scale = sweep_thresholds(work.denoised(network, samples, [scale]), true, names, work.config.evaluation)
        single[f"{scale:g}"] = percent(of_scale[best_threshold(of_scale)])
    refined = {}
    for bg_score in sorted({oracle, auto}):
        masks = pseudo_masks(samples, for_masks, bg_score, work.config.pseudo_masks, desc=f"{network} {bg_score:g}")
        refined[bg_score] = percent(evaluate(masks, true, names, work.config.evaluation))
    best = max(refined, key=lambda bg_score: refined[bg_score]["mIoU"])
    return {
        "scales": single,
        "fused": percent(sweep[best_of_maps]) | {"bg_score": best_of_maps},
        "refined_auto": refined[auto] | {"bg_score": auto},
        "refined_oracle": refined[best] | {"bg_score": best},
    }


def variant(run: Run, text: str) -> dict[str, Any]:
    """Train the student of a variant of a run's settings and evaluate it."""
    trial = parse(text)
    work = Workspace(run.folder, load_config(run.config_file, [*run.overrides, *trial.settings]))
    begun = time.monotonic()
    if trial.trains:
        train(work, trial)
    seconds = time.monotonic() - begun
    samples = work.samples().with_ground_truth
    result = score(work, trial.network, samples.subset(range(0, len(samples), EVERY)))
    words = [word for word in trial.words if word != "control"]
    facts = {"variant": trial.name, "control": trial.control, "settings": [*words, *trial.settings]}
    return facts | {"seconds": round(seconds)} | result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", metavar="RUN", help="name or path of a run")
    parser.add_argument("variants", nargs="+", metavar="NAME:SETTINGS", help="'teacher:' trains nothing")
    arguments = parser.parse_args()
    run = find_run(arguments.run)
    for text in arguments.variants:
        kept = files.read_json(RESULTS, {"records": []})["records"]
        where = {"run": run.name, "seed": run.config.seed, "run_settings": run.shown_overrides}
        record = where | variant(run, text) | git_state()
        same = [r for r in kept if (r["run"], r["variant"]) == (record["run"], record["variant"])]
        files.write_json(RESULTS, {"records": [r for r in kept if r not in same] + [record]})
        print(record["variant"], record["fused"], record["refined_auto"], record["refined_oracle"], flush=True)


if __name__ == "__main__":
    main()

"""Which targets should a student learn? Students of one teacher, each with other settings, evaluated alike.

    python benchmarks/student_targets.py RUN "teacher:" "CRF: self_training.refine=crf" "control: control"

RUN is a run whose stages 01 to 03 are complete. A variant is a name, a colon and settings. Two words may be among the
settings: ``control``, for targets of a single scale, and ``of=NETWORK``, whose maps are learned instead of the
teacher's. A name that is ``teacher``, ``student`` or ``student_control``, up to a comma, trains nothing: it evaluates
that network of the run ("student, no saliency: pseudo_masks.saliency_weight=0").

Results go to results/student_targets.json, a record per run and variant: mIoU of
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

from torch import Tensor

from smaflib import files
from smaflib.config import load_config
from smaflib.data.masks import ground_truth_of
from smaflib.data.sample import Samples
from smaflib.evaluation import SIZES, SegmentationMetrics, best_threshold, evaluate, mean_over_classes, sweep_thresholds
from smaflib.maps import write_attention_maps
from smaflib.pipeline import Workspace, auto_bg_score, train_student, write_maps
from smaflib.pseudo_masks import pseudo_masks
from smaflib.runs import Run, find_run
from smaflib.runs.environment import git_state

RESULTS = Path(__file__).parent / "results" / "student_targets.json"
FINISHED = ("teacher", "student", "student_control")
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
        teacher: the network whose maps are learned, and whose weights the student starts from.
    """

    name: str
    network: str
    settings: list[str]
    control: bool = False
    teacher: str = "teacher"

    @property
    def trains(self) -> bool:
        """Whether its network is one of its own."""
        return self.network not in FINISHED

    @property
    def words(self) -> list[str]:
        """What is no setting of a config, as it was written."""
        return ["control"] * self.control + [f"of={self.teacher}"] * (self.teacher != "teacher")


def parse(text: str) -> Trial:
    """Read the text of a variant."""
    name, _, words = text.partition(":")
    finished = name.split(",")[0].strip()
    network = finished if finished in FINISHED else "tried_" + re.sub(r"\W+", "_", name.strip())
    settings, teacher = [], "teacher"
    for word in words.split():
        key, _, value = word.partition("=")
        if key == "of":
            teacher = value
        elif word != "control":
            settings.append(word)
    return Trial(name.strip(), network, settings, control="control" in words.split(), teacher=teacher)


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
        write_maps(work, trial.teacher)
        train_student(work, trial.network, trial.teacher, fused=not trial.control)
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

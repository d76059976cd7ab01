"""The ablation: what each step of the method is worth, on the same data, with the same seeds, scored in the same way.

A variant is the full chain without one of its steps (:data:`VARIANTS`). Variants share what they have in common: one
teacher per seed, its maps, and the four students of :data:`STUDENTS`. All are judged as pseudo masks of the training
split, on maps that :func:`~smaflib.cams.fuse_cams` has brought to a peak of 1 per class, with image labels at inference
(:func:`~smaflib.reactivation.denoise`): a variant differs from the full chain by what it names and by nothing else.

``smaf ablate`` runs it. Everything is written as it is made, so that a killed call goes on where it stopped.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd

from smaflib import files
from smaflib.cams import AttentionMaps, write_attention_maps
from smaflib.classifier import train_classifier
from smaflib.config import Config
from smaflib.data import ground_truth_of, load_samples, make_data
from smaflib.data.sample import Samples
from smaflib.errors import ConfigError, DataError
from smaflib.evaluation import SIZES, SegmentationMetrics, evaluate, mean_over_classes, sweep_thresholds
from smaflib.models import load_attention_network
from smaflib.pseudo_masks import pseudo_masks
from smaflib.reactivation import reactivate, with_background_score
from smaflib.runs import Run
from smaflib.runs.environment import describe_machine
from smaflib.runs.manifest import read_manifest
from smaflib.runtime import Runtime, make_runtime
from smaflib.self_training import DenoisedMaps, TargetRule, self_train, student_targets
from smaflib.thresholds import mask_bg_score, resolve_bg_score

FULL = "full"
"""The variant that the others are compared with."""

RESULT = "ablation/ablation.json"
"""Where a run folder holds the result; notebook 08 reads it."""

ORACLE_CANDIDATES = 5
"""The background score that is best at the oracle threshold is looked for among this many, the best before the CRF,
and the run's own: refining the masks of every score would take ten times as long."""


@dataclass(frozen=True)
class Targets:
    """How a student's targets are made of its teacher's maps.

    Attributes:
        fused: over all scales; else the maps of ``attention.single_scale`` alone.
        denoise: absent classes are zero; else each of them has a map that peaks at 1, like the others.
        make_target: what joins the background and settles the winner; :func:`~smaflib.reactivation.reactivate`
            divides by the strongest score, :func:`~smaflib.reactivation.with_background_score` leaves scores as they
            are.
    """

    fused: bool = True
    denoise: bool = True
    make_target: TargetRule = reactivate


STUDENTS: dict[str, Targets] = {
    "student": Targets(),
    "student_control": Targets(fused=False),
    "student_undenoised": Targets(denoise=False),
    "student_unreactivated": Targets(make_target=with_background_score),
}
"""By the name of its checkpoint. The first two are those of notebook 05."""


@dataclass(frozen=True)
class Variant:
    """One row of the ablation.

    Attributes:
        how: how the masks of this row come about, exactly.
        network: whose maps become masks: ``teacher`` or one of :data:`STUDENTS`.
        fused: the network's maps are fused over all scales; else one look at ``attention.single_scale``.
        refined: the masks are refined as ``pseudo_masks.refine`` says, by the dense CRF in all presets.
    """

    how: str
    network: str = "student"
    fused: bool = True
    refined: bool = True


VARIANTS: dict[str, Variant] = {
    FULL: Variant("nothing is left out"),
    "without fusion": Variant(
        "targets and masks come from single-scale maps: no fusion anywhere", "student_control", fused=False
    ),
    "without denoising": Variant(
        "targets keep the maps of classes that the image does not show; the masks still use image labels",
        "student_undenoised",
    ),
    "without reactivation": Variant(
        "targets are the denoised scores beside the background's, not divided by the strongest",
        "student_unreactivated",
    ),
    "without self-training": Variant("the masks come from the teacher's fused maps", "teacher"),
    "without CRF": Variant("the masks are the strongest class of each pixel, as it is", refined=False),
    "control: single-scale targets": Variant(
        "only the targets come from single-scale maps; the masks come from fused ones", "student_control"
    ),
}


# ------------------------------------------------------------------------------------------------------------ one seed


@dataclass(frozen=True)
class Bench:
    """All that the variants of one seed share.

    Attributes:
        samples: the training split.
        config: of the run, with this seed.
        runtime: device, precision and this seed.
        folder: takes ``checkpoints/``, ``cams/`` and ``scores/``.
        borrowed: networks that another folder of the same form holds complete, by name.
    """

    samples: Samples
    config: Config
    runtime: Runtime
    folder: Path
    borrowed: dict[str, Path]

    def checkpoint(self, network: str) -> Path:
        return self.borrowed.get(network, self.folder) / "checkpoints" / f"{network}.safetensors"

    def maps(self, network: str) -> AttentionMaps:
        return AttentionMaps(self.borrowed.get(network, self.folder) / "cams" / network, self.config.attention.scales)

    def denoised_maps(self, network: str, samples: Samples, fused: bool = True, denoise: bool = True) -> DenoisedMaps:
        """A network's maps of some samples: of all scales by the run's rule, or of the single scale."""
        attention = self.config.attention
        if not fused:
            return DenoisedMaps(self.maps(network), samples, scales=[attention.single_scale], denoise=denoise)
        return DenoisedMaps(self.maps(network), samples, attention.fusion, denoise=denoise)


def train_teacher(bench: Bench) -> None:
    """Train the teacher and make its maps, as notebooks 02 and 03 do, if they are not there."""
    teacher, _ = train_classifier(bench.samples, bench.config, bench.runtime, bench.checkpoint("teacher"))
    write_attention_maps(teacher, bench.samples, bench.maps("teacher").folder, bench.config.attention, bench.runtime)


def train_student(bench: Bench, name: str) -> None:
    """Train one of :data:`STUDENTS` and make its maps, as notebook 05 does, if they are not there."""
    how = STUDENTS[name]
    config = resolve_bg_score(bench.config, bench.denoised_maps("teacher", bench.samples))
    denoised = bench.denoised_maps("teacher", bench.samples, how.fused, how.denoise)
    denoised.cached = config.data.cache
    targets = student_targets(bench.samples, denoised, config, bench.runtime.device)
    teacher = load_attention_network(bench.checkpoint("teacher"), config.model, len(bench.samples.class_names))
    student, _ = self_train(
        teacher, bench.samples, targets, config, bench.runtime, bench.checkpoint(name), how.make_target
    )
    write_attention_maps(student, bench.samples, bench.maps(name).folder, config.attention, bench.runtime)


def score_variant(bench: Bench, name: str) -> list[dict[str, Any]]:
    """Judge a variant's pseudo masks of the training split, at two background scores.

    ``own`` is the run's (``pseudo_masks.bg_score``, or else ``attention.bg_score``). A variant whose scores lie higher
    or lower than the full chain's would be judged by that alone; so ``oracle threshold`` is the score that the ground
    truth likes best, for each variant its own.

    Returns:
        Tidy records: variant, bg_choice, bg_score, object_size (``all``: mean IoU over background and classes; a size:
        over the classes' objects of that size), value in [0, 1].
    """
    variant, config, evaluated = VARIANTS[name], bench.config, bench.samples.with_ground_truth
    ground_truth = ground_truth_of(evaluated)
    if ground_truth is None:
        raise DataError("an ablation is judged by masks, but the training split has none; set data.masks")
    own = mask_bg_score(config, bench.denoised_maps(variant.network, bench.samples, variant.fused))
    denoised = bench.denoised_maps(variant.network, evaluated, variant.fused)
    settings, names, limits = config.pseudo_masks, evaluated.class_names, config.evaluation
    limits = limits.model_copy(update={"thresholds": (*limits.thresholds, own)})
    scores: dict[float, SegmentationMetrics] = sweep_thresholds(denoised, ground_truth, names, limits)
    if variant.refined and settings.refinement is not None:
        promising = sorted(scores, key=lambda bg_score: scores[bg_score].miou)[-ORACLE_CANDIDATES:]
        scores = {}
        for bg_score in sorted({own, *promising}):
            desc = f"{name}, background {bg_score:g}"
            masks = pseudo_masks(
                evaluated,
                denoised,
                bg_score,
                settings.refinement,
                settings.num_workers,
                desc,
                settings.backend,
                bench.runtime.device,
            )
            scores[bg_score] = evaluate((mask for _, mask in masks), ground_truth, names, limits)
    best = max(scores, key=lambda bg_score: scores[bg_score].miou)
    records = []
    for choice, bg_score in (("own", own), ("oracle", best)):
        metrics_at = scores[bg_score]
        values = {"all": metrics_at.miou} | {size: mean_over_classes(metrics_at.iou_of_size(size)) for size in SIZES}
        for size, value in values.items():
            known = None if value != value else value  # NaN is not JSON
            where = {"variant": name, "bg_choice": choice, "bg_score": bg_score, "object_size": size}
            records.append(where | {"metric": "iou", "value": known})
    return records


def ablate_seed(bench: Bench, log: Callable[[str], None] = lambda line: None) -> list[dict[str, Any]]:
    """Train what is missing and score what has no score yet; records of all variants, each with its seed.

    Scores are kept in ``scores/``, with the hash of the network that they judge: of another network they are not used.
    """
    seed = bench.config.seed
    log(f"seed {seed}: teacher")
    train_teacher(bench)
    _drop_what_another_teacher_taught(bench)
    for name in STUDENTS:
        log(f"seed {seed}: {name}")
        train_student(bench, name)
    records = []
    for name, variant in VARIANTS.items():
        path = bench.folder / "scores" / (re.sub(r"\W+", "_", name) + ".json")
        network = files.file_hash(bench.checkpoint(variant.network))
        kept = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        if kept.get("network") != network:
            log(f"seed {seed}: {name}")
            kept = {"network": network, "records": score_variant(bench, name)}
            files.write_json(path, kept)
        records += [{"seed": seed, **record} for record in kept["records"]]
    return records


def _drop_what_another_teacher_taught(bench: Bench) -> None:
    """A teacher may be borrowed one time and not the next, or be trained anew: other students are worth nothing."""
    stamp, now = bench.folder / "teacher.sha256", files.file_hash(bench.checkpoint("teacher"))
    if stamp.is_file() and stamp.read_text(encoding="utf-8") != now:
        shutil.rmtree(bench.folder / "scores", ignore_errors=True)
        for path in [*bench.folder.glob("cams/student*"), *bench.folder.glob("checkpoints/student*")]:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    files.write_text(stamp, now)  # last: who is killed in between drops the rest next time


# ----------------------------------------------------------------------------------------------------------- all seeds


def ablate(run: Run, seeds: Sequence[int]) -> Path:
    """Run the ablation for some seeds into the folder of a run, and write :data:`RESULT`.

    Each seed has its own folder ``ablation/seed<N>``, with data of its own where code draws it. For the run's own seed,
    teacher and students of a run whose stages 01 to 05 are complete are taken as they are.

    Args:
        run: whose settings, but for the seed, all variants have.
        seeds: at least one.

    Returns:
        The path of the result.

    Raises:
        ConfigError: if there is no seed, or ``self_training.rounds`` is not 1.
        DataError: if the training split has no masks to be judged by.
        RunError: if another ablation is at work in the folder.
    """
    if not seeds:
        raise ConfigError("an ablation needs at least one seed, such as --seeds 0,1,2")
    if run.config.self_training.rounds != 1:
        raise ConfigError(
            f"self_training.rounds is {run.config.self_training.rounds}, but an ablation trains one round; set it to 1"
        )
    records = []
    with files.locked(run.path("ablation"), "smaf ablate"):
        for seed in seeds:
            records += ablate_seed(_bench(run, seed), lambda line: print(line, file=sys.stderr, flush=True))
        before = read_ablation(run) or {}
        # Nothing new: the file, and with it notebook 08, stays as it is.
        if (before.get("seeds"), before.get("records")) != (list(seeds), records):
            files.write_json(run.path(RESULT), _describe(run, seeds) | {"records": records})
    return run.path(RESULT)


def _bench(run: Run, seed: int) -> Bench:
    config = run.config.model_copy(update={"seed": seed})
    folder = run.path("ablation", f"seed{seed}")
    stages = read_manifest(run.folder)["stages"]
    needed = ("01_data", "02_classifier", "03_multi_scale_attention", "05_self_training")
    complete = all(stages.get(name, {}).get("status") == "complete" for name in needed)
    borrowed, data = {}, folder
    if complete and seed == run.config.seed:
        names = ["teacher", "student", *(["student_control"] if config.self_training.control else [])]
        borrowed, data = dict.fromkeys(names, run.folder), run.folder
    make_data(config, data)
    samples = load_samples(config, "train", data)
    if not len(samples.with_ground_truth):
        raise DataError("an ablation is judged by masks, but the training split has none; set data.masks")
    return Bench(samples, config, make_runtime(config), folder, borrowed)


def _describe(run: Run, seeds: Sequence[int]) -> dict[str, Any]:
    """What the numbers depend on."""
    return {
        "command": command(run, seeds),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "seeds": list(seeds),
        "settings": run.config.model_dump(mode="json"),
        **describe_machine(run.runtime.device),
        "variants": {name: variant.how for name, variant in VARIANTS.items()},
    }


def command(run: Run, seeds: Sequence[int] = (0, 1, 2)) -> str:
    """The command that makes a run's ablation."""
    return run.command("--seeds", ",".join(map(str, seeds))).replace("smaf run", "smaf ablate", 1)


# -------------------------------------------------------------------------------------------------------------- reading


def read_ablation(run: Run) -> dict[str, Any] | None:
    """The result of a run's ablation; None if there is none."""
    path = run.path(RESULT)
    if not path.is_file():
        return None
    result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return result


def ablation_table(records: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """Mean and standard deviation over seeds, in percent, for people to read.

    Args:
        records: of the result.

    Returns:
        Index: variants. Columns: ``mIoU``, ``small``, ``medium``, ``large`` at the run's own background score; ``to
        full``, the difference to the full chain with the same seed, in points; ``mIoU, best score`` and ``to full, best
        score``: the same at the score that is best for each at the oracle threshold. A dash: no such objects.
    """
    table = pd.DataFrame(list(records))
    table["value"] = 100 * table["value"].astype(float)
    columns = {}
    for choice, label in (("own", ""), ("oracle", ", best score")):
        of_choice = table[table["bg_choice"] == choice]
        wide = of_choice.pivot(index="variant", columns=["object_size", "seed"], values="value")
        columns[f"mIoU{label}"] = wide["all"].apply(_mean_and_spread, axis=1)
        for size in SIZES if choice == "own" else ():
            columns[size] = wide[size].apply(_mean_and_spread, axis=1)
        gaps = (wide["all"] - wide["all"].loc[FULL]).apply(_mean_and_spread, axis=1, signed=True)
        gaps[FULL] = "–"
        columns[f"to full{label}"] = gaps
    return pd.DataFrame(columns).reindex([name for name in VARIANTS if name in columns["mIoU"].index])


def _mean_and_spread(values: pd.Series, signed: bool = False) -> str:
    known = values.dropna()
    if known.empty:
        return "–"
    mean = f"{known.mean():+.1f}" if signed else f"{known.mean():.1f}"
    return f"{mean} ± {known.std():.1f}" if len(known) > 1 else mean

"""The ablation: what each step of the method is worth, on the same data, with the same seeds, scored in the same way.

A row is the full chain without one of its steps (:data:`ROWS`). Rows share what they have in common: one teacher per
seed, its maps, and the four students of :data:`STUDENTS`. All are evaluated as pseudo masks of the training split, on
maps that :func:`~smaflib.cams.fuse_cams` has brought to a peak of 1 per class, with image labels at inference
(:func:`~smaflib.reactivation.denoise`): a row differs from the full chain by what it names and by nothing else.

``smaf ablate`` runs it. Everything is written as it is made, so that a killed call resumes where it stopped.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd
from pydantic import BaseModel, ConfigDict

from smaflib import files
from smaflib.config import config_differences
from smaflib.data import make_data
from smaflib.data.masks import ground_truth_of
from smaflib.data.sample import Samples
from smaflib.errors import ConfigError, DataError
from smaflib.evaluation import SIZES, SegmentationMetrics, evaluate, mean_over_classes, sweep_thresholds
from smaflib.maps import FusedMaps
from smaflib.pipeline import (
    Workspace,
    auto_bg_score,
    resolve_bg_score,
    train_student,
    train_teacher,
    write_maps,
)
from smaflib.pseudo_masks import pseudo_masks
from smaflib.runs import Run
from smaflib.runs.environment import describe_machine
from smaflib.runs.inputs import claim_code, plugin_facts
from smaflib.runs.manifest import read_manifest

FULL = "full"
"""The row that the others are compared with."""

RESULT = "ablation/ablation.json"
"""Where a run folder holds the result; notebook 08 reads it."""

ORACLE_CANDIDATES = 5
"""The oracle threshold is searched among this many background scores, the best before the CRF, and the run's own:
refining the masks of every score would take ten times as long."""

ORACLE_IMAGES = 400
"""And on at most so many images, evenly over the split. The score that wins is then evaluated on all of them."""


STUDENTS: dict[str, dict[str, Any]] = {
    "student": {},
    "student_control": {"fused": False},
    "student_undenoised": {"denoise": False},
    "student_unreactivated": {"reactivate": False},
}
"""What differs in ``self_training``, by the name of its checkpoint. The first two are those of notebook 05."""


@dataclass(frozen=True)
class Row:
    """One row of the ablation.

    Attributes:
        label: what people read.
        how: how the masks of this row come about, exactly.
        network: whose maps become masks: ``teacher`` or one of :data:`STUDENTS`.
        fused: the network's maps are fused over all scales; else one view at ``attention.single_scale``.
        refined: the masks are refined as ``pseudo_masks.refine`` says, by the dense CRF in all presets.
    """

    label: str
    how: str
    network: str = "student"
    fused: bool = True
    refined: bool = True


ROWS: dict[str, Row] = {
    FULL: Row("the whole chain", "nothing is left out"),
    "no_fusion": Row(
        "without fusion",
        "targets and masks come from single-scale maps: no fusion anywhere",
        "student_control",
        fused=False,
    ),
    "no_denoising": Row(
        "without denoising",
        "targets keep the maps of classes that the image does not show; the masks still use image labels",
        "student_undenoised",
    ),
    "no_reactivation": Row(
        "without reactivation",
        "targets are the denoised scores beside the background's, not divided by the strongest",
        "student_unreactivated",
    ),
    "no_self_training": Row("without self-training", "the masks come from the teacher's fused maps", "teacher"),
    "no_crf": Row("without CRF", "the masks are the strongest class of each pixel, as it is", refined=False),
    "control": Row(
        "control: single-scale targets",
        "only the targets come from single-scale maps; the masks come from fused ones",
        "student_control",
    ),
}
"""By the name that files hold."""

LABELS = {name: row.label for name, row in ROWS.items()}


# ------------------------------------------------------------------------------------------------------------ one seed


@dataclass(frozen=True)
class SeedWorkspace(Workspace):
    """What the rows of one seed share. Its data is that of a run, or its own where code draws it from the seed."""

    def maps_of(self, row: Row, samples: Samples) -> FusedMaps:
        """The maps that become a row's masks."""
        return self.mask_maps(row.network, samples, None if row.fused else [self.config.attention.single_scale])


def score_row(work: SeedWorkspace, name: str) -> list[dict[str, Any]]:
    """Evaluate a row's pseudo masks of the training split, at two background scores.

    ``own`` is the run's (``pseudo_masks.bg_score``, or else ``attention.bg_score``). It does not suit all rows equally
    well, and that alone could decide a comparison. So ``oracle`` is each row's oracle threshold: the score that is best
    on the ground truth.

    Returns:
        Tidy records: variant, bg_choice, bg_score, object_size (``all``: mean IoU over background and classes; a size:
        over the classes' objects of that size), value in [0, 1].
    """
    row, config, samples = ROWS[name], work.config, work.samples().with_ground_truth
    ground_truth = ground_truth_of(samples)
    if ground_truth is None:
        raise DataError("an ablation needs ground truth, but the training split has no masks; set data.masks")
    own = _own_bg_score(work, row)
    denoised, names, device = work.maps_of(row, samples), samples.class_names, work.make_runtime().device
    limits = config.evaluation.model_copy(update={"thresholds": (*config.evaluation.thresholds, own)})
    scores = sweep_thresholds(denoised, ground_truth, names, limits)
    if row.refined and config.pseudo_masks.refinement is not None:
        promising = sorted(scores, key=lambda bg_score: scores[bg_score].miou)[-ORACLE_CANDIDATES:]

        def refined(bg_score: float, some: Samples) -> SegmentationMetrics:
            maps, desc = work.maps_of(row, some), f"{row.label}, background {bg_score:g}"
            masks = pseudo_masks(some, maps, bg_score, config.pseudo_masks, device=device, desc=desc)
            return evaluate(masks, ground_truth_of(some) or [], names, limits)

        few = samples.subset(range(0, len(samples), -(-len(samples) // ORACLE_IMAGES)))
        scores = {bg_score: refined(bg_score, few) for bg_score in sorted({own, *promising})}
        if len(few) < len(samples):
            best = max(scores, key=lambda bg_score: scores[bg_score].miou)
            scores = {bg_score: refined(bg_score, samples) for bg_score in sorted({own, best})}
    best = max(scores, key=lambda bg_score: scores[bg_score].miou)
    records = []
    for choice, bg_score in (("own", own), ("oracle", best)):
        metrics = scores[bg_score]
        values = {"all": metrics.miou} | {size: mean_over_classes(metrics.iou_of_size(size)) for size in SIZES}
        for size, value in values.items():
            known = None if value != value else value  # NaN is not JSON
            where = {"variant": name, "bg_choice": choice, "bg_score": bg_score, "object_size": size}
            records.append(where | {"metric": "iou", "value": known})
    return records


def _own_bg_score(work: SeedWorkspace, row: Row) -> float:
    """The run's own score for a row's masks; ``auto`` chooses from the row's maps, as stage 06 from the student's."""
    score = work.config.mask_bg_score
    samples = work.samples()
    return auto_bg_score(work, work.maps_of(row, samples), samples) if score == "auto" else score


def ablate_seed(
    work: SeedWorkspace, rows: Sequence[str] = tuple(ROWS), log: Callable[[str], None] = lambda line: None
) -> list[dict[str, Any]]:
    """Train what is missing and score what has no score yet.

    Scores are kept in ``scores/``, with the hash of the network that they evaluate: another network's are not used.

    Args:
        work: of the seed.
        rows: which are made, by their names in :data:`ROWS`.
        log: takes what begins.

    Returns:
        Records of these rows, and of those that an earlier call has scored, each with its seed.
    """
    seed = work.config.seed
    log(f"seed {seed}: teacher")
    train_teacher(work)
    _drop_what_another_teacher_taught(work)
    write_maps(work, "teacher")
    resolve_bg_score(work)
    needed = {ROWS[name].network for name in rows}
    for name, changes in STUDENTS.items():
        if name not in needed:
            continue
        log(f"seed {seed}: {name}")
        train_student(work, name, **changes)
        write_maps(work, name)
    records = []
    for name, row in ROWS.items():
        path, checkpoint = work.path("scores", f"{name}.json"), work.checkpoint(row.network)
        network = files.file_hash(checkpoint) if checkpoint.is_file() else None
        kept = files.read_json(path, {})
        if name not in rows and (network is None or kept.get("network") != network):
            continue
        if kept.get("network") != network:
            log(f"seed {seed}: {row.label}")
            kept = {"network": network, "records": score_row(work, name)}
            files.write_json(path, kept)
        records += [{"seed": seed, **record} for record in kept["records"]]
    return records


def _drop_what_another_teacher_taught(work: Workspace) -> None:
    """Delete what belongs to another teacher: a run's may be taken over in one call and not in the next."""
    stamp, now = work.path("teacher.sha256"), files.file_hash(work.checkpoint("teacher"))
    if stamp.is_file() and stamp.read_text(encoding="utf-8") != now:
        for folder in ("scores", "bg_scores"):
            shutil.rmtree(work.path(folder), ignore_errors=True)
        for path in [*work.folder.glob("cams/*"), *work.folder.glob("checkpoints/student*")]:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    files.write_text(stamp, now)  # last: after a kill in between, the next call deletes the rest


# ----------------------------------------------------------------------------------------------------------- all seeds


def ablate(run: Run, seeds: Sequence[int], rows: Sequence[str] = tuple(ROWS), sources: Sequence[Run] = ()) -> Path:
    """Run the ablation for some seeds into the folder of a run, and write :data:`RESULT`.

    Each seed has its own folder ``ablation/seed<N>``, with data of its own where code draws it. Teacher and students of
    a run of that seed whose stages 01 to 05 are complete are taken as they are.

    Args:
        run: whose settings, but for the seed, all variants have.
        seeds: at least one.
        rows: which rows are made, by their names in :data:`ROWS`; those of earlier calls stay in the result.
        sources: other runs, of the same settings but for the seed, whose networks may be taken.

    Returns:
        The path of the result.

    Raises:
        ConfigError: if there is no seed, no such row, ``self_training.rounds`` is not 1, or a source has other
            settings.
        DataError: if the training split has no ground truth.
        RunError: if another ablation is at work in the folder.
    """
    if not seeds:
        raise ConfigError("an ablation needs at least one seed, such as --seeds 0,1,2")
    if run.config.self_training.rounds != 1:
        raise ConfigError(
            f"self_training.rounds is {run.config.self_training.rounds}, but an ablation trains one round; set it to 1"
        )
    if unknown := [name for name in rows if name not in ROWS]:
        raise ConfigError(f"there is no row {unknown[0]!r} in the ablation; there are {', '.join(ROWS)}")
    for source in sources:
        seeded = source.config.model_copy(update={"seed": run.config.seed})
        if differences := config_differences(run.config, seeded):
            raise ConfigError(f"the run {source.name} has other settings than {run.name}: {differences[0]}")
    records = []
    with files.locked(run.path("ablation"), "smaf ablate"):
        for seed in seeds:
            work = _workspace(run, seed, sources)
            records += ablate_seed(work, rows, lambda line: print(line, file=sys.stderr, flush=True))
        before = read_ablation(run) or {}
        # Nothing new: the file, and with it notebook 08, stays as it is.
        if (before.get("seeds"), before.get("records")) != (list(seeds), records):
            files.write_json(run.path(RESULT), _describe(run, seeds) | {"records": records})
    return run.path(RESULT)


def _workspace(run: Run, seed: int, sources: Sequence[Run] = ()) -> SeedWorkspace:
    """The folder of a seed; networks and maps of a complete run of that seed are taken over, by links."""
    config = run.config.model_copy(update={"seed": seed})
    owner = next((other for other in (run, *sources) if other.config.seed == seed and _has_students(other)), None)
    folder = run.path("ablation", f"seed{seed}")
    work = SeedWorkspace(folder, config, data_home=owner.folder if owner else None)
    if owner:
        for name in ["teacher", "student", *(["student_control"] if config.self_training.control else [])]:
            _take_over(owner, work, name)
    claim_code(config, work.path("plugins.json"), files.display_path(folder))
    make_data(config, work.data_folder)
    if not len(work.samples().with_ground_truth):
        raise DataError("an ablation needs ground truth, but the training split has no masks; set data.masks")
    return work


def _has_students(run: Run) -> bool:
    stages = read_manifest(run.folder)["stages"]
    needed = ("01_data", "02_classifier", "03_multi_scale_attention", "05_self_training")
    return all(stages.get(name, {}).get("status") == "complete" for name in needed)


def _take_over(run: Run, work: SeedWorkspace, network: str) -> None:
    target = work.checkpoint(network)
    if target.is_file() and files.file_hash(target) == files.file_hash(run.checkpoint(network)):
        return
    if network == "teacher":  # another one, or none: whatever lies there is not of this one
        shutil.rmtree(work.folder, ignore_errors=True)
    shutil.rmtree(work.maps(network).folder, ignore_errors=True)
    for path in run.maps(network).folder.glob("*.npz"):
        files.copy_file(path, work.maps(network).path(path.stem))
    files.copy_file(run.checkpoint(network), target)  # last: with it the maps are complete


def _describe(run: Run, seeds: Sequence[int]) -> dict[str, Any]:
    """What the numbers depend on."""
    return {
        "command": command(run, seeds),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "seeds": list(seeds),
        "settings": run.config.model_dump(mode="json"),
        "plugins": plugin_facts(run.config),
        **describe_machine(run.make_runtime()),
        "variants": {name: row.how for name, row in ROWS.items()},
    }


def command(run: Run, seeds: Sequence[int] = (0, 1, 2)) -> str:
    """The command that makes a run's ablation."""
    return run.command("--seeds", ",".join(map(str, seeds))).replace("smaf run", "smaf ablate", 1)


# -------------------------------------------------------------------------------------------------------------- reading


class StoredAblation(BaseModel):
    """What the file must hold; there is more in it."""

    model_config = ConfigDict(strict=True)

    seeds: list[int]
    variants: dict[str, str] = {}
    finished: str = ""
    git_commit: str | None = None
    records: list[dict[str, str | int | float | None]]


def read_ablation(run: Run) -> dict[str, Any] | None:
    """The result of a run's ablation; None if there is none."""
    path = run.path(RESULT)
    if not path.is_file():
        return None
    result: dict[str, Any] = files.read_json(path, {}, StoredAblation)
    return result


def ablation_table(records: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """Mean and standard deviation over seeds, in percent, for people to read.

    Args:
        records: of the result.

    Returns:
        Index: labels of the rows. Columns: ``mIoU``, ``small``, ``medium``, ``large`` at the run's own background
        score; ``to full``, the difference to the full chain with the same seed, in points; ``mIoU, oracle`` and ``to
        full, oracle``: the same at each row's oracle threshold. A dash: no such objects.
    """
    table = pd.DataFrame(list(records))
    table["value"] = 100 * table["value"].astype(float)
    columns = {}
    for choice, label in (("own", ""), ("oracle", ", oracle")):
        of_choice = table[table["bg_choice"] == choice]
        wide = of_choice.pivot(index="variant", columns=["object_size", "seed"], values="value")
        columns[f"mIoU{label}"] = wide["all"].apply(_mean_and_spread, axis=1)
        for size in SIZES if choice == "own" else ():
            columns[size] = wide[size].apply(_mean_and_spread, axis=1)
        gaps = (wide["all"] - wide["all"].loc[FULL]).apply(_mean_and_spread, axis=1, signed=True)
        gaps[FULL] = "–"
        columns[f"to full{label}"] = gaps
    table = pd.DataFrame(columns).reindex([name for name in ROWS if name in columns["mIoU"].index])
    return table.rename(index=LABELS)


def _mean_and_spread(values: pd.Series, signed: bool = False) -> str:
    known = values.dropna()
    if known.empty:
        return "–"
    mean = f"{known.mean():+.1f}" if signed else f"{known.mean():.1f}"
    return f"{mean} ± {known.std():.1f}" if len(known) > 1 else mean

"""The ablation: the chain without one step at a time, on the same data, with the same seeds.

``smaf ablate`` is a sweep over :data:`RUNS`, which share the teacher and its maps. Notebooks 03, 05 and 06 of these
runs record all that the rows need.
"""

import itertools
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple

import pandas as pd

from smaflib import files
from smaflib.apps.sweep import Job, run_jobs
from smaflib.config import Variant
from smaflib.errors import ConfigError
from smaflib.evaluation import SIZES
from smaflib.report.tables import spread
from smaflib.runs import Run
from smaflib.runs.manifest import read_manifest
from smaflib.runs.run import read_run
from smaflib.runs.stages import ABLATION

FULL = "full"  # the row that the others are compared with

RUNS = {FULL: None, "single-scale": "fused", "undenoised": "denoise", "unreactivated": "reactivate"}
"""By the name of a run, the setting of ``self_training`` that it switches off; its folder is ``seed<N>-<name>``."""


class Row(NamedTuple):
    """A row: its label, how its masks are made, and where they are measured."""

    label: str
    how: str
    run: str = FULL  # a key of RUNS
    masks: Variant = Variant.PSEUDO_MASKS  # what notebook 06 measures at the run's background threshold


ROWS: dict[str, Row] = {
    FULL: Row("the whole chain", "nothing is left out"),
    "no_fusion": Row("without fusion", "targets and masks of one scale", "single-scale", Variant.STUDENT_REFINED),
    "one_pass": Row("one pass per image", "fused targets, masks of one scale", masks=Variant.STUDENT_REFINED),
    "no_denoising": Row("without denoising", "targets keep absent classes; masks do not", "undenoised"),
    "no_reactivation": Row("without reactivation", "targets are not divided by the strongest score", "unreactivated"),
    "no_self_training": Row("without self-training", "the teacher's masks", masks=Variant.TEACHER_FUSED_REFINED),
    "no_crf": Row("without CRF", "each pixel gets its strongest class, unrefined", masks=Variant.UNREFINED_MASKS),
    "control": Row("control: single-scale targets", "targets of one scale, masks of fused maps", "single-scale"),
}
"""By the name that files hold."""

MAPS = {
    Variant.PSEUDO_MASKS: Variant.STUDENT_FUSED,
    Variant.STUDENT_REFINED: Variant.STUDENT,
    Variant.TEACHER_FUSED_REFINED: Variant.TEACHER_FUSED,
}
"""What notebook 03 or 05 measures before the refinement of masks, at the oracle threshold."""

LABELS = {name: row.label for name, row in ROWS.items()}


def ablate(
    run: Run, seeds: Sequence[int], part: str = "1/1", cluster: str | None = None, options: Sequence[str] = ()
) -> list[str]:
    """Execute the runs of an ablation in the folder ``ablation`` of a run, and write :data:`ABLATION`.

    The run's settings, except the seed, hold for all rows; its finished stages are reused. The other arguments, result
    and errors are those of :func:`~smaflib.apps.sweep.run_jobs`; a ConfigError if the data has no ground truth.
    """
    if run.config.data.kind == "folder" and run.config.data.masks is None:
        raise ConfigError("an ablation needs ground truth; set data.masks")
    jobs = []
    for seed, (name, setting) in itertools.product(seeds, RUNS.items()):
        overrides = [*run.overrides, f"seed={seed}"]
        if setting:
            overrides += [f"self_training.{setting}=false", "self_training.control=false"]
        folder, source, until = run.path("ablation"), str(run.folder), "06_pseudo_masks"
        jobs.append(Job(f"seed{seed}-{name}", name, seed, tuple(overrides), run.config_file, folder, until, source))
    return run_jobs(jobs, lambda: _write_result(run, seeds), part, cluster, options)


def _write_result(run: Run, seeds: Sequence[int]) -> None:
    records = [record for seed in seeds for name in ROWS for record in _measured(run, seed, name)]
    before = read_ablation(run) or {}
    if not records or (before.get("seeds"), before.get("records")) == (list(seeds), records):
        return  # the file, and with it notebook 08, stays as it is
    manifest = read_manifest(next(run.path("ablation").glob(f"seed*-{FULL}")))
    machine = ("device", "precision", "python", "platform", "git_commit", "git_dirty", "packages")
    facts = {key: manifest.get(key) for key in machine} | {
        "command": command(run, seeds),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "seeds": list(seeds),
        "settings": run.config.model_dump(mode="json"),
        "variants": {name: row.how for name, row in ROWS.items()},
        "records": records,
    }
    files.write_json(run.path(ABLATION), facts)


def _measured(run: Run, seed: int, name: str) -> list[dict[str, Any]]:
    """Records of a row: IoU by object size, of its masks and of its maps; empty if its run is not complete."""
    row = ROWS[name]
    folder = run.path("ablation", f"seed{seed}-{row.run}")
    if read_manifest(folder)["stages"].get("06_pseudo_masks", {}).get("status") != "complete":
        return []
    metrics = read_run(folder).metrics()
    metrics = metrics[(metrics["split"] == "train") & (metrics["class_name"] == "mean") & (metrics["metric"] == "iou")]
    metrics = metrics[metrics["fusion"].isna() | (metrics["fusion"] == run.config.attention.fusion)]
    found = []
    for choice, variant, stages in (("own", row.masks, ["06"]), ("oracle", MAPS.get(row.masks), ["03", "05"])):
        chosen = metrics[(metrics["variant"] == variant) & metrics["stage"].str[:2].isin(stages)]
        for bg_score, size, value in chosen[["bg_score", "object_size", "value"]].itertuples(index=False, name=None):
            where = {"seed": seed, "variant": name, "bg_choice": choice, "bg_score": bg_score, "object_size": size}
            found.append(where | {"metric": "iou", "value": None if pd.isna(value) else value})
    return found


def command(run: Run, seeds: Sequence[int] = (0, 1, 2)) -> str:
    """The command that makes a run's ablation."""
    return run.command("--seeds", ",".join(map(str, seeds))).replace("smaf run", "smaf ablate", 1)


def read_ablation(run: Run) -> dict[str, Any] | None:
    """The result of a run's ablation; None if there is none."""
    return files.read_json(run.path(ABLATION), {}) or None


def ablation_table(records: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """The records of a result as mean ± standard deviation over seeds, in percent.

    Columns: ``mIoU``, ``small``, ``medium``, ``large`` of the masks, at the run's background threshold; ``to full``,
    the difference to the full chain with the same seed, in points; ``mIoU, oracle`` and ``to full, oracle``: the same
    for the maps before refinement, at the oracle threshold of each row.
    """
    table = pd.DataFrame(list(records))
    table["value"] = 100 * table["value"].astype(float)
    columns = {}
    for choice, label in (("own", ""), ("oracle", ", oracle")):
        of_choice = table[table["bg_choice"] == choice]
        wide = of_choice.pivot(index="variant", columns=["object_size", "seed"], values="value")
        for size in ("all", *SIZES) if choice == "own" else ("all",):
            columns[f"mIoU{label}" if size == "all" else size] = _spreads(wide[size])
        columns[f"to full{label}"] = _spreads((wide["all"] - wide["all"].loc[FULL]).drop(index=FULL), "{:+.1f}")
    order = [name for name in ROWS if name in columns["mIoU"]]
    return pd.DataFrame(columns).reindex(order).fillna("").replace("", "–").rename(index=LABELS)


def _spreads(values: Any, form: str = "{:.1f}") -> "pd.Series[str]":
    return pd.Series({name: spread(row, form) for name, row in values.iterrows()}, dtype=object)

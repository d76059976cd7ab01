"""The results on real photos: every run behind ``docs/voc12_small.md``, and the page made of them.

    python -m tools.real_photos run VOC2012 SALIENCY    hours on two cores; resumes where it stopped
    python -m tools.real_photos page                    docs/voc12_small.json and .md, of what is finished

Runs lie in ``papermill_runs/`` like any others. The page has numbers and their curves only:
photos of VOC are not for a repository.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pandas as pd
import yaml

from smaflib import files
from smaflib.apps.ablation import LABELS, read_ablation
from smaflib.config import Variant, variant_label
from smaflib.files import PROJECT_ROOT, RUNS_FOLDER
from smaflib.report.markdown import fill_page, markdown_table
from smaflib.report.seeds import spread
from smaflib.report.tables import class_table, results_table
from smaflib.runs import Run, read_run
from smaflib.runs.manifest import read_manifest
from tools.real_photos_curves import write_curves

PRESET = "configs/voc12-small.yaml"
BASE = "voc12-small"
SEEDS = (0, 1, 2)
PHOTOS, ALL_PHOTOS = (100, 300), 900
"""Of the learning curve; the whole list is its last point."""
PAPERS_RULE = (
    "self_training.refine=none",
    "self_training.saliency_weight=0",
    "self_training.start_share=0",
    "pseudo_masks.saliency_weight=0",
)
"""What the preset does otherwise than the paper, from the student's targets to the masks."""
PAPER = f"{BASE}-{PHOTOS[-1]}-paper"
"""The run by that rule, with its ablation: fewer photos, since all rows on all photos take two hours."""
ABLATIONS = {"ablation": BASE, "ablation_paper": PAPER}
"""By the key of the JSON and the name of the table; of which run."""

JSON, PAGE = PROJECT_ROOT / "docs" / "voc12_small.json", PROJECT_ROOT / "docs" / "voc12_small.md"
CURVES = PROJECT_ROOT / "docs" / "voc12_small.png"
TRIED = PROJECT_ROOT / "benchmarks" / "results" / "student_targets.json"
TEST_CRF = PROJECT_ROOT / "benchmarks" / "results" / "segmentation_crf.json"
README, README_TABLES = PROJECT_ROOT / "README.md", ("summary",)
LEDGER, LEDGER_TABLES = PROJECT_ROOT / "docs" / "claims.md", ("ledger",)
DRAWN = RUNS_FOLDER / "reference"
COMMAND = "tools/real_photos.py"
SIGNED = "{:+z.1f}"


@dataclass(frozen=True)
class Planned:
    """A run of the page.

    Attributes:
        name: of its folder.
        kind: ``chain``, ``alone`` (the preset as it is, with nothing beside it), ``plain``, ``supervised``, or
            ``photos`` with their number, or ``paper`` (by the paper's own rule).
        seed: of the run.
        settings: on top of the preset's.
        options: further ones of ``smaf run``.
    """

    name: str
    kind: str
    seed: int
    settings: tuple[str, ...] = ()
    options: tuple[str, ...] = ()


def planned_runs() -> Iterator[Planned]:
    """All runs, in the order in which they are made: what matters most comes first."""
    control = "self_training.control=true"
    for seed in SEEDS:
        yield Planned(_name(seed), "chain", seed, (control,))
        truth = (control, "segmentation.supervision=ground_truth")
        yield Planned(f"{_name(seed)}-supervised", "supervised", seed, truth, _reuse(_name(seed)))
    yield Planned(f"{BASE}-alone", "alone", 0)
    until = ("--until", "pseudo_masks")
    for seed in SEEDS:
        yield Planned(f"{_name(seed)}-plain", "plain", seed, ("classifier.pretraining=plain",), until)
    for number in PHOTOS:
        yield Planned(f"{BASE}-{number}", f"photos {number}", 0, (_photos_of(number),))
    fewest, most = PHOTOS[0], PHOTOS[-1]
    options = (*_reuse(f"{BASE}-{most}"), *until)
    yield Planned(PAPER, "paper", 0, (_photos_of(most), control, *PAPERS_RULE), options)
    for seed in SEEDS[1:]:  # whether what self-training gains there is more than one seed's luck
        yield Planned(f"{_name(seed)}-{fewest}", f"photos {fewest}", seed, (_photos_of(fewest),), until)


def _reuse(name: str) -> tuple[str, ...]:
    return ("--reuse", name) if (RUNS_FOLDER / name).exists() else ()


def _photos_of(number: int) -> str:
    return f"data.train_split={_list_of(number)}"


def _name(seed: int) -> str:
    return BASE if seed == 0 else f"{BASE}-seed{seed}"


def _list_of(number: int) -> Path:
    return RUNS_FOLDER / "lists" / f"voc12_small_{number}.txt"


# ------------------------------------------------------------------------------------------------------------- running


def make_runs(root: Path, saliency: Path, only: Sequence[str] = ()) -> None:
    """Make what is not made yet, one after the other, and the page after each.

    Args:
        root: of VOC 2012, holds JPEGImages.
        saliency: the folder of saliency maps.
        only: kinds of runs, such as ``chain``, or ``ablation``; empty: all. The ablation by the paper's rule belongs
            to the kind ``paper``.
    """
    ids = (PROJECT_ROOT / "configs" / "lists" / "voc12_small_train.txt").read_text(encoding="utf-8").split()
    for number in PHOTOS:
        files.write_text(_list_of(number), "".join(f"{image_id}\n" for image_id in ids[:number]))
    paths = (f"data.root={root.absolute()}", f"data.saliency={saliency.absolute()}")
    result = files.read_json(JSON, {})
    elsewhere = set(result.get("runs", {})) if result.get("preset") == preset_hash() else set()
    for planned in planned_runs():
        if planned.name in elsewhere and not (RUNS_FOLDER / planned.name).exists():
            print(f"{planned.name}: made on another machine, see {JSON.name}", file=sys.stderr, flush=True)
        elif not only or planned.kind.split()[0] in only:
            _make(planned, paths)
            if planned.name == PAPER:
                _make_ablation(planned, paths)
    if not only or "ablation" in only:  # of one seed: the chains themselves have the rows of claims 3 and 4
        _make_ablation(next(planned_runs()), paths)


def _make(planned: Planned, paths: Sequence[str]) -> None:
    seed = (f"seed={planned.seed}",) if planned.seed else ()
    settings = (*paths, *seed, *planned.settings)
    _smaf("run", PRESET, "--name", planned.name, *_each_set(settings), *planned.options)
    write_page()


def _make_ablation(planned: Planned, paths: Sequence[str]) -> None:
    settings = (*paths, *planned.settings)
    _smaf("ablate", PRESET, "--name", planned.name, *_each_set(settings), "--seeds", str(planned.seed))
    write_page()


def _each_set(settings: Sequence[str]) -> list[str]:
    return [word for setting in settings for word in ("--set", setting)]


def _smaf(*words: str) -> None:
    print("$ smaf", shlex.join(words), file=sys.stderr, flush=True)
    subprocess.run([sys.executable, "-m", "smaflib", *words], check=True, cwd=PROJECT_ROOT)


# ---------------------------------------------------------------------------------------------------------- collecting


def collect(kept: dict[str, Any]) -> dict[str, Any]:
    """What the finished runs have measured, as JSON: their rows, classes, stages and circumstances.

    Args:
        kept: what this gave before. Its runs that are not on this machine stay, so that hours of runs can be made on
            several machines, if the preset has not changed since.
    """
    preset = preset_hash()
    before = kept if kept.get("preset") == preset else {}
    runs = {}
    for planned in planned_runs():
        if _is_finished(planned.name):
            runs[planned.name] = _measured(planned, read_run(RUNS_FOLDER / planned.name))
        elif planned.name in before.get("runs", {}):
            runs[planned.name] = before["runs"][planned.name]
    return {"preset": preset, "runs": runs} | {
        key: _ablation_of(name) or before.get(key) for key, name in ABLATIONS.items()
    }


def _ablation_of(name: str) -> dict[str, Any] | None:
    """The part of a run's ablation that the page needs; None if this machine has none."""
    ablation = read_ablation(read_run(RUNS_FOLDER / name)) if _is_finished(name) else None
    wanted = ("command", "finished", "seeds", "git_commit", "precision", "records")
    return {key: ablation[key] for key in wanted} if ablation else None


def preset_hash() -> str:
    """What the preset sets, as a hash: comments and the order of its lines do not count."""
    settings = yaml.safe_load((PROJECT_ROOT / PRESET).read_text(encoding="utf-8"))
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def _is_finished(name: str) -> bool:
    """Whether a run on this machine has its results; half a run would make a column of half a mean."""
    stages = read_manifest(RUNS_FOLDER / name)["stages"]
    return (
        bool(stages) and all(entry["status"] == "complete" for entry in stages.values()) and "06_pseudo_masks" in stages
    )


def _measured(planned: Planned, run: Run) -> dict[str, Any]:
    metrics = run.metrics()
    classes = class_table(metrics).reset_index()
    wanted = [Variant.TEACHER_FUSED_REFINED, Variant.PSEUDO_MASKS, Variant.SEGMENTATION]
    chosen = classes[classes["variant"].isin(wanted)] if planned.kind == "chain" else classes.head(0)
    rows = results_table(metrics).reset_index()
    return _facts(planned, run) | {"rows": _records(rows), "classes": _records(chosen)}


def _facts(planned: Planned, run: Run) -> dict[str, Any]:
    manifest = read_manifest(run.folder)
    wanted = ("git_commit", "git_dirty", "device", "precision", "python", "config_hash")
    stages = {
        name: {key: entry[key] for key in ("status", "started", "seconds", "peak_memory_mb")}
        for name, entry in manifest["stages"].items()
    }
    torch = manifest["packages"].get("torch")
    facts = {key: manifest.get(key) for key in wanted} | {
        "torch": torch,
        "overrides": run.shown_overrides,
        "stages": stages,
    }
    scores = {path.stem: files.read_json(path, {})["bg_score"] for path in sorted(run.path("bg_scores").glob("*.json"))}
    return {"kind": planned.kind, "seed": planned.seed} | facts | {"bg_scores": scores}


def _records(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows of a table as plain dictionaries; what was not measured is left out."""
    return [
        {
            str(key): round(value, 3) if isinstance(value, float) else value
            for key, value in row.items()
            if value == value
        }
        for row in table.to_dict("records")
    ]


# ------------------------------------------------------------------------------------------------------------- writing


def write_page() -> None:
    """Write the JSON, and the tables between the marks of the page, and those that the README has marks for."""
    result = collect(files.read_json(JSON, {}))
    files.write_json(JSON, result)
    made = tables(result)
    if result["runs"]:
        write_curves(CURVES, _frame(result, "rows"))
    own = [name for name in made if name not in (*README_TABLES, *LEDGER_TABLES)]
    for page, names in ((PAGE, own), (README, README_TABLES), (LEDGER, LEDGER_TABLES)):
        fill_page(page, COMMAND, {name: made[name] for name in names})


def tables(result: dict[str, Any]) -> dict[str, str]:
    """Markdown tables by name, of what :func:`collect` gives."""
    rows, classes = _frame(result, "rows"), _frame(result, "classes")
    records = files.read_json(TRIED, {"records": []})["records"]
    made = {
        "results": _results,
        "goals": lambda rows: _goals(rows, records),
        "claims": lambda rows: _claims(rows, records, result),
        "photos": _photos,
    }
    return {
        "summary": _summary(rows),
        "ledger": _ledger(rows, records, result),
        **{name: "No run is finished." if rows.empty else make(rows) for name, make in made.items()},
        "classes": "No run is finished." if classes.empty else _classes(classes),
        **{key: _ablation(result[key]) for key in ABLATIONS},
        "tried": _tried(records),
        "test_crf": _test_crf(files.read_json(TEST_CRF, {"records": []})["records"]),
        "alone": _alone(result["runs"], rows),
        "runs": _runs(result["runs"]),
    }


def _frame(result: dict[str, Any], part: str) -> pd.DataFrame:
    """Rows of all runs, each with its run's kind and seed."""
    return pd.DataFrame(
        [{"kind": run["kind"], "seed": run["seed"]} | row for run in result["runs"].values() for row in run[part]]
    )


def _results(rows: pd.DataFrame) -> str:
    rows = rows[(rows["split"] == "train") | (rows["stage"] == "07_segmentation")]
    lines = []
    keys = ["stage", "variant", "fusion", "split", "scale"]
    chain = _chains(rows)
    plain = rows[rows["kind"] == "plain"]
    for key, group in chain.groupby(keys, dropna=False, sort=False):
        stage, variant, fusion, split, scale = (cast(Any, part) for part in cast(tuple[Any, ...], key))
        if stage.startswith("04"):
            continue
        label = variant_label(variant, fusion or None) + (f", scale {scale}" if scale else "")
        beside = plain[_is(plain, dict(zip(keys, cast(tuple[Any, ...], key), strict=True)))]
        sizes = [_mean(group[size]) if size in group else "" for size in ("small", "medium", "large")]
        seeds = " ".join(f"{value:.1f}" for value in group.sort_values("seed")["mIoU"])
        lines.append([label, split, seeds, spread(group["mIoU"]), *sizes, spread(beside["mIoU"])])
    head = ["EPS mode", "split", "seeds", "mean ± sd", "small", "medium", "large", "plain mode, mean ± sd"]
    return markdown_table(head, lines)


def _chains(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows of the chains, and of runs on true masks the one row that is their own: the others are a chain's again."""
    own = (rows["kind"] == "supervised") & (rows["variant"] == Variant.FULL_SUPERVISION)
    return rows[(rows["kind"] == "chain") | own]


MAPS = {"stage": "03_multi_scale_attention"}
NETWORK = {"variant": Variant.SEGMENTATION, "split": "val"}
SUMMARY: dict[str, dict[str, Any]] = {
    "attention at one scale, the image's own": MAPS | {"variant": Variant.TEACHER, "scale": "1"},
    "attention, four scales fused by sum": MAPS | {"variant": Variant.TEACHER_FUSED, "fusion": "sum"},
    "teacher's masks: fused, dense CRF": {"variant": Variant.TEACHER_FUSED_REFINED},
    "**pseudo masks**: student's, fused, dense CRF": {"variant": Variant.PSEUDO_MASKS},
    "control: the same, student of one scale": {"variant": Variant.CONTROL_FUSED_REFINED},
    "**segmentation network**, new images": NETWORK,
    "the same network, learned from true masks": {"variant": Variant.FULL_SUPERVISION, "split": "val"},
}


def _summary(rows: pd.DataFrame) -> str:
    """The README's table: the chain on real photos, and beside it on the drawn images of the reference run."""
    photos = _chains(rows) if len(rows) else rows
    drawn = results_table(read_run(DRAWN).metrics()).reset_index()
    lines = _beside(photos, drawn)
    seeds = photos.loc[photos["kind"] == "chain", "seed"].nunique() if len(photos) else 0
    number = f"{seeds} seed{'s' * (seeds != 1)}"
    head = ["", f"[photos](docs/voc12_small.md), {number}", "[drawn](docs/mini_results.md), 1 seed"]
    return markdown_table(head, lines)


def _beside(*tables: pd.DataFrame) -> list[list[str]]:
    """The rows of :data:`SUMMARY`, a column per table; what no table has is left out, what few seeds have says so."""
    columns = []
    for table in tables:
        seeds = table["seed"].nunique() if "seed" in table else 1
        found = [table.loc[_is(table, {"split": "train"} | where), "mIoU"] for where in SUMMARY.values() if len(table)]
        columns.append([_spread(row, seeds) for row in found])
    wanted = [column or [""] * len(SUMMARY) for column in columns]
    return [[label, *cells] for label, *cells in zip(SUMMARY, *wanted, strict=True) if any(cells)]


def _is(table: pd.DataFrame, values: dict[str, Any]) -> pd.Series[bool]:
    chosen = pd.Series(True, index=table.index)
    for key, value in values.items():
        chosen &= table[key].isna() if value != value else table[key] == value
    return chosen


def _claims(rows: pd.DataFrame, records: list[dict[str, Any]], result: dict[str, Any]) -> str:
    """Differences between rows of one seed: attention maps at oracle thresholds, masks at the runs' own scores."""
    plain, none = _gaps(rows, "plain"), pd.Series(dtype=float)
    suffix = f", all by the paper's rule ({PHOTOS[-1]} photos)"
    by_papers_rule = {label + suffix: gaps for label, gaps in _gaps_by_papers_rule(rows, result).items()}
    found = _gaps(rows) | _gaps_of_ablation(result["ablation"]) | _gaps_of_trials(records) | by_papers_rule
    lines = [
        [label, *_per_seed(gaps), *_per_seed(plain.get(label, none))]
        for label, gaps in sorted(found.items(), key=lambda item: item[0][0])  # by the claim's number
        if len(gaps)
    ]
    head = ["claim", "EPS mode, difference per seed", "mean ± sd", "plain mode, difference per seed", "mean ± sd"]
    return markdown_table(head, lines)


def _per_seed(gaps: pd.Series[float]) -> list[str]:
    return [" ".join(map(SIGNED.format, gaps)), spread(gaps, SIGNED)]


GOALS: tuple[tuple[str, str, dict[str, Any], float], ...] = (
    ("plain teacher, fused + CRF", "plain", {"variant": Variant.TEACHER_FUSED_REFINED}, 54.0),
    ("EPS teacher, fused + CRF", "chain", {"variant": Variant.TEACHER_FUSED_REFINED}, 69.0),
    ("pseudo masks: student, fused + CRF", "chain", {"variant": Variant.PSEUDO_MASKS}, 71.0),
    ("segmentation network, on the 200", "chain", NETWORK, 52.0),
)
"""What, of which kind of run, which of its rows, and the goal that was set before any run."""
AUTO, AUTO_GOAL = "pseudo masks: `bg_score: auto` against the oracle threshold (every third photo)", -1.0
SHARE, SHARE_GOAL = "segmentation network, as a share of the same network learned from true masks", 0.9


def _goals(rows: pd.DataFrame, records: list[dict[str, Any]]) -> str:
    """The goals set before the runs, beside what the runs gave."""
    lines = []
    for label, kind, where, goal in GOALS:
        values = rows.loc[(rows["kind"] == kind) & _is(rows, {"split": "train"} | where), "mIoU"]
        lines.append(_goal(label, values, goal, "{:.1f}"))
    ours, theirs = (
        rows[_is(rows, {"kind": kind, "split": "val", "variant": variant})].set_index("seed")["mIoU"]
        for kind, variant in (("chain", Variant.SEGMENTATION), ("supervised", Variant.FULL_SUPERVISION))
    )
    lines.append(_goal(SHARE, (ours / theirs).dropna(), SHARE_GOAL, "{:.2f}"))
    trials = _trials(records)
    students = trials[_is(trials, {"photos": ALL_PHOTOS, "what": "student", "settings": ""})]
    lines.append(_goal(AUTO, students["refined_auto"] - students["refined_oracle"], AUTO_GOAL, SIGNED))
    return markdown_table(["what", "goal", "mean ± sd", "seeds", "reached"], lines)


def _goal(label: str, values: pd.Series[float], goal: float, form: str) -> list[str]:
    reached = "not run" if values.empty else "yes" if values.mean() >= goal else "no"
    return [label, f">= {form.format(goal)}", spread(values, form), str(len(values)), reached]


SCALES = "1. scales are complementary: maps fused by sum against the best single scale, all objects"
SMALL = "1. scales are complementary: maps fused by sum against the best single scale, small objects"
SMALL_OWN = "1. scales are complementary: maps fused by sum against scale 1, small objects"
DENOISING = "2. denoising: the whole chain against targets with the maps of absent classes"
REACTIVATION = "2. reactivation: the whole chain against targets that are not divided by the strongest score"
STUDENT = "3. self-training: student + CRF against teacher + CRF"
FUSED = "4. fused against single-scale targets"
CRF = "teacher, fused + CRF against its scale 1 + CRF"
SELF_TRAINING = (DENOISING, REACTIVATION, STUDENT, FUSED)
"""Claims about what a student learns from."""


def _gaps(rows: pd.DataFrame, kind: str = "chain") -> dict[str, pd.Series[float]]:
    """Differences between two rows of one seed, by what they say about the paper; without the rows, none.

    Args:
        rows: of all runs.
        kind: of the runs that count.
    """
    rows = rows[rows["kind"] == kind] if len(rows) else rows
    gaps: dict[str, pd.Series[float]] = {}
    if rows.empty:
        return gaps
    maps = rows[(rows["stage"] == "03_multi_scale_attention") & (rows["split"] == "train")]
    fused = maps[(maps["variant"] == Variant.TEACHER_FUSED) & (maps["fusion"] == "sum")].set_index("seed")
    single = maps[maps["variant"] == Variant.TEACHER]
    of_any, of_own = single.groupby("seed"), single[single["scale"] == "1"].groupby("seed")
    for size, label, scales in (("mIoU", SCALES, of_any), ("small", SMALL, of_any), ("small", SMALL_OWN, of_own)):
        if size in fused:
            gaps[label] = (fused[size] - scales[size].max()).dropna()
    refined = rows[(rows["stage"] == "06_pseudo_masks") & (rows["split"] == "train")]
    of = {name: group.set_index("seed")["mIoU"] for name, group in refined.groupby("variant")}
    for label, ours, theirs in (
        (STUDENT, Variant.PSEUDO_MASKS, Variant.TEACHER_FUSED_REFINED),
        (FUSED, Variant.PSEUDO_MASKS, Variant.CONTROL_FUSED_REFINED),
        (CRF, Variant.TEACHER_FUSED_REFINED, Variant.TEACHER_REFINED),
    ):
        if ours in of and theirs in of:
            gaps[label] = (of[ours] - of[theirs]).dropna()
    return gaps


def _gaps_of_ablation(ablation: dict[str, Any] | None) -> dict[str, pd.Series[float]]:
    """What the pseudo masks of each seed gain by a step, at the run's own background score; without the rows, none."""
    if not ablation:
        return {}
    of = _ablated(ablation, "own")
    return {
        label: (of["full"] - of[row]).dropna()
        for label, row in ((DENOISING, "no_denoising"), (REACTIVATION, "no_reactivation"))
        if row in of
    }


def _gaps_by_papers_rule(rows: pd.DataFrame, result: dict[str, Any]) -> dict[str, pd.Series[float]]:
    """What a student gains by each step, if the paper's rule decides about its targets and masks."""
    gaps = _gaps(rows, "paper") | _gaps_of_ablation(result["ablation_paper"])
    return {label: gaps[label] for label in SELF_TRAINING if label in gaps}


CLAIMS: tuple[tuple[str, str, str, float], ...] = (
    ("maps of several scales complement each other: fused against the best single scale", "no number", SCALES, 1.0),
    ("small objects gain: fused against the scale that finds them best", "no number", SMALL, 1.0),
    ("small objects gain: fused against the image's own scale", "no number", SMALL_OWN, 1.0),
    ("denoised targets teach more than those with absent classes", "not looked up", DENOISING, 1.0),
    ("reactivated targets teach more than scores as they are", "not looked up", REACTIVATION, 1.0),
    ("a student surpasses its teacher (both fused, with CRF)", "+2.3 (73.9 - 71.6)", STUDENT, 2.0),
    ("fused targets teach more than those of one scale", "no number", FUSED, 1.0),
)
"""Claim, the paper's number, which of :func:`_gaps` or :func:`_gaps_of_ablation` it is, and the difference
from which on it counts as shown."""


def _ledger(rows: pd.DataFrame, records: list[dict[str, Any]], result: dict[str, Any]) -> str:
    """Each claim of the paper, what it is worth here, and whether that shows it."""
    reference = read_run(DRAWN)
    rows_of_drawn = results_table(reference.metrics()).reset_index().assign(kind="chain", seed=0)
    photos, plain = _gaps(rows) | _gaps_of_ablation(result["ablation"]), _gaps(rows, "plain")
    by_rule, trials = _gaps_by_papers_rule(rows, result), _gaps_of_trials(records)
    drawn = _gaps(rows_of_drawn) | _gaps_of_ablation(read_ablation(reference))
    lines, none = [], pd.Series(dtype=float)
    for claim, paper, key, goal in CLAIMS:
        hard = trials.get(key + WITH_HARD_TARGETS.format(PHOTOS[-1]), none)
        others = {"in plain mode": plain.get(key, none), "by the paper's rule": by_rule.get(key, none)}
        verdict = _verdict(photos.get(key, none), others | {f"with hard targets on {PHOTOS[-1]} photos": hard}, goal)
        found = [gaps.get(key, none) for gaps in (photos, plain, by_rule)]
        cells = [_with_seeds(gaps) for gaps in (*found, hard, drawn.get(key, none))]
        lines.append([claim, paper, *cells, f">= {goal:+.1f}", verdict])
    by_rule_of = [f"{PHOTOS[-1]} photos, the paper's rule", "the same, hard targets"]
    of_photos = ["photos", "photos, plain mode", *by_rule_of]
    return markdown_table(["claim", "the paper", *of_photos, "drawn", "counts as shown from", "photos say"], lines)


def _verdict(ours: pd.Series[float], others: dict[str, pd.Series[float]], goal: float) -> str:
    """What the photos say of a claim: the preset first, and where that shows nothing, each other way that does."""
    if ours.empty:
        return "not run"
    if ours.mean() >= goal:
        return "shown"
    shown = [how for how, gaps in others.items() if not gaps.empty and gaps.mean() >= goal]
    return f"shown {' and '.join(shown)} only" if shown else "not shown"


def _spread(values: pd.Series[float], seeds: int) -> str:
    """Mean ± sd; of fewer seeds than what stands beside it, how many."""
    return _with_seeds(values, "{:.1f}") if len(values) < seeds else spread(values)


def _with_seeds(values: pd.Series[float], form: str = SIGNED) -> str:
    return f"{spread(values, form)} ({len(values)} seed{'s' * (len(values) != 1)})" if len(values) else ""


def _classes(rows: pd.DataFrame) -> str:
    shown = rows[(rows["split"] == "train") | (rows["stage"] == "07_segmentation")]
    names = [
        name for name in shown.columns if name not in ("kind", "seed", "stage", "variant", "fusion", "split", "scale")
    ]
    groups = {variant_label(str(variant)): group for variant, group in shown.groupby("variant", sort=False)}
    return markdown_table(
        ["class", *groups], [[name, *(spread(group[name]) for group in groups.values())] for name in names]
    )


def _ablation(ablation: dict[str, Any] | None) -> str:
    if not ablation:
        return "The ablation is not finished."
    of = {choice: _ablated(ablation, choice) for choice in ("own", "oracle")}
    lines = []
    for name in map(str, of["own"]):
        cells = []
        for wide in of.values():
            gaps = (wide[name] - wide["full"]).dropna()
            cells += [spread(wide[name]), spread(gaps, SIGNED) if name != "full" else ""]
        lines.append([LABELS[name], str(int(of["own"][name].notna().sum())), *cells])
    return markdown_table(
        ["row", "seeds", "mIoU", "to the whole chain", "mIoU, oracle", "to the whole chain, oracle"], lines
    )


def _ablated(ablation: dict[str, Any], choice: str) -> pd.DataFrame:
    """The ablation's mIoU in %: a line per seed, a column per row in their order; at one choice of background score."""
    records = pd.DataFrame(ablation["records"])
    chosen = records[(records["object_size"] == "all") & (records["bg_choice"] == choice)]
    wide = chosen.assign(value=100 * chosen["value"]).pivot(index="seed", columns="variant", values="value")
    return wide[list(chosen["variant"].unique())]


def _tried(records: list[dict[str, Any]]) -> str:
    """What ``benchmarks/student_targets.py`` has measured on runs of the preset: every third of the photos."""
    tried = _trials(records)
    lines = []
    for (photos, *words), group in cast(Any, tried.groupby(["photos", "what", "settings"], sort=False)):
        measured = [spread(group[column]) for column in MEASURED]
        lines.append([*words, str(photos), " ".join(map(str, group["seed"])), *measured])
    head = ["what", "settings", "photos", "seeds", "fused maps", "masks, auto", "masks, oracle"]
    return markdown_table(head, lines) if lines else "Nothing yet."


def _test_crf(records: list[dict[str, Any]]) -> str:
    """What ``benchmarks/segmentation_crf.py`` has measured: a line per network and images, a column per CRF."""
    photos_of = _photos_of_runs()
    records = [record for record in records if record["run"] in photos_of]
    if not records:
        return "Nothing yet."
    table = pd.DataFrame(records)
    crfs = list(dict.fromkeys(table["crf"]))
    lines = []
    for (run, split), group in table.groupby(["run", "split"], sort=False):
        miou = group.set_index("crf")["mIoU"]
        which = {"val": "validation", "others": "of the 900, not learned from", "train": "learned from"}[str(split)]
        cells = [f"{miou[crf]:.1f}" if crf in miou else "" for crf in crfs]
        lines.append([str(photos_of[str(run)]), f"{group['images'].iloc[0]}, {which}", *cells])
    return markdown_table(
        ["photos learned from", "evaluated on", *("no CRF" if c == "none" else c for c in crfs)], lines
    )


MEASURED = ("fused", "refined_auto", "refined_oracle")


def _photos_of_runs() -> dict[str, int]:
    """By a run's name, how many photos it learns from."""
    photos_of = {_name(seed): ALL_PHOTOS for seed in SEEDS}
    return photos_of | {f"{_name(seed)}-{number}": number for seed in SEEDS for number in PHOTOS}


def _trials(records: list[dict[str, Any]]) -> pd.DataFrame:
    """One row per trial on a run of the preset.

    Returns:
        Columns ``photos``, ``what``, ``settings``, ``seed``, and mIoU of :data:`MEASURED`; all photos come first.
    """
    photos_of = _photos_of_runs()
    found = []
    for record in records:
        if record["run"] in photos_of:
            settings = ["single-scale targets"] * record["control"] + _settings(record["settings"])
            values = {column: record[column]["mIoU"] for column in MEASURED}
            what = {"what": record["variant"], "settings": ", ".join(settings), "seed": record["seed"]}
            found.append({"photos": photos_of[record["run"]]} | what | values)
    table = pd.DataFrame(found, columns=["photos", "what", "settings", "seed", *MEASURED])
    return table.sort_values(["photos", "seed"], ascending=[False, True], kind="stable")


def _settings(settings: list[str]) -> list[str]:
    """As they are shown: the paper's rule in three words."""
    all_of_it = set(PAPERS_RULE) <= set(settings)
    return ["all by the paper's rule"] * all_of_it + [
        f"`{setting}`" for setting in settings if not (all_of_it and setting in PAPERS_RULE)
    ]


PAPERS_MASKS = "`pseudo_masks.saliency_weight=0`"
"""The settings of trials whose masks come from attention maps alone, by the paper's rule."""
WITH_HARD_TARGETS = ", by the paper's rule with hard targets (every third of {} photos)"
HARD = "all by the paper's rule, `self_training.targets=hard`"
HARD_OF_ONE_SCALE = f"single-scale targets, {HARD}"
"""The settings of trials that are by the paper's rule but for targets of the strongest class alone."""


def _gaps_of_trials(records: list[dict[str, Any]]) -> dict[str, pd.Series[float]]:
    """Claims 3 and 4 as of :func:`_gaps`, where trials say otherwise than the runs: on every third photo."""
    trials = _trials(records)
    masks = ", masks without saliency maps (the paper's rule; every third photo)"
    teacher, student = ("teacher", PAPERS_MASKS), ("student", PAPERS_MASKS)

    def auto(photos: int, network: str, settings: str) -> pd.Series[float]:
        ours = trials[_is(trials, {"photos": photos, "settings": settings})]
        return ours[ours["what"].str.startswith(f"{network},")].set_index("seed")["refined_auto"]

    pairs = [
        (STUDENT + masks, ALL_PHOTOS, student, teacher),
        (FUSED + masks, ALL_PHOTOS, student, ("student_control", PAPERS_MASKS)),
    ]
    for photos in (PHOTOS[-1], ALL_PHOTOS):
        label, hard = WITH_HARD_TARGETS.format(photos), ("the paper's rule", HARD)
        pairs.append((STUDENT + label, photos, hard, teacher))
        pairs.append((FUSED + label, photos, hard, ("the paper's rule", HARD_OF_ONE_SCALE)))
    found = {}
    for label, photos, ours, theirs in pairs:
        gaps = (auto(photos, *ours) - auto(photos, *theirs)).dropna()
        if len(gaps):
            found[label] = gaps
    return found


def _photos(rows: pd.DataFrame) -> str:
    """The learning curve; what self-training gains at each of its points."""
    lines = []
    wanted = (Variant.TEACHER_FUSED_REFINED, Variant.PSEUDO_MASKS, Variant.SEGMENTATION)
    for kind in [*(f"photos {number}" for number in PHOTOS), "chain"]:
        gaps = _gaps(rows, kind)
        of_kind = rows[rows["kind"] == kind]
        values = [of_kind.loc[of_kind["variant"] == variant, "mIoU"] for variant in wanted]
        if STUDENT in gaps:
            teacher, masks, network = (_spread(column, len(gaps[STUDENT])) for column in values)
            cells = [teacher, masks, _per_seed(gaps[STUDENT])[0], network]
            lines.append([kind.removeprefix("photos ").replace("chain", str(ALL_PHOTOS)), *cells])
    columns = ["teacher, fused + CRF", "pseudo masks (of these photos)", "difference per seed"]
    return markdown_table(["photos", *columns, "segmentation network (on the 200)"], lines)


def _alone(runs: dict[str, Any], rows: pd.DataFrame) -> str:
    """Time and memory of each stage of the run that had the machine to itself, and its results beside seed 0's."""
    facts = next((facts for facts in runs.values() if facts["kind"] == "alone"), None)
    if facts is None:
        return "Not run."
    stages = facts["stages"]
    lines = [
        [f"`{name}`", f"{entry['seconds'] / 60:.1f}", f"{entry['peak_memory_mb'] / 1000:.1f}"]
        for name, entry in stages.items()
    ]
    seconds = sum(entry["seconds"] for entry in stages.values())
    memory = max(entry["peak_memory_mb"] for entry in stages.values())
    lines.append(["**all**", f"{seconds / 60:.1f}", f"{memory / 1000:.1f}"])
    of_seed = rows[rows["seed"] == facts["seed"]]
    compared = _beside(*(of_seed[of_seed["kind"] == kind] for kind in ("chain", "alone")))
    tables = [(["stage", "minutes", "GB"], lines), (["mIoU", f"`{_name(facts['seed'])}`", "this run"], compared)]
    return "\n\n".join(markdown_table(head, body) for head, body in tables)


def _runs(runs: dict[str, Any]) -> str:
    lines = []
    for name, facts in runs.items():
        stages = facts["stages"].values()
        seconds = sum(entry["seconds"] or 0 for entry in stages)
        memory = max((entry["peak_memory_mb"] or 0 for entry in stages), default=0)
        dates = sorted(entry["started"][:10] for entry in stages)
        scores = ", ".join(f"{network} {score:g}" for network, score in facts["bg_scores"].items())
        where = f"{facts['device']}, {facts['precision']}, torch {facts['torch']}"
        commit = (facts["git_commit"] or "?")[:8]
        lines.append([f"`{name}`", dates[-1], f"{seconds / 60:.0f}", f"{memory / 1000:.1f}", scores, commit, where])
    return markdown_table(["run", "date", "minutes", "GB", "background scores", "commit", "where"], lines)


def _mean(values: pd.Series[Any]) -> str:
    column = values.astype(float).dropna()
    return f"{column.mean():.1f}" if len(column) else ""


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    actions = parser.add_subparsers(dest="action", required=True)
    run_action = actions.add_parser("run", help="make the runs, and the page after each")
    run_action.add_argument("root", type=Path, metavar="VOC2012", help="holds JPEGImages")
    run_action.add_argument("saliency", type=Path, metavar="SALIENCY", help="folder of saliency maps")
    run_action.add_argument(
        "--only", nargs="*", default=[], metavar="KIND", help="chain, supervised, alone, plain, photos, paper, ablation"
    )
    actions.add_parser("page", help="make the page of what is finished")
    chosen = parser.parse_args()
    if chosen.action == "run":
        make_runs(chosen.root, chosen.saliency, chosen.only)
    else:
        write_page()

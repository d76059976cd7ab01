"""A sweep: the same settings over several seeds, and over a grid of some of them; mean, spread, paired differences.

``smaf sweep`` runs what is missing, one run after the other, or through Snakemake beside each other
(:mod:`smaflib.apps.workflow`). Each run is a folder like any other, and a stage that two runs of a seed have in common
is made once (:mod:`smaflib.runs.reuse`). A killed sweep resumes where it stopped.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from smaflib import files
from smaflib.apps.workflow import FOLDER as WORKFLOW_FOLDER
from smaflib.apps.workflow import Combination, check_workflow, first_open_stage, run_workflow
from smaflib.config import load_config
from smaflib.errors import ConfigError, RunError, StageFailed
from smaflib.pipeline import check_plugins
from smaflib.report.seeds import FORMATS, difference_table, formatted, measurements, spread_table
from smaflib.runs.manifest import read_manifest
from smaflib.runs.run import read_run, run_folder
from smaflib.runs.stages import STAGES, stage_named

TABLE = "runs.tsv"
MOST_RUNS = 1000
MOST_SEEDS = 10_000


@dataclass(frozen=True)
class Planned:
    """A run of a sweep.

    Attributes:
        name: of its folder.
        setting: what the grid sets for it, as people read it; empty without a grid.
        seed: of the run.
        overrides: ``key=value``, the seed and the grid's.
    """

    name: str
    setting: str
    seed: int
    overrides: tuple[str, ...]


def parse_seeds(text: str) -> list[int]:
    """``"0-4"``, ``"0,1,7"`` or both together, in the order given, each once.

    Raises:
        ConfigError: if it is anything else.
    """
    seeds: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"\s*(\d{1,9})(?:\s*-\s*(\d{1,9}))?\s*", part)
        first, last = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
        if not first <= last < first + MOST_SEEDS:
            raise ConfigError(f"--seeds must be numbers such as 0,1,2 or a range such as 0-4, got {text[:100]!r}")
        seeds += range(first, last + 1)
    return list(dict.fromkeys(seeds))


def parse_grid(texts: Sequence[str]) -> dict[str, list[Any]]:
    """``["attention.fusion=sum,max"]`` to the values of each setting; a list of lists in YAML's way, ``[[1], [1, 2]]``.

    Raises:
        ConfigError: if one is no ``KEY=VALUE,VALUE``, or a setting is given twice.
    """
    grid: dict[str, list[Any]] = {}
    for text in texts:
        key, equals, values = text.partition("=")
        try:
            parsed = yaml.safe_load(f"[{values}]")
        except (yaml.YAMLError, ValueError, RecursionError):
            parsed = None
        if not equals or not key.strip() or not isinstance(parsed, list) or not parsed:
            raise ConfigError(f"--grid must be a setting and its values, KEY=VALUE,VALUE, got {text[:100]!r}")
        if key.strip() in (*grid, "seed"):
            cure = "--seeds sets it" if key.strip() == "seed" else "put all its values into one --grid"
            raise ConfigError(f"--grid gives {key.strip()!r} a second time; {cure}")
        grid[key.strip()] = parsed
    return grid


def plan(seeds: Sequence[int], grid: Mapping[str, Sequence[Any]]) -> list[Planned]:
    """Every run of a sweep: seed by seed, so that the first whole comparison comes early.

    Raises:
        ConfigError: if there are more than :data:`MOST_RUNS`.
    """
    combinations = list(itertools.product(*grid.values()))
    if len(seeds) * len(combinations) > MOST_RUNS:
        raise ConfigError(
            f"{len(seeds)} seeds by {len(combinations)} settings are more than {MOST_RUNS:,} runs; take fewer"
        )
    planned = []
    for seed, values in itertools.product(seeds, combinations):
        pairs = list(zip(grid, values, strict=True))
        setting = ", ".join(f"{key}={_text(value)}" for key, value in pairs)
        slug = "".join(f"-{key.rpartition('.')[2]}-{_text(value)}" for key, value in pairs)
        name = f"seed{seed}" + re.sub(r"[^\w.+-]+", "_", slug)[:80]
        planned.append(Planned(name, setting, seed, (f"seed={seed}", *(f"{k}={json.dumps(v)}" for k, v in pairs))))
    return _with_names_of_their_own(planned)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _with_names_of_their_own(planned: Sequence[Planned]) -> list[Planned]:
    """Where two settings would have one folder, each gets its number."""
    names = [each.name for each in planned]
    return [
        Planned(f"{each.name}.{number}", each.setting, each.seed, each.overrides)
        if names.count(each.name) > 1
        else each
        for number, each in enumerate(planned)
    ]


def sweep(
    config_file: Path,
    out: Path,
    seeds: Sequence[int],
    grid: Mapping[str, Sequence[Any]],
    overrides: Sequence[str] = (),
    until_stage: str | None = None,
    measure: str = "mIoU",
    run_one: Callable[..., object] | None = None,
    profile: str | None = None,
    shards: int = 1,
) -> list[str]:
    """Make the runs that are missing, and the tables.

    Args:
        config_file: a YAML file of settings.
        out: takes a folder per run, ``runs.tsv``, and ``results`` and ``differences`` in every format of
            :data:`~smaflib.report.seeds.FORMATS`.
        seeds: of the runs.
        grid: settings and the values that each takes; every combination is a run.
        overrides: ``key=value`` settings of all runs.
        until_stage: the last stage of each run.
        measure: of the tables, a column of :func:`~smaflib.report.tables.results_table`.
        run_one: what makes a run, called as :func:`~smaflib.runs.runner.run_notebooks`, which it is by default.
        profile: of Snakemake, which then makes the runs; None: this process does, one after the other.
        shards: parts of each stage that has shards; with a profile.

    Returns:
        What failed, a line per run; the others were made all the same.

    Raises:
        ConfigError: if any of the runs has settings that do not fit, or there is no Snakemake or no such profile;
            nothing was executed then.
        RunError: if the folder belongs to another sweep, or another one is at work there.
    """
    if shards != 1 and profile is None:
        raise ConfigError("--shards needs --profile: without one there is only one process, which makes a stage alone")
    snakemake = check_workflow(profile, shards) if profile is not None else None
    planned = plan(seeds, grid)
    tried = set()
    for each in planned:  # all of them, before hours of the first
        config = load_config(config_file, [*overrides, *each.overrides])
        own = (config.attention, config.model, config.data, config.pseudo_masks, config.segmentation.model)
        if own not in tried:  # seeds have the same code
            check_plugins(config)
        tried.add(own)
        run_folder(out, each.name)
    last = stage_named(until_stage, STAGES).name if until_stage else STAGES[-1].name
    out.mkdir(parents=True, exist_ok=True)
    with files.locked(out, "smaf sweep"):
        write_tables(out, planned, measure)
        if snakemake is None:
            return _make_in_order(config_file, out, planned, overrides, last, measure, run_one)
        runs = [Combination(each.name, tuple(overrides), each.overrides) for each in planned]
        try:
            run_workflow(*snakemake, config_file, out, runs, last, shards)
        finally:
            write_tables(out, planned, measure)
        return [
            f"{each.name}: not complete; logs: {out / WORKFLOW_FOLDER / 'logs' / each.name}"
            for each in planned
            if first_open_stage(out / each.name, config_file, [*overrides, *each.overrides], last)
        ]


def _make_in_order(
    config_file: Path,
    out: Path,
    planned: Sequence[Planned],
    overrides: Sequence[str],
    last: str,
    measure: str,
    run_one: Callable[..., object] | None,
) -> list[str]:
    """Make the runs one after the other, and the tables after each."""
    from smaflib.runs.runner import run_notebooks  # papermill, which plans and tables do not need

    failures = []
    for number, each in enumerate(planned, start=1):
        print(f"\n{number} of {len(planned)}: {each.name}", file=sys.stderr, flush=True)
        others = [
            other.name
            for other in planned
            if other is not each and other.seed == each.seed and (out / other.name / "config.yaml").is_file()
        ]
        try:
            settings = [*overrides, *each.overrides]
            (run_one or run_notebooks)(config_file, each.name, settings, until_stage=last, runs=out, reuse=others)
        except StageFailed as error:  # the others may well do; a signal or settings that do not fit end it
            failures.append(f"{each.name}: {str(error).splitlines()[0]}")
            print(f"{failures[-1]}; going on with the next run", file=sys.stderr, flush=True)
        write_tables(out, planned, measure)
    return failures


def write_tables(out: Path, planned: Sequence[Planned], measure: str) -> None:
    """Write the table of runs, and results and paired differences of what is finished."""
    rows = [
        {"run": each.name, "seed": each.seed, "setting": each.setting, "stages complete": _complete(out / each.name)}
        for each in planned
    ]
    files.write_text(out / TABLE, pd.DataFrame(rows).to_csv(sep="\t", index=False, lineterminator="\n"))
    values = finished_measurements(out, planned, measure)
    tables = {"results": spread_table(values), "differences": difference_table(values)}
    for name, table in tables.items():
        for ending, make in FORMATS.items():
            files.write_text(out / f"{name}.{ending}", formatted(table, make))


def finished_measurements(out: Path, planned: Sequence[Planned], measure: str) -> pd.DataFrame:
    """What the runs have measured so far, a row per run and row of its results."""
    begun = [each for each in planned if (out / each.name / "config.yaml").is_file()]
    found = [_measured(out, each, measure, _version(out / each.name / "metrics.json")) for each in begun]
    some = [table for table in found if len(table)]
    return pd.concat(some, ignore_index=True) if some else measurements([], measure)


# Tables are written after each run, and of a thousand runs only one has changed.
@functools.lru_cache(maxsize=2 * MOST_RUNS)
def _measured(out: Path, planned: Planned, measure: str, version: tuple[int, int] | None) -> pd.DataFrame:
    return measurements([(planned.setting, planned.seed, read_run(out / planned.name))], measure)


def _version(path: Path) -> tuple[int, int] | None:
    """What a file that is never written in place is known by: its inode and when it was made; None: there is none."""
    with contextlib.suppress(FileNotFoundError):
        facts = path.stat()
        return facts.st_ino, facts.st_mtime_ns
    return None


def _complete(folder: Path) -> int:
    return _num_complete(folder, _version(folder / "manifest.json"))


@functools.lru_cache(maxsize=2 * MOST_RUNS)
def _num_complete(folder: Path, version: tuple[int, int] | None) -> int:
    try:
        stages = read_manifest(folder)["stages"].values()
    except RunError:  # damaged; running it says so
        return 0
    return sum(entry["status"] == "complete" for entry in stages)

"""Shards: the per-image work of a stage, split over jobs that run beside each other, on one machine or on many.

Image ``n`` belongs to part ``n mod count``. A shard writes its images' maps or masks into the run folder, where those
that are there are skipped, so another number of parts costs nothing. The stage itself then finds all files, evaluates
and writes its manifest entry.

The first shard begins the stage's manifest entry; the others join it if their code, settings and data are the same.
Each holds a lock of its own and takes the run's lock for a moment only; ``smaf run`` holds the run's lock and refuses
while a shard holds one. So shards work beside each other, and never beside the stage.
"""

from __future__ import annotations

import contextlib
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, get_args

from smaflib import files
from smaflib.config import Split
from smaflib.config_reads import follow, recording
from smaflib.errors import InputError, MissingStage, RunError
from smaflib.files import RUNS_FOLDER, SHIPPED, display_path
from smaflib.pipeline import Workspace, check_plugins, resolve_mask_bg_score
from smaflib.runs.attempt import begin_attempt, put_entry, settings_file
from smaflib.runs.code import is_around
from smaflib.runs.inputs import (
    changed_names,
    data_hashes,
    difference,
    plugin_facts,
    refuse_other_code,
    stage_inputs,
    why_not_complete,
)
from smaflib.runs.manifest import Entry, clear_stage, read_manifest
from smaflib.runs.run import Run, find_run
from smaflib.runs.stages import Stage, stage_named

if TYPE_CHECKING:  # the runner imports this module, and a finished run starts no torch
    from smaflib.data.sample import Samples

FOLDER = ".shards"
"""In the run folder; takes the shards' locks."""

MOST_PARTS = 10_000
BEGIN_SECONDS = 300.0
"""How long a shard waits while others begin: each holds the run's lock for about a second."""

BG_SCORE_SECONDS = 3600.0
"""How long a shard waits for the one that chooses the background's score, which reads the maps of all images."""


@dataclass(frozen=True)
class Part:
    """Part ``number`` of ``count``, counted from 1; as text ``2/8``."""

    number: int
    count: int

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    @property
    def slug(self) -> str:
        """As part of a file's name: ``2-of-8``."""
        return f"{self.number}-of-{self.count}"

    def of(self, num: int) -> range:
        """The numbers, of 0 to ``num - 1``, that belong to this part."""
        return range(self.number - 1, num, self.count)


def parse_part(text: str) -> Part:
    """``"2/8"``: the second of eight.

    Raises:
        InputError: if it is anything else.
    """
    found = re.fullmatch(r"\s*(\d{1,9})\s*/\s*(\d{1,9})\s*", text)
    part = Part(int(found[1]), int(found[2])) if found else Part(0, 0)
    if not 1 <= part.number <= part.count <= MOST_PARTS:
        raise InputError(
            f"--part must be a number and how many there are, from 1/8 to 8/8 for eight (at most {MOST_PARTS:,}), got "
            f"{text[:50]!r}"
        )
    return part


# ------------------------------------------------------------------------------------------------- what a shard makes


def _attention(work: Workspace, part: Part) -> Iterator[tuple[Samples, Path, str]]:
    from smaflib.cams import source_of
    from smaflib.maps import write_attention_maps

    network = source_of(work.network("teacher"), work.config.attention.source)
    runtime = work.make_runtime()
    for split in get_args(Split):
        samples, folder = work.samples(split), work.maps("teacher", split).folder
        mine = samples.subset(part.of(len(samples)))
        yield mine, folder, ".npz"
        write_attention_maps(network, mine, folder, work.config.attention, runtime)


def _masks(work: Workspace, part: Part) -> Iterator[tuple[Samples, Path, str]]:
    from smaflib.pseudo_masks import write_pseudo_masks

    samples, folder = work.samples(), work.path("masks")
    mine = samples.subset(part.of(len(samples)))
    yield mine, folder, ".png"
    # One chooses it, from the maps of all images; the others read what it chose.
    with files.locked(work.path(FOLDER), "choice of the background's score", "bg_score.lock", wait=BG_SCORE_SECONDS):
        bg_score = resolve_mask_bg_score(work)
    maps, settings, device = work.mask_maps("student", mine), work.config.pseudo_masks, work.make_runtime().device
    write_pseudo_masks(mine, maps, folder, bg_score, settings, device=device)


Maker = Callable[[Workspace, Part], "Iterator[tuple[Samples, Path, str]]"]
"""Makes a part's files, those that are missing; says before each split which images it has, and their files' folder and
ending."""

SHARDED: Mapping[str, Maker] = {"03_multi_scale_attention": _attention, "06_pseudo_masks": _masks}
"""By stage what its shards make. The other stages train, which is not split by images."""


def sharded_stage(name: str) -> Stage:
    """A stage that has shards, by number, word or full name.

    Raises:
        RunError: if there is no such stage, or it has no shards.
    """
    stage = stage_named(name)
    if stage.name not in SHARDED:
        raise RunError(f"{stage.name} has no shards: only {' and '.join(SHARDED)} are work on images one by one")
    return stage


def run_shard(
    name: str,
    stage_name: str,
    part: Part,
    runs: Path = RUNS_FOLDER,
    notebooks: Path = SHIPPED / "notebooks",
    code: str | None = None,
) -> str:
    """Make one part of a stage's files in the folder of a run.

    Args:
        name: name or path of the run, whose earlier stages are complete.
        stage_name: the stage.
        part: which part.
        runs: folder of the run folders.
        notebooks: folder of the notebooks: a shard belongs to the code of its stage's.
        code: as of :func:`~smaflib.runs.runner.run_notebooks`.

    Returns:
        What was done, in a line.

    Raises:
        RunError: if there is no such run or stage; if an earlier stage is not complete; if the stage is at work, or
            shards of other code, settings or data have begun it. Nothing was changed then.
        DataError, ConfigError: of the work itself.
    """
    stage, run = sharded_stage(stage_name), find_run(name, runs)
    refuse_other_code(code, notebooks)
    check_plugins(run.config)
    inputs = _inputs_of_complete_stages(run, stage, notebooks)
    with contextlib.ExitStack() as stack:
        with files.locked(run.folder, "smaf run", wait=BEGIN_SECONDS):
            if why_not_complete(run.folder, stage, run.config, inputs) is None:
                return f"{stage.name}  complete, nothing to do for part {part}"
            _join(run, stage, inputs, code is not None)
            lock = f"{stage.name}.{part.slug}.lock"
            stack.enter_context(files.locked(run.path(FOLDER), f"smaf shard {stage.name} --part {part}", lock))
        stack.enter_context(_ended_by_signals(f"part {part} of {stage.name}"))
        stack.enter_context(recording(settings_file(run.folder, stage, part.slug)))
        follow(run.config)
        made = there = 0
        for samples, folder, ending in SHARDED[stage.name](run, part):
            names = [f"{image_id}{ending}" for image_id in samples.image_ids]
            found = len(files.names_there(folder, names))
            made, there = made + len(names) - found, there + found
    return f"{stage.name}  part {part}: {made} made, {there} were there"


def _inputs_of_complete_stages(run: Run, stage: Stage, notebooks: Path) -> Entry:
    """The stage's inputs, once every stage that it reads of is complete and unchanged."""
    data, plugins = data_hashes(run.config.data), plugin_facts(run.config)
    for name in stage.depends_on:
        needed = stage_named(name)
        inputs = stage_inputs(run.folder, needed, notebooks / f"{name}.ipynb", data, plugins)
        if reason := why_not_complete(run.folder, needed, run.config, inputs):
            raise MissingStage(
                f"shards of {stage.name} need {name}, which is not complete in {display_path(run.folder)} ({reason}). "
                f"This command makes it:\n  {run.command('--until', name.partition('_')[2])}"
            )
    return stage_inputs(run.folder, stage, notebooks / f"{stage.name}.ipynb", data, plugins)


def _join(run: Run, stage: Stage, inputs: Entry, code_agreed: bool) -> None:
    """Join the stage's attempt, or begin it where there is none that fits."""
    entry, busy = read_manifest(run.folder)["stages"].get(stage.name), _shard_at_work(run.folder)
    if entry is not None and not code_agreed:
        refuse_shards_of_other_code(run, stage, entry, inputs)
    # Of what only shows results, a change makes nothing anew.
    if entry is not None and difference(entry, run.config, inputs, lambda name: not is_around(name)) is None:
        if busy is None:  # what is half-written is nobody's any more
            clear_stage(run.folder, stage, entry)
        if not entry.get("shards"):
            entry.pop("artifacts", None)  # what is damaged of them is gone, and what comes in their place is no damage
            put_entry(run.folder, stage, entry, status="running", exit_code=None, shards=True)
    elif busy is not None:
        raise RunError(f"{busy}; it works with other code, settings or data than this one has")
    else:
        begin_attempt(run, stage, inputs, None, shards=True)


# -------------------------------------------------------------------------------------------- beside shards and after


def refuse_beside_shards(folder: Path) -> None:
    """Return if no shard is at work in a run folder; the caller holds the run's lock, so none begins.

    Raises:
        RunError: if one is: which, where and since when.
    """
    if busy := _shard_at_work(folder):
        raise RunError(busy)


def refuse_shards_of_other_code(run: Run, stage: Stage, entry: Entry, inputs: Entry) -> None:
    """Return unless shards of another version of the code have begun a stage: two nodes then differ, or it was edited.

    Args:
        run: the run.
        stage: the stage.
        entry: of the stage.
        inputs: of the stage here and now.

    Raises:
        RunError: if they have.
    """
    if not entry.get("shards") or entry["status"] == "complete":
        return
    changed = [name for name in changed_names(entry["modules"], inputs["modules"]) if not is_around(name)]
    changed += ["its notebook"] if entry["code"] != inputs["code"] else []
    if changed:
        more = f" and {len(changed) - 1} more differ" if len(changed) > 1 else " differs"
        raise RunError(
            f"shards of {stage.name} in {display_path(run.folder)} were begun with other code than is here "
            f"({changed[0]}{more}); nothing was changed. Install the same version on every node. If the code was "
            f"changed on purpose, make the stage anew:\n  {run.command('--from', stage.name, '--until', stage.name)}"
        )


def _shard_at_work(folder: Path) -> str | None:
    """Who is, as a message; None if nobody is."""
    for path in sorted((folder / FOLDER).glob("*-of-*.lock")):
        stage, _, slug = path.stem.rpartition(".")
        try:
            files.refuse_if_locked(path.parent, f"smaf shard {stage} --part {slug.replace('-of-', '/')}", path.name)
        except RunError as error:
            return str(error)
    return None


@contextlib.contextmanager
def _ended_by_signals(what: str) -> Iterator[None]:
    """Let a scheduler's SIGTERM end the block as an exit, so that worker processes are ended, too."""

    def stop(signum: int, frame: FrameType | None) -> None:
        name = signal.Signals(signum).name
        print(f"{what} was stopped by {name}; the same command goes on where it stopped", file=sys.stderr, flush=True)
        raise SystemExit(128 + signum)

    if threading.current_thread() is not threading.main_thread():  # only the main thread can handle signals
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)

"""A sweep as a workflow: the jobs that are still to do, for Snakemake to run on this machine or on a cluster.

A job is the work of many minutes: ``smaf run --until STAGE``, which also makes the quick stages before it, or
``smaf shard``, a part of a stage's maps or masks. :func:`plan_jobs` says what each waits for, ``workflow/Snakefile``
turns that into rules. A run's jobs come one after the other, runs beside each other. Where settings make no difference
up to a stage, one run makes it and the others wait and take it over.

The manifests of the runs say what is done; Snakemake's own files are thrown away before each call. Its jobs declare an
empty file each, because it deletes what a job declares before the job starts: maps, masks and checkpoints must stay.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import yaml

from smaflib import files
from smaflib.config import load_config
from smaflib.errors import ConfigError, RunError
from smaflib.files import HOME, PROJECT_ROOT, SHIPPED, display_path
from smaflib.runs.inputs import code_hash, data_hashes, plugin_facts, stage_inputs, why_not_complete
from smaflib.runs.shards import MOST_PARTS, SHARDED, Part
from smaflib.runs.stages import STAGES, Stage

WORKFLOW = SHIPPED / "workflow"
FOLDER = ".workflow"
"""In the folder of a sweep; takes the plan, the jobs' logs and the empty files."""

SACCT_SECONDS = 60.0

HEAVY = ("02_classifier", "03_multi_scale_attention", "05_self_training", "06_pseudo_masks")
"""Stages that end a job; those between them take seconds and come with the next one."""

FIRST_READ = {
    "attention": "03_multi_scale_attention",
    "attention.flip": "02_classifier",  # a random classifier's head is solved from maps
    "attention.scales": "02_classifier",
    "self_training": "05_self_training",
    "pseudo_masks": "06_pseudo_masks",
    "segmentation": "07_segmentation",
}
"""By setting or group the stage from which on it makes a difference; others do from the start. Only what waits for what
depends on it: what a run takes over is checked by the settings that the stage did read."""


@dataclass(frozen=True)
class Combination:
    """A run of a sweep, as far as its jobs depend on it.

    Attributes:
        name: of the run.
        shared: settings of all runs of the sweep, ``key=value``.
        own: seed and settings of the grid, ``key=value``.
    """

    name: str
    shared: tuple[str, ...]
    own: tuple[str, ...]

    def until(self, stage: str) -> tuple[str, ...]:
        """Those of its own settings that may make a difference up to a stage."""
        return tuple(setting for setting in self.own if _first_stage(setting.partition("=")[0]) <= stage)


@dataclass(frozen=True)
class Job:
    """A command of the workflow.

    Attributes:
        run: name of the run.
        stage: the last stage that the job makes, or the stage that it makes a part of.
        part: ``2/8``; empty for a job that completes the stage.
        needs: keys of the jobs before it.
        reuse: names of runs whose finished stages it takes over.
    """

    run: str
    stage: str
    part: str = ""
    needs: tuple[str, ...] = ()
    reuse: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """Name of the empty file that says that it is done."""
        return f"{self.run}/{self.stage}" + (f".{self.part.replace('/', '-of-')}" if self.part else "")


def _first_stage(setting: str) -> str:
    return FIRST_READ.get(setting) or FIRST_READ.get(setting.partition(".")[0], STAGES[0].name)


def job_ends(last: str) -> list[str]:
    """The stages that end a job of a run which ends with stage ``last``."""
    return [stage.name for stage in STAGES if stage.name == last or (stage.name in HEAVY and stage.name < last)]


def plan_jobs(runs: Sequence[Combination], last: str, first_open: Sequence[str | None], shards: int) -> list[Job]:
    """The jobs that are still to do.

    Args:
        runs: of the sweep.
        last: name of the last stage of each.
        first_open: per run the first stage that is not complete; None: all are.
        shards: parts of each stage that has shards.

    Returns:
        Jobs in an order in which they could run one after the other.
    """
    jobs: dict[str, Job] = {}
    for run, begin in zip(runs, first_open, strict=True):
        before: tuple[str, ...] = ()
        for stage in job_ends(last) if begin is not None else ():
            if stage < str(begin):
                continue
            leader = next(other for other in runs if other.until(stage) == run.until(stage))
            job = Job(run.name, stage, needs=before)
            if leader != run:
                waits = tuple({key for key in (Job(leader.name, stage).key,) if key in jobs})
                job = replace(job, needs=before + waits, reuse=(leader.name,))
            elif stage in SHARDED and shards > 1:
                parts = [Part(number, shards) for number in range(1, shards + 1)]
                shard_jobs = [Job(run.name, stage, str(part), before) for part in parts]
                jobs |= {shard.key: shard for shard in shard_jobs}
                job = replace(job, needs=tuple(shard.key for shard in shard_jobs))
            jobs[job.key] = job
            before = (job.key,)
    return list(jobs.values())


def first_open_stage(folder: Path, config_file: Path, overrides: Sequence[str], last: str) -> str | None:
    """The first stage of a run that is not complete and unchanged; None if all are up to ``last``."""
    config = load_config(config_file, list(overrides))
    data, plugins = data_hashes(config.data), plugin_facts(config)

    def is_open(stage: Stage) -> bool:
        inputs = stage_inputs(folder, stage, SHIPPED / "notebooks" / f"{stage.name}.ipynb", data, plugins)
        return why_not_complete(folder, stage, config, inputs) is not None

    return next((stage.name for stage in STAGES if stage.name <= last and is_open(stage)), None)


def check_workflow(profile: str, shards: int) -> tuple[list[str], Path]:
    """How Snakemake is called here, and the folder of the profile.

    Args:
        profile: ``local``, ``slurm`` or the path of a folder with a ``config.yaml`` of Snakemake.
        shards: parts of each stage that has shards.

    Raises:
        ConfigError: if there is no Snakemake, no such profile, the number will not do, or Slurm does not tell how jobs
            ended.
    """
    if not 1 <= shards <= MOST_PARTS:
        raise ConfigError(f"--shards must be from 1 (no shards) to {MOST_PARTS:,}, got {shards}")
    profiles = WORKFLOW / "profiles"
    folders = [profiles / profile, Path(profile).absolute()] if profile else []
    folder = next((folder for folder in folders if (folder / "config.yaml").is_file()), None)
    if folder is None:
        names = " and ".join(sorted(path.parent.name for path in profiles.glob("*/config.yaml")))
        raise ConfigError(
            f"--profile must be one of {names} (in {display_path(profiles)}), or a folder that holds a config.yaml of "
            f"Snakemake, got {profile[:200]!r}"
        )
    found = shutil.which("snakemake")
    if find_spec("snakemake") is None and found is None:
        raise ConfigError(
            "--profile hands the sweep over to Snakemake, which is not installed: pip install 'smaflib[cluster]'"
        )
    _check_job_states(folder / "config.yaml")
    return [sys.executable, "-m", "snakemake"] if find_spec("snakemake") else [str(found)], folder


def _check_job_states(profile: Path) -> None:
    """Refuse a cluster that does not tell how its jobs ended: Snakemake would wait for them for ever."""
    try:
        options = yaml.safe_load(profile.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{display_path(profile)} is not valid YAML: {error}") from error
    if not isinstance(options, dict) or options.get("executor") != "slurm" or "slurm-status-command" in options:
        return
    try:
        asked = subprocess.run(["sacct", "-X", "-n"], capture_output=True, text=True, timeout=SACCT_SECONDS)
    except FileNotFoundError:
        return  # the plug-in then takes squeue, or says that there is no Slurm
    except subprocess.TimeoutExpired as error:
        raise ConfigError(
            f"sacct does not answer within {SACCT_SECONDS:.0f} s, so no job's end would be seen"
        ) from error
    if asked.returncode:
        raise ConfigError(
            f"sacct, which tells how jobs ended, does not work here ({asked.stderr.strip()[:200]}); put the line "
            f"'slurm-status-command: squeue' into {display_path(profile)}"
        )


def run_workflow(
    snakemake: Sequence[str],
    profile: Path,
    config_file: Path,
    out: Path,
    runs: Sequence[Combination],
    last: str,
    shards: int,
) -> None:
    """Let Snakemake do what is missing; returns when it has ended, whatever has failed.

    Args:
        snakemake: its command, from :func:`check_workflow`.
        profile: the folder of its profile.
        config_file: a YAML file of settings.
        out: folder of the sweep; the caller keeps others out of it.
        runs: of the sweep.
        last: name of the last stage of each.
        shards: parts of each stage that has shards.
    """
    first_open = [first_open_stage(out / run.name, config_file, [*run.shared, *run.own], last) for run in runs]
    jobs = plan_jobs(runs, last, first_open, shards)
    if not jobs:
        return
    folder = out / FOLDER
    shutil.rmtree(folder / "done", ignore_errors=True)  # the manifests say what is done
    settings = {run.name: [*run.shared, *run.own] for run in runs}
    plan = {
        "smaf": shlex.join([sys.executable, "-m", "smaflib"]),
        "config": str(config_file),
        "runs": str(out),
        "code": code_hash(SHIPPED / "notebooks"),
        "settings": {
            name: shlex.join(word for s in given for word in ("--set", s)) for name, given in settings.items()
        },
        "jobs": {job.key: asdict(job) for job in jobs},
    }
    files.write_json(folder / "plan.json", plan)
    print(
        f"{len(jobs)} jobs of {len({job.run for job in jobs})} runs; logs: {display_path(folder / 'logs')}", flush=True
    )
    _call([*snakemake, *snakemake_arguments(profile, out)])


def snakemake_arguments(profile: Path, out: Path) -> list[str]:
    """Of the call of Snakemake for a sweep that is planned. What a person may want to change is in the profile."""
    words = ["--snakefile", WORKFLOW / "Snakefile", "--profile", profile, "--directory", out]
    # The sweep's own lock keeps a second one out, and ends with its process; Snakemake's would stay after a kill.
    return [*map(str, words), "--nolock", "--config", f"plan={out / FOLDER / 'plan.json'}"]


def _call(command: Sequence[str]) -> None:
    """Run Snakemake and wait for its end, which after Ctrl-C comes once it has cancelled its jobs.

    A terminal sends Ctrl-C to both; SIGTERM reaches this process alone, and is passed on as Ctrl-C.
    """
    environment = os.environ | {HOME: str(PROJECT_ROOT)}  # jobs start in another folder
    process, terminated = None, False

    def stop(signum: int, frame: object) -> None:
        nonlocal terminated
        terminated |= signum == signal.SIGTERM
        if terminated and process is not None:
            process.send_signal(signal.SIGINT)

    # Before Snakemake starts: what nohup ignores, the program that is started would ignore as well.
    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        process = subprocess.Popen(command, env=environment)
        if terminated:  # in between
            process.send_signal(signal.SIGINT)
        process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if process.returncode not in (0, 1):  # 1: jobs have failed, which the manifests tell better
        raise RunError(f"Snakemake ended with status {process.returncode}; the same command goes on where it stopped")

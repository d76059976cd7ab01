"""A sweep: the same settings over several seeds and over a grid of values; mean ± sd and paired differences.

Every run is an ordinary run folder. Runs of one seed reuse each other's finished stages, so what they share is computed
once, and a killed sweep resumes with the same command.
"""

import itertools
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from smaflib import files
from smaflib.config import changed_names, flat_settings, load_config, parse_yaml
from smaflib.errors import ConfigError, RunError
from smaflib.report.tables import FORMATS, difference_table, measurements, spread_table
from smaflib.runs.run import read_run
from smaflib.runs.stages import STAGES, counts, stage_named


@dataclass(frozen=True)
class Job:
    """One run of a sweep; calling it executes the run's notebooks, here or on a node of a cluster."""

    name: str  # of the run folder, seed<N> or seed<N>-<settings>
    setting: str  # label of the settings that the sweep varies; empty without a grid
    seed: int
    overrides: tuple[str, ...]  # key=value settings on top of the config file, seed and grid included
    config_file: Path
    runs: Path  # folder of the run folders
    until: str  # the last stage
    source: str | None = None  # another run whose finished stages may be reused, like those of the seed's earlier runs

    def __call__(self) -> None:
        from smaflib.runs import runner  # imports papermill, which is slow

        begun = {path.parent.name for path in self.runs.glob(f"seed{self.seed}-*/config.yaml")} - {self.name}
        reuse = [*sorted(begun), *filter(None, [self.source])]
        try:
            runner.run_notebooks(
                self.config_file, self.name, self.overrides, until_stage=self.until, runs=self.runs, reuse=reuse
            )
        except RunError as error:
            if error.exit_code < 128:
                raise
            # Stopped by a signal. For submitit this is no result, so that it waits for a preempted job's second start.
            print(f"error: {error}", file=sys.stderr, flush=True)
            raise SystemExit(error.exit_code) from None

    def checkpoint(self) -> Any:
        """Called by submitit near the time limit: requeue the same run, which resumes by itself."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def parse_seeds(text: str) -> list[int]:
    """``"0-4"``, ``"0,1,7"``, or both joined by commas."""
    found = [re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part) for part in text.split(",")]
    seeds = [seed for each in found if each for seed in range(int(each[1]), int(each[2] or each[1]) + 1)]
    if not seeds or None in found:
        raise ConfigError(f"--seeds must be numbers such as 0,1,2 or a range such as 0-4, got {text!r}")
    return list(dict.fromkeys(seeds))


def parse_grid(texts: Sequence[str]) -> dict[str, list[Any]]:
    """``["attention.scales=[1],[1, 2]"]`` to the values of each setting, which are YAML."""
    grid: dict[str, list[Any]] = {}
    for text in texts:
        key, _, values = text.partition("=")
        if key in grid or not values:
            raise ConfigError(f"--grid must be a setting and all its values, KEY=VALUE,VALUE, got {text!r}")
        grid[key] = parse_yaml(f"[{values}]", f"--grid {text!r}")
    return grid


def plan(
    seeds: Sequence[int],
    grid: Mapping[str, Sequence[Any]],
    config_file: Path,
    out: Path,
    overrides: Sequence[str] = (),
    until: str | None = None,
) -> list[Job]:
    """A run for every seed and every combination of the grid's values, up to the stage ``until`` (default: the last).

    They are ordered by seed, so that the first seed's comparison is complete early.
    """
    last = (stage_named(until) if until else STAGES[-1]).name
    combinations = [list(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    names = ["".join(f"-{key.rpartition('.')[2]}-{_text(value)}" for key, value in pairs) for pairs in combinations]
    names = [re.sub(r"[^\w.+-]+", "_", name)[:80] for name in names]
    jobs = []
    for seed, (number, pairs) in itertools.product(seeds, enumerate(combinations)):
        name = names[number] + (f".{number}" if names.count(names[number]) > 1 else "")
        label = ", ".join(f"{key}={_text(value)}" for key, value in pairs)
        settings = (*overrides, f"seed={seed}", *(f"{key}={json.dumps(value)}" for key, value in pairs))
        jobs.append(Job(f"seed{seed}{name}", label, seed, settings, config_file, out, last))
    return jobs


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def run_jobs(
    jobs: Sequence[Job],  # each is checked before the first one starts
    write: Callable[[], None],  # renews the tables; called before, in between and at the end
    part: str = "1/1",  # 2/3 executes every third seed, beginning with the second
    cluster: str | None = None,  # slurm, local or debug, for submitit; None: in this process, one after the other
    options: Sequence[str] = (),  # key=value options of sbatch
) -> list[str]:
    """Execute the jobs of a sweep, seed by seed; complete ones take no time.

    Returns:
        A line per failed job; the others were executed.

    Raises:
        ConfigError: if settings or custom code of a job do not fit, or the cluster is not available.
        RunError: if the same part is running, or a run folder belongs to other settings.
    """
    found = re.fullmatch(r"([1-9]\d*)/([1-9]\d*)", part)
    if not found or int(found[1]) > int(found[2]):
        raise ConfigError(f"--part must be I/N with I from 1 to N, such as 2/3, got {part!r}")
    for job in jobs:
        config = load_config(job.config_file, job.overrides)
        if config.custom_code and job.seed == jobs[0].seed:
            from smaflib.pipeline import check_custom  # imports torch

            check_custom(config)
    groups = [list(group) for _, group in itertools.groupby(jobs, lambda job: job.seed)]
    groups = groups[int(found[1]) - 1 :: int(found[2])]
    with files.locked(jobs[0].runs, "smaf sweep", f".lock-{part.replace('/', '-of-')}"):
        write()
        if cluster is None or not groups:
            return _run_here([job for group in groups for job in group], write)
        try:
            return _run_on_cluster(groups, cluster, options)
        finally:
            write()


def _run_here(jobs: Sequence[Job], write: Callable[[], None]) -> list[str]:
    failures = []
    for number, job in enumerate(jobs, start=1):
        print(f"\n{number} of {len(jobs)}: {job.name}", file=sys.stderr, flush=True)
        try:
            job()
        except RunError as error:
            if error.exit_code != 1:  # not a failed stage, after which the other runs may succeed
                raise
            failures.append(f"{job.name}: {str(error).splitlines()[0]}")
            print(f"{failures[-1]}; the next run follows", file=sys.stderr, flush=True)
        write()
    return failures


def _run_on_cluster(groups: Sequence[Sequence[Job]], cluster: str, options: Sequence[str]) -> list[str]:
    """Queue the jobs of each seed and wait for them; Ctrl-C cancels them.

    First an array with a job per seed, up to the last stage that the runs of a seed share; then, per seed, an array
    with a job per run, which depends on it.
    """
    executor = _executor(groups[0][0].runs / ".jobs", cluster, options)
    last = shared_stage(groups[0])
    first = executor.submit_array([replace(group[0], until=last) for group in groups]) if last else []
    tasks = [(group[0].name, task) for group, task in zip(groups, first, strict=False)]
    try:
        for group, task in itertools.zip_longest(groups, first):
            if task is not None and cluster == "slurm":
                executor.update_parameters(slurm_dependency=f"afterok:{task.job_id}")
            elif task is not None and task.exception() is not None:
                continue
            tasks += zip((job.name for job in group), executor.submit_array(group), strict=True)
        print(f"{len(tasks)} jobs; logs: {files.shown_path(executor.folder)}", file=sys.stderr, flush=True)
        failed = {name: task.paths.stderr for name, task in tasks if task.exception() is not None}
    except KeyboardInterrupt:
        for _, task in tasks:
            task.cancel(check=False)
        raise
    return [f"{name}: failed or cancelled; log: {files.shown_path(log)}" for name, log in failed.items()]


def _executor(folder: Path, cluster: str, options: Sequence[str]) -> Any:
    try:
        import submitit
    except ModuleNotFoundError as error:
        raise ConfigError("--cluster needs submitit: pip install 'smaflib[cluster]'") from error
    # A job that reaches the time limit is requeued and resumes. Without the parameter, jobs whose first job failed wait
    # for ever.
    parameters: dict[str, Any] = {"slurm_additional_parameters": {"kill-on-invalid-dep": "yes"}}
    for option in options:
        key, _, value = option.partition("=")
        parameters[f"slurm_{key}"] = parse_yaml(value, f"--slurm {option!r}")
    try:
        executor = submitit.AutoExecutor(folder, cluster)
        executor.update_parameters(name="smaf", timeout_min=24 * 60, **parameters)
    except (RuntimeError, ValueError, NameError) as error:
        raise ConfigError(f"--cluster {cluster}: {error}") from error
    return executor


def shared_stage(jobs: Sequence[Job]) -> str | None:
    """The last stage that jobs of one seed share; None if that is the data, which is made in seconds, or nothing."""
    settings = [flat_settings(load_config(job.config_file, job.overrides)) for job in jobs]
    varied = {name for each in settings for name in changed_names(settings[0], each)}
    shared = [stage.name for stage in STAGES if not any(counts("settings", name, stage) for name in varied)]
    return min(shared[-1], jobs[0].until) if varied and len(shared) > 2 else None


def write_tables(jobs: Sequence[Job], measure: str) -> None:
    """Write the tables ``results`` and ``differences`` in all formats into the folder of a sweep's runs.

    ``measure`` is a column of :func:`~smaflib.report.tables.results_table`.
    """
    out = jobs[0].runs
    begun = [job for job in jobs if (out / job.name / "config.yaml").is_file()]
    values = measurements([(job.setting, job.seed, read_run(out / job.name)) for job in begun], measure)
    for name, table in {"results": spread_table(values), "differences": difference_table(values)}.items():
        for ending, formatted in FORMATS.items():
            files.write_text(out / f"{name}.{ending}", formatted(table) if len(table) else "no measurements yet\n")

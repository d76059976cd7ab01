"""Papermill executes the notebooks of a run in order; what is complete and unchanged is skipped.

A stage counts as complete only when the manifest says so, and the manifest is written after all else: a process killed
at any moment leaves a stage that the same command resumes.
"""

from __future__ import annotations

import ast
import contextlib
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

from smaflib import files
from smaflib.config import load_config
from smaflib.config_reads import SETTINGS_FILE
from smaflib.errors import RunError, RunStopped, StageFailed
from smaflib.files import RUNS_FOLDER, SHIPPED, absolute, display_path, duration
from smaflib.pipeline import check_networks, check_plugins
from smaflib.report.html import write_index
from smaflib.report.tables import results_text
from smaflib.runs.attempt import begin_attempt, forget_settings, put_entry, settings_file, settings_read
from smaflib.runs.code import is_around, library_hash
from smaflib.runs.environment import describe_machine
from smaflib.runs.inputs import (
    NEVER_RAN,
    RESUMES,
    changed_names,
    config_hash,
    data_hashes,
    difference,
    notebook_cells,
    plugin_facts,
    read_plugins,
    refuse_other_code,
    stage_inputs,
    why_not_complete,
)
from smaflib.runs.kernel import SpareKernel
from smaflib.runs.manifest import (
    Entry,
    list_artifacts,
    missing_outputs,
    read_manifest,
    record_hash,
    write_manifest,
)
from smaflib.runs.progress import KERNEL_ENVIRONMENT, TRACEBACK_LINES, NotebookMonitor
from smaflib.runs.reuse import take_over
from smaflib.runs.run import Run, find_run, open_run, run_folder
from smaflib.runs.shards import refuse_beside_shards, refuse_shards_of_other_code
from smaflib.runs.stages import STAGES, Stage, stage_named

PARAMETERS = ("config_file", "overrides", "run_dir")
"""What every notebook is given; its other parameters are for display and keep their defaults."""

SOURCE_LINES = 6
KERNEL_EXIT_SECONDS = 15.0


class _Stop(KeyboardInterrupt):
    """A signal that ends the run. asyncio lets only KeyboardInterrupt and SystemExit through."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum


def run_notebooks(
    config_file: str | Path,
    name: str | None = None,
    overrides: Sequence[str] = (),
    from_stage: str | None = None,
    until_stage: str | None = None,
    notebooks: Path = SHIPPED / "notebooks",
    runs: Path = RUNS_FOLDER,
    reuse: Sequence[str] = (),
    keep_stale: bool = False,
    stages: tuple[Stage, ...] = STAGES,
    code: str | None = None,
) -> Run:
    """Execute the notebooks of a run, write its report, print its results.

    Args:
        config_file: a YAML file of settings, relative to the checkout.
        name: the run folder's name; the config file's by default.
        overrides: ``key=value`` settings on top of the file.
        from_stage: run this stage and all later ones anew, even if they are complete.
        until_stage: stop after this stage.
        notebooks: folder of the notebooks.
        runs: folder of the run folders.
        reuse: names or paths of runs whose finished stages are taken over where their inputs are the same.
        keep_stale: keep stages that another version of the library made.
        stages: the chain; only tests use another one.
        code: the :func:`~smaflib.runs.inputs.code_hash` that library and notebooks must have here: a workflow over many
            machines names that of the machine that planned it.

    Raises:
        ConfigError: if a setting does not exist or fit.
        FileNotFoundError: if there is no such config file.
        PluginError: if somebody's own code that a setting names does not do what it must; nothing was written then.
        RunError: if the run cannot start; nothing was executed then.
        StageFailed: if a notebook fails.
        RunStopped: if Ctrl-C or a signal ends the run.
    """
    chosen = _choose(stages, until_stage)
    rerun = _stages_to_rerun(stages, from_stage, chosen)
    config_file = absolute(config_file)
    config = load_config(config_file, list(overrides))
    _check_notebooks(notebooks, chosen)
    refuse_other_code(code, notebooks)
    folder = run_folder(runs, config_file.stem if name is None else name)
    sources = [find_run(source, runs, stages).folder for source in reuse]
    if folder in sources:
        raise RunError(f"--reuse {folder.name} is the run itself; name another one")
    check_plugins(config)
    data, plugins = data_hashes(config.data), plugin_facts(config)
    run = open_run(folder, config_file, overrides, stages=stages)
    with files.locked(folder, "smaf run"):
        refuse_beside_shards(folder)
        _await_kernel_of_killed_runner(folder)
        _invalidate(folder, rerun)
        # A spare kernel has imported what the chain's notebooks import; other chains are tests'.
        spare = SpareKernel(KERNEL_ENVIRONMENT) if stages == STAGES and os.name == "posix" else None
        with spare or contextlib.nullcontext():
            if stages == STAGES and _will_train(run, chosen):
                check_networks(config)
            chain = _Chain(run, notebooks, data, plugins, sources, keep_stale, spare, code is not None)
            for stage in chosen:
                chain.run_stage(stage, reused=stage not in rerun)
        index = write_index(run)
    print(f"{results_text(run)}\n\nreport: {display_path(index)}", flush=True)
    return run


# ------------------------------------------------------------------------------------------------------------- checks


def _choose(stages: tuple[Stage, ...], until_stage: str | None) -> tuple[Stage, ...]:
    last = stages.index(stage_named(until_stage, stages)) if until_stage else len(stages) - 1
    return stages[: last + 1]


def _stages_to_rerun(stages: tuple[Stage, ...], from_stage: str | None, chosen: tuple[Stage, ...]) -> tuple[Stage, ...]:
    if from_stage is None:
        return ()
    first = stage_named(from_stage, stages)
    if first not in chosen:
        raise RunError(f"--from {first.name} comes after --until {chosen[-1].name}; nothing would run")
    return chosen[chosen.index(first) :]


def _check_notebooks(notebooks: Path, stages: Sequence[Stage]) -> None:
    """Papermill only warns of a parameter that a notebook does not know, and only once the kernel runs."""
    for stage in stages:
        notebook = notebooks / f"{stage.name}.ipynb"
        known = _parameters_of(notebook)
        if absent := [name for name in PARAMETERS if name not in known]:
            raise RunError(
                f"{display_path(notebook)} does not take {', '.join(absent)}; "
                f"its cell tagged 'parameters' must set {', '.join(PARAMETERS)}"
            )


def _will_train(run: Run, chosen: Sequence[Stage]) -> bool:
    """Whether a stage after the data's is not complete; without torch, so that a finished run starts none."""
    now, entries = config_hash(run.config), read_manifest(run.folder)["stages"]
    done = {name for name, entry in entries.items() if (entry["status"], entry["config_hash"]) == ("complete", now)}
    look_only = STAGES[:2]  # one image's way, and the data
    return any(stage.name not in done for stage in chosen if stage not in look_only)


def _parameters_of(notebook: Path) -> set[str]:
    """Names that a notebook's parameters cell sets. papermill's own reader misses lines with a second ``=``."""
    tagged = [cell["source"] for cell in notebook_cells(notebook) if "parameters" in cell["tags"]]
    try:
        statements = ast.parse("\n".join(tagged)).body
    except SyntaxError as error:
        raise RunError(f"the parameters cell of {display_path(notebook)} is not valid Python: {error}") from error
    targets = [target for node in statements if isinstance(node, ast.Assign) for target in node.targets]
    targets += [node.target for node in statements if isinstance(node, ast.AnnAssign)]
    return {target.id for target in targets if isinstance(target, ast.Name)}


def _await_kernel_of_killed_runner(folder: Path) -> None:
    # A kernel notices within a second that its runner was killed; until then it may still write into the folder.
    stages = read_manifest(folder)["stages"].values()
    pids = [entry["kernel_pid"] for entry in stages if entry["status"] == "running" and entry.get("kernel_pid")]
    deadline = time.monotonic() + KERNEL_EXIT_SECONDS
    while any(_is_kernel(pid) for pid in pids):
        if time.monotonic() > deadline:
            raise RunError(
                f"the kernel of a killed run still works in {display_path(folder)}; end process {pids[0]} first"
            )
        time.sleep(0.1)


def _is_kernel(pid: int) -> bool:
    try:
        return b"smaflib.runs.kernel" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:  # it is gone, or this is not Linux
        return False


# --------------------------------------------------------------------------------------------------------- one stage


@dataclass
class _Chain:
    """A run and what its stages are executed with, as :func:`run_notebooks` was given it.

    Attributes:
        data: hashes of the data that the settings name.
        plugins: facts about somebody's own code, by the settings that name it.
        sources: folders of the runs whose stages may be taken over.
        spare: the process that becomes the next kernel; None: there is none.
        code_agreed: all who work on the run were told which code they must have, so shards of another one are old.
    """

    run: Run
    notebooks: Path
    data: dict[str, str]
    plugins: dict[str, Entry]
    sources: Sequence[Path]
    keep_stale: bool
    spare: SpareKernel | None
    code_agreed: bool

    def run_stage(self, stage: Stage, reused: bool) -> None:
        """Run a stage unless it is complete; with ``reused`` take it over from another run if one has it."""
        folder, config, notebook = self.run.folder, self.run.config, self.notebooks / f"{stage.name}.ipynb"
        inputs = stage_inputs(folder, stage, notebook, self.data, self.plugins)
        reason = why_not_complete(folder, stage, config, inputs, all_code=not self.keep_stale)
        if reason is None:
            entry = read_manifest(folder)["stages"][stage.name]
            _log(f"{stage.name}  complete, skipped (took {duration(entry['seconds'])}{_stale(entry, inputs)})")
            return
        _describe_run(self.run)
        for source in self.sources if reused else ():
            refusal = take_over(source, folder, stage, config, inputs, all_code=not self.keep_stale)
            if refusal is None:
                entry = read_manifest(folder)["stages"][stage.name]
                _log(f"{stage.name}  taken over from {source.name}{_stale(entry, inputs)}")
                return
            reason = f"{f'{reason}; ' if reason != NEVER_RAN else ''}{source.name}: {refusal}"
        resumed = read_manifest(folder)["stages"].get(stage.name)
        if resumed and not (self.code_agreed or self.keep_stale):
            refuse_shards_of_other_code(self.run, stage, resumed, inputs)
        if resumed and difference(resumed, config, inputs, lambda module: not (self.keep_stale or is_around(module))):
            resumed = None
        if resumed and difference(resumed, config, inputs):
            reason += _stale(resumed, inputs) if self.keep_stale else "; its artifacts stay"
        if reason != NEVER_RAN or not sys.stderr.isatty():  # a terminal shows the bar
            what = {NEVER_RAN: "starts", RESUMES: RESUMES}.get(reason, f"starts ({reason})")
            _log(f"{stage.name}  {what}")
        self._execute(stage, notebook, self._begin(stage, inputs, resumed))

    def _begin(self, stage: Stage, inputs: Entry, resumed: Entry | None) -> Entry:
        """Make room for a stage and give it a manifest entry; ``resumed`` is that of the attempt that it resumes."""
        if resumed and self.keep_stale:
            inputs = inputs | {"modules": resumed["modules"]}  # without the option it runs anew
        return begin_attempt(self.run, stage, inputs, resumed)

    def _execute(self, stage: Stage, notebook: Path, entry: Entry) -> None:
        """Execute a stage and complete its entry: how long it took, what it read and made, or how it failed."""
        folder, begun, library = self.run.folder, time.monotonic(), library_hash()

        def note_kernel(pid: int) -> None:
            put_entry(folder, stage, entry, kernel_pid=pid)
            if self.spare is not None and stage != self.run.stages[-1]:
                self.spare.prepare(library)

        num_cells = len(notebook_cells(notebook)) + 1  # papermill adds one
        spare = partial(self.spare.become_kernel, library) if self.spare else None
        env = {SETTINGS_FILE: str(settings_file(folder, stage))}
        monitor = NotebookMonitor(stage.name, num_cells, note_kernel, spare, env)

        def measured() -> Entry:
            return {"seconds": round(time.monotonic() - begun, 1), "peak_memory_mb": monitor.peak_memory_mb}

        try:
            with monitor, _stopping(monitor.kill_kernel):
                self._execute_notebook(stage, notebook, entry["parameters"], monitor)
            if absent := missing_outputs(folder, stage):
                raise StageFailed(f"{stage.name} ended without making {', '.join(absent)}. {self._how_to_resume()}")
        except _Stop as stop:
            code = 128 + stop.signum
            put_entry(folder, stage, entry, status="failed", exit_code=code, **measured())
            _forget_open_tasks()
            name = signal.Signals(stop.signum).name
            raise RunStopped(f"{stage.name} was stopped by {name}. {self._how_to_resume()}", code) from None
        except BaseException:
            put_entry(folder, stage, entry, status="failed", exit_code=1, **measured())
            raise
        entry.update(measured(), settings_read=settings_read(self.run, stage))
        entry["plugins"] = read_plugins(entry)
        made = {"records": record_hash(folder, stage), "artifacts": list_artifacts(folder, stage)}
        put_entry(folder, stage, entry, status="complete", exit_code=0, **made)
        forget_settings(folder, stage)
        _log(f"{stage.name}  done in {duration(entry['seconds'])}")

    def _execute_notebook(
        self, stage: Stage, notebook: Path, parameters: dict[str, Any], monitor: NotebookMonitor
    ) -> None:
        """Execute one notebook into the run folder; a failed one is kept as ``<name>.failed.ipynb``."""
        import nbformat
        import papermill
        from papermill.exceptions import PapermillExecutionError, strip_color

        done, running, failed = (self.run.path(f"{stage.name}{ending}.ipynb") for ending in ("", ".running", ".failed"))
        try:
            with _quiet_papermill():
                executed = papermill.execute_notebook(
                    notebook,
                    running,
                    parameters,
                    kernel_name="python3",
                    language="python",
                    cwd=notebook.parent,
                    progress_bar=False,
                    kernel_manager_class=monitor.kernel_manager_class(),
                    on_cell_start=monitor.start_cell,
                    store_widget_state=False,
                    coalesce_streams=True,
                    shutdown_kernel="immediate",  # all is written by then; tearing a kernel down takes two seconds
                )
            # Absolute paths of this machine say nothing elsewhere, and the output path is the temporary one.
            executed.metadata.papermill.update(input_path=display_path(notebook), output_path=display_path(done))
            files.write_text(done, nbformat.writes(executed))
            failed.unlink(missing_ok=True)
        except PapermillExecutionError as error:
            running.replace(failed)
            trace = strip_color("\n".join(error.traceback)).strip().splitlines()
            what = f"{error.ename}: {error.evalue}"
            raise StageFailed(self._failure(notebook, failed, error.cell_index, what, trace)) from None
        except Exception as error:  # the kernel died, the disk is full
            if running.is_file():
                running.replace(failed)
            what, trace = f"{type(error).__name__}: {error}", []
            if type(error).__name__ == "DeadKernelError":
                what = "the kernel died; if dmesg tells of 'out of memory', take smaller batches or fewer workers"
                trace = monitor.last_words()
            raise StageFailed(self._failure(notebook, failed, monitor.cell, what, trace)) from error
        finally:
            running.unlink(missing_ok=True)

    def _failure(self, notebook: Path, failed: Path, cell_index: int, error: str, trace: list[str]) -> str:
        """What went wrong, where, and how to go on, over several lines."""
        cells = notebook_cells(notebook)
        given = next(i for i, cell in enumerate(cells) if "parameters" in cell["tags"])
        number = (
            cell_index if cell_index <= given else cell_index - 1
        )  # papermill puts a cell of its own after that one
        source = cells[number]["source"].splitlines()
        lines = [f"{display_path(notebook)} failed in cell {number + 1} of {len(cells)}:"]
        lines += [f"    {line}" for line in source[:SOURCE_LINES]] + ["    ..."] * (len(source) > SOURCE_LINES)
        lines.append(error)
        if trace:
            lines += [f"  last lines of its traceback (all of it, and the notebook so far: {display_path(failed)}):"]
            lines += [f"    {line}" for line in trace[-TRACEBACK_LINES:]]
        return "\n".join([*lines, self._how_to_resume()])

    def _how_to_resume(self) -> str:
        own = self.notebooks != SHIPPED / "notebooks"  # other notebooks would begin from nothing
        options = ["--notebooks", display_path(self.notebooks)] if own else []
        for source in self.sources:
            options += ["--reuse", source.name if source.parent == self.run.folder.parent else display_path(source)]
        options += ["--keep-stale"] if self.keep_stale else []
        return f"This command resumes it:\n  {self.run.command(*options)}"


def _stale(entry: Entry, inputs: Entry) -> str:
    """What ``--keep-stale`` overlooks, for a line of the log."""
    changed = changed_names(entry["modules"], inputs["modules"])
    return f"; kept by --keep-stale though {', '.join(changed)} changed" if changed else ""


def _invalidate(folder: Path, rerun: Sequence[Stage]) -> None:
    """Drop entries of stages from the manifest: without one, a stage starts from nothing."""
    manifest = read_manifest(folder)
    if [stage for stage in rerun if manifest["stages"].pop(stage.name, None)]:
        write_manifest(folder, manifest)


def _describe_run(run: Run) -> None:
    """Write to the manifest what every number of the run depends on."""
    facts = {
        "run": run.name,
        "config_file": display_path(run.config_file),
        "overrides": list(run.overrides),
        "config_hash": config_hash(run.config),
        "seed": run.config.seed,
        **describe_machine(run.make_runtime()),
    }
    write_manifest(run.folder, facts | {"stages": read_manifest(run.folder)["stages"]})


# ------------------------------------------------------------------------------------------------------ interruptions


def _forget_open_tasks() -> None:
    """Let asyncio not complain, when it ends, that nobody asked how the interrupted cell went."""
    from jupyter_core.utils import ensure_event_loop

    ensure_event_loop().set_exception_handler(lambda loop, context: None)


@contextlib.contextmanager
def _stopping(kill_kernel: Callable[[], None]) -> Iterator[None]:
    """Ctrl-C, SIGTERM and a closed terminal kill the kernel and end the block as :class:`_Stop`."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread can handle signals
        yield
        return

    def stop(signum: int, frame: FrameType | None) -> None:
        for number in numbers:
            signal.signal(number, signal.SIG_IGN)  # a second Ctrl-C must not cut the clean-up short
        kill_kernel()  # nbclient would ask politely and wait for the cell
        raise _Stop(signum)

    wanted = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    # What is ignored stays ignored: nohup does that, and a shell to Ctrl-C for jobs in the background.
    numbers = [number for number in wanted if signal.getsignal(number) != signal.SIG_IGN]
    before = [signal.signal(number, stop) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


@contextlib.contextmanager
def _quiet_papermill() -> Iterator[None]:
    """Errors come as exceptions; what papermill logs beside them only tears the progress bar."""
    logger = logging.getLogger("papermill")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def _log(line: str) -> None:
    print(line, file=sys.stderr, flush=True)

"""Papermill executes the notebooks of a run in order; stages that are complete and unchanged are skipped.

A stage counts as complete only when the manifest says so, and the manifest is written last: a process killed at any
moment leaves a stage that the same command resumes.
"""

import contextlib
import logging
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType

from smaflib import files
from smaflib.config import flat_settings, load_config
from smaflib.errors import RunError
from smaflib.files import RUNS_FOLDER, SHIPPED, absolute, display_path, duration, shown_path
from smaflib.runs import manifest
from smaflib.runs.environment import describe_machine
from smaflib.runs.inputs import difference, notebook_hash, outside_files, stage_inputs, why_not_complete
from smaflib.runs.kernel import NotebookKernel
from smaflib.runs.manifest import Entry, hash_value, read_manifest, read_records, replace_records
from smaflib.runs.run import Run, find_run, open_run, run_folder
from smaflib.runs.stages import STAGES, Stage, stage_named

HOW_TO_RESUME = "The same command resumes it."


def run_notebooks(
    config_file: str | Path,  # a YAML file of settings, relative to the checkout
    name: str | None = None,  # of the run folder; by default the config file's
    overrides: Sequence[str] = (),  # key=value on top of the file
    until_stage: str | None = None,  # the last stage
    notebooks: Path = SHIPPED / "notebooks",
    runs: Path = RUNS_FOLDER,
    reuse: Sequence[str] = (),  # names or paths of runs whose finished stages are reused if their inputs are the same
    keep_stale: bool = False,  # keep stages that another version of the library made
    stages: tuple[Stage, ...] = STAGES,  # the chain; only tests use another one
) -> Run:
    """Execute the notebooks of a run, write its report, print its results.

    Raises:
        ConfigError: if a setting does not exist or fit, or custom code does not work; nothing was written then.
        FileNotFoundError: if there is no such config file.
        RunError: if the run cannot start (exit code 2), a notebook fails (1), or a signal ends the run (128 + number).
    """
    chosen = stages[: stages.index(stage_named(until_stage, stages)) + 1] if until_stage else stages
    config_file = absolute(config_file)
    config = load_config(config_file, overrides)
    for stage in chosen:
        notebook_hash(notebooks / f"{stage.name}.ipynb")  # it can be read
    folder = run_folder(runs, config_file.stem if name is None else name)
    sources = [find_run(source, runs).folder for source in reuse]
    entries = read_manifest(folder)["stages"]
    done = [each for each in chosen if entries.get(each.name, {}).get("status") == "complete"]
    if config.custom_code or (stages == STAGES and done != list(chosen)):
        from smaflib.pipeline import check_config  # imports torch, which a call that skips everything does not need

        check_config(config, folder, networks=len(chosen) > 2)
    run = open_run(folder, config_file, overrides, stages=stages)
    with files.locked(folder, "smaf run"):
        chain = _Chain(run, notebooks, outside_files(config), sources, keep_stale)
        changed = [stage for stage in chosen if chain.run_stage(stage)]
        index = run.path("index.html")
        if changed or not index.is_file():
            from smaflib.report.html import write_index

            write_index(run)
    from smaflib.report.tables import beside_reference, results_text

    told = [results_text(run), beside_reference(run), f"report: {shown_path(index)}"]
    print("\n\n".join(filter(None, told)), flush=True)
    return run


@dataclass
class _Chain:
    """A run and how its stages are executed, see :func:`run_notebooks`."""

    run: Run
    notebooks: Path
    outside: Mapping[str, str]  # hashes of the files that settings name
    sources: Sequence[Path]  # folders of the runs whose stages may be reused
    keep_stale: bool

    def run_stage(self, stage: Stage) -> bool:
        """Skip, reuse or execute a stage; returns whether it was not skipped."""
        folder, notebook = self.run.folder, self.notebooks / f"{stage.name}.ipynb"
        inputs = stage_inputs(self.run, stage, notebook, self.outside)
        entry = read_manifest(folder)["stages"].get(stage.name)
        reason = why_not_complete(folder, stage, inputs, self.keep_stale)
        if entry and reason is None:
            _log(f"{stage.name}  complete, skipped (took {duration(entry['seconds'])})")
            return False
        _describe_run(self.run)
        for source in self.sources:
            refusal = why_not_complete(source, stage, inputs, self.keep_stale)
            if refusal is None:
                _reuse(source, folder, stage)
                _log(f"{stage.name}  reused from {source.name}")
                return True
            reason = f"{reason}; {source.name}: {refusal}"
        resumed = entry if entry and difference(entry.get("inputs", {}), inputs, self.keep_stale) is None else None
        if resumed:  # without --keep-stale it would run again
            inputs = resumed["inputs"]
        _log(f"{stage.name}  {'resumes' if resumed else 'starts'} ({reason})")
        manifest.clear_stage(folder, stage, resumed)
        self._execute(stage, notebook, inputs, resumed is not None)
        return True

    def _execute(self, stage: Stage, notebook: Path, inputs: Entry, resumed: bool) -> None:
        """Execute a stage and keep its manifest entry."""
        folder, begun = self.run.folder, time.monotonic()
        started = datetime.now(UTC).isoformat(timespec="seconds")
        entry = {"status": "running", "started": started, "resumed": resumed, "inputs": inputs}
        manifest.put_entry(folder, stage, entry)
        kernel, result = NotebookKernel(stage.name), Entry(status="failed")
        try:
            with _stopping(kernel.kill):
                self._execute_notebook(stage, notebook, kernel)
            if absent := manifest.missing_outputs(folder, stage):
                raise RunError(f"{stage.name} ended without making {', '.join(absent)}", exit_code=1)
            result = {"status": "complete", **manifest.describe_results(folder, stage)}
        except KeyboardInterrupt as stop:
            signum = signal.Signals(stop.args[0] if stop.args else signal.SIGINT)
            raise RunError(f"{stage.name} was stopped by {signum.name}. {HOW_TO_RESUME}", 128 + signum) from None
        finally:
            result["seconds"] = round(time.monotonic() - begun, 1)
            manifest.put_entry(folder, stage, entry | result)
        _log(f"{stage.name}  done in {duration(result['seconds'])}")

    def _execute_notebook(self, stage: Stage, notebook: Path, kernel: NotebookKernel) -> None:
        """Execute one notebook into the run folder; a failed one is kept as ``<name>.failed.ipynb``."""
        import nbformat
        from nbclient.exceptions import DeadKernelError

        logging.getLogger("papermill").setLevel(logging.CRITICAL)  # its errors come as exceptions
        parameters = {
            "config_file": display_path(self.run.config_file),
            "overrides": list(self.run.overrides),
            "run_dir": display_path(self.run.folder),
        }
        done, running, failed = (self.run.path(f"{stage.name}{ending}.ipynb") for ending in ("", ".running", ".failed"))
        try:
            executed = kernel.execute(notebook, running, parameters, cwd=notebook.parent)
            # Absolute paths of this machine say nothing elsewhere, and the output path is the temporary one.
            executed.metadata.papermill.update(input_path=display_path(notebook), output_path=display_path(done))
            files.write_text(done, nbformat.writes(executed))
            failed.unlink(missing_ok=True)
        except Exception as error:
            if running.is_file():
                running.replace(failed)
            cause = str(error).strip()
            if isinstance(error, DeadKernelError):
                cause = "the kernel died; if dmesg shows 'out of memory', use smaller batches or fewer workers"
                cause = "\n".join([cause, *kernel.last_words])
            where = f"{shown_path(notebook)} failed; the notebook so far: {shown_path(failed)}"
            raise RunError(f"{where}\n{cause}\n{HOW_TO_RESUME}", exit_code=1) from error
        finally:
            running.unlink(missing_ok=True)


def _reuse(source: Path, folder: Path, stage: Stage) -> None:
    """Give a run a stage of another one, with records and manifest entry; artifacts are hard links.

    Killed in between, it leaves a stage without an entry, which the next call starts from nothing.
    """
    entry = read_manifest(source)["stages"][stage.name]
    manifest.put_entry(folder, stage, None)
    manifest.clear_stage(folder, stage)
    for key in entry["artifacts"]:
        (folder / key).parent.mkdir(parents=True, exist_ok=True)
        if key.endswith("/"):
            shutil.copytree(source / key, folder / key, copy_function=_link)
        else:
            _link(str(source / key), str(folder / key))
    replace_records(folder, stage.name, [record for record in read_records(source) if record["stage"] == stage.name])
    manifest.put_entry(folder, stage, entry | {"reused_from": display_path(source)})


def _link(source: str, target: str) -> None:
    """Link a file; copy it if the file system has no links, or if an editor may write into it."""
    with contextlib.suppress(OSError):
        if not source.endswith((".ipynb", ".json", ".html")):
            os.link(source, target)
            return
    shutil.copyfile(source, target)


def _describe_run(run: Run) -> None:
    """Write into the manifest what every number of the run depends on."""
    facts = {
        "run": run.name,
        "config_file": display_path(run.config_file),
        "overrides": list(run.overrides),
        "config_hash": hash_value(flat_settings(run.config)),
        "seed": run.config.seed,
        "supervision": run.config.supervision,
        **describe_machine(run.make_runtime()),
    }
    manifest.write_manifest(run.folder, facts | {"stages": read_manifest(run.folder)["stages"]})


@contextlib.contextmanager
def _stopping(kill_kernel: Callable[[], None]) -> Iterator[None]:
    """Ctrl-C, SIGTERM and a closed terminal kill the kernel and end the block as a KeyboardInterrupt."""

    def stop(signum: int, frame: FrameType | None) -> None:
        from jupyter_core.utils import ensure_event_loop

        for number in before:
            signal.signal(number, signal.SIG_IGN)  # a second Ctrl-C must not cut the clean-up short
        # Without a handler asyncio complains at exit that nobody asked how the interrupted cell ended.
        ensure_event_loop().set_exception_handler(lambda loop, context: None)
        kill_kernel()  # nbclient would ask politely and wait for the cell
        raise KeyboardInterrupt(signum)  # asyncio lets it through

    wanted = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    # What is ignored stays ignored: nohup does that, and a shell for jobs in the background.
    before = {number: signal.getsignal(number) for number in wanted if signal.getsignal(number) != signal.SIG_IGN}
    try:
        for number in before:
            signal.signal(number, stop)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _log(line: str) -> None:
    print(line, file=sys.stderr, flush=True)

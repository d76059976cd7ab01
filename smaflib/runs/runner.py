"""Papermill executes the notebooks of a run in order; what is complete and unchanged is skipped.

A stage counts as complete only when the manifest says so, and the manifest is written after all else: a process killed
at any moment leaves a stage that the same command continues.
"""

from __future__ import annotations

import ast
import contextlib
import fcntl
import hashlib
import importlib.metadata
import logging
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from smaflib import files
from smaflib.config import dump_config, load_config
from smaflib.errors import RunError, RunStopped, StageFailed
from smaflib.files import PROJECT_ROOT, RUNS_FOLDER, absolute, display_path, duration
from smaflib.report.html import write_index
from smaflib.report.tables import results_text
from smaflib.runs.kernel import SpareKernel
from smaflib.runs.manifest import (
    NEVER_RAN,
    clear_stage,
    library_hash,
    list_artifacts,
    missing_outputs,
    notebook_cells,
    read_manifest,
    record_hash,
    stage_inputs,
    why_not_complete,
    write_manifest,
)
from smaflib.runs.run import Run, open_run
from smaflib.runs.stages import STAGES, Stage, stage_named

if TYPE_CHECKING:  # seconds to import, and a run whose stages are all complete needs none of it
    from jupyter_client.manager import AsyncKernelManager

PARAMETERS = ("config_file", "overrides", "run_dir")
"""What every notebook is given; its other parameters are for display and keep their defaults."""

PACKAGES = (
    "smaflib torch torchvision numpy pandas matplotlib pillow scipy safetensors pydantic "
    "pydensecrf2 papermill nbclient ipykernel"
).split()
SOURCE_LINES = 6
TRACEBACK_LINES = 12
KERNEL_EXIT_SECONDS = 15.0


KERNEL_ENVIRONMENT = {
    "MPLBACKEND": "module://matplotlib_inline.backend_inline",
    "PYTHONHASHSEED": "0",
    # The notebook imports the library that runs it, wherever another one is installed.
    "PYTHONPATH": os.pathsep.join(filter(None, [str(PROJECT_ROOT), os.environ.get("PYTHONPATH")])),
}
"""What every kernel needs from its start, beside the runner's own environment."""


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
    notebooks: Path = PROJECT_ROOT / "notebooks",
    runs: Path = RUNS_FOLDER,
    stages: tuple[Stage, ...] = STAGES,
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
        stages: the chain; only tests use another one.

    Raises:
        ConfigError: if a setting does not exist or fit.
        FileNotFoundError: if there is no such config file.
        RunError: if the run cannot start; nothing was executed then.
        StageFailed: if a notebook fails.
        RunStopped: if Ctrl-C or a signal ends the run.
    """
    chosen = _choose(stages, until_stage)
    anew = _stages_to_rerun(stages, from_stage, chosen)
    config_file = absolute(config_file)
    load_config(config_file, list(overrides))
    _check_notebooks(notebooks, chosen)
    run = open_run(_run_folder(runs, name or config_file.stem), config_file, overrides, stages=stages)
    with _locked(run):
        _invalidate(run, anew)
        # A spare kernel has imported what the chain's notebooks import; other chains are tests'.
        spare = SpareKernel(KERNEL_ENVIRONMENT) if stages == STAGES and os.name == "posix" else None
        with spare or contextlib.nullcontext():
            library_changed = [stage.name for stage in chosen if _run_stage(run, stage, notebooks, spare)]
        if library_changed:
            first = library_changed[0].partition("_")[0]
            _log(f"smaflib has changed since {first} ran; --from {first} runs it again")
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


def _run_folder(runs: Path, name: str) -> Path:
    if not re.fullmatch(r"\w[\w.+-]*", name):
        raise RunError(f"the run name {name!r} must be a plain folder name: letters, digits, '_', '-', '.', '+'")
    return absolute(runs) / name


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


@contextlib.contextmanager
def _locked(run: Run) -> Iterator[None]:
    """Keep other runners out of the run folder; the lock ends with this process, however it ends."""
    try:
        handle = run.path(".lock").open("a+")
    except OSError as error:
        raise RunError(f"cannot write the run folder {display_path(run.folder)}: {error.strerror}") from error
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise RunError(
                f"another smaf run is at work in {display_path(run.folder)}; wait for it, stop it, or give "
                "another --name"
            ) from error
        _await_kernel_of_killed_runner(run)
        yield


def _await_kernel_of_killed_runner(run: Run) -> None:
    # A kernel notices within a second that its runner was killed; until then it may still write into the folder.
    stages = read_manifest(run)["stages"].values()
    pids = [entry["kernel_pid"] for entry in stages if entry["status"] == "running" and entry.get("kernel_pid")]
    deadline = time.monotonic() + KERNEL_EXIT_SECONDS
    while any(_is_kernel(pid) for pid in pids):
        if time.monotonic() > deadline:
            raise RunError(
                f"the kernel of a killed run still works in {display_path(run.folder)}; end process {pids[0]} first"
            )
        time.sleep(0.1)


def _is_kernel(pid: int) -> bool:
    try:
        return b"smaflib.runs.kernel" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:  # it is gone, or this is not Linux
        return False


# --------------------------------------------------------------------------------------------------------- one stage


def _invalidate(run: Run, anew: Sequence[Stage]) -> None:
    """Drop entries of stages from the manifest: without one, a stage starts from nothing."""
    manifest = read_manifest(run)
    if [stage for stage in anew if manifest["stages"].pop(stage.name, None)]:
        write_manifest(run, manifest)


def _run_stage(run: Run, stage: Stage, notebooks: Path, spare: SpareKernel | None) -> bool:
    """Run a stage unless it is complete.

    Returns:
        Whether it was skipped though the library has changed since.
    """
    notebook = notebooks / f"{stage.name}.ipynb"
    inputs = stage_inputs(run, stage, notebook)
    library = library_hash()
    reason = why_not_complete(run, stage, inputs)
    if reason is None:
        entry = read_manifest(run)["stages"][stage.name]
        _log(f"{stage.name}  complete, skipped (took {duration(entry['seconds'])})")
        return bool(entry["library"] != library)
    _describe_run(run)
    entry = {
        "status": "running",
        "exit_code": None,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": None,
        "peak_memory_mb": None,
        "resumed": clear_stage(run, stage, inputs),
        "parameters": {
            "config_file": display_path(run.config_file),
            "overrides": list(run.overrides),
            "run_dir": display_path(run.folder),
        },
        **inputs,
        "library": library,
    }
    _put_entry(run, stage, entry)
    _execute_stage(run, stage, notebook, entry, reason, spare)
    _put_entry(run, stage, entry, status="complete", exit_code=0, artifacts=list_artifacts(run, stage))
    _log(f"{stage.name}  done in {duration(entry['seconds'])}")
    return False


def _execute_stage(
    run: Run, stage: Stage, notebook: Path, entry: dict[str, Any], reason: str, spare: SpareKernel | None
) -> None:
    """Execute a stage and note in its entry how long it took and, if it failed, with which exit code."""
    begun = time.monotonic()
    num_cells = len(notebook_cells(notebook)) + 1  # papermill adds one
    is_last = stage == run.stages[-1]

    def note_kernel(pid: int) -> None:
        _put_entry(run, stage, entry, kernel_pid=pid)
        if spare is not None and not is_last:
            spare.prepare(entry["library"])

    monitor = NotebookMonitor(stage.name, num_cells, note_kernel, spare, entry["library"])

    def measured() -> dict[str, Any]:
        return {"seconds": round(time.monotonic() - begun, 1), "peak_memory_mb": monitor.peak_memory_mb}

    try:
        with monitor, _stopping(monitor.kill_kernel):
            monitor.log_start(reason)
            _execute_notebook(run, stage, notebook, entry["parameters"], monitor)
        if absent := missing_outputs(run, stage):
            raise StageFailed(f"{stage.name} ended without making {', '.join(absent)}. {_how_to_resume(run, notebook)}")
    except _Stop as stop:
        code = 128 + stop.signum
        _put_entry(run, stage, entry, status="failed", exit_code=code, **measured())
        _forget_open_tasks()
        name = signal.Signals(stop.signum).name
        raise RunStopped(f"{stage.name} was stopped by {name}. {_how_to_resume(run, notebook)}", code) from None
    except BaseException:
        _put_entry(run, stage, entry, status="failed", exit_code=1, **measured())
        raise
    entry.update(measured(), records=record_hash(run, stage))


def _execute_notebook(
    run: Run, stage: Stage, notebook: Path, parameters: dict[str, Any], monitor: NotebookMonitor
) -> None:
    """Execute one notebook into the run folder; a failed one is kept as ``<name>.failed.ipynb``."""
    import nbformat
    import papermill
    from papermill.exceptions import PapermillExecutionError, strip_color

    running, failed = run.path(f"{stage.name}.running.ipynb"), run.path(f"{stage.name}.failed.ipynb")
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
                shutdown_kernel="immediate",  # everything is written by then; tearing a kernel down takes two seconds
            )
        # Absolute paths of this machine say nothing elsewhere, and the output path is the temporary one.
        executed.metadata.papermill.update(
            input_path=display_path(notebook), output_path=display_path(run.path(f"{stage.name}.ipynb"))
        )
        files.write_text(run.path(f"{stage.name}.ipynb"), nbformat.writes(executed))
        failed.unlink(missing_ok=True)
    except PapermillExecutionError as error:
        running.replace(failed)
        trace = strip_color("\n".join(error.traceback)).strip().splitlines()
        raise StageFailed(
            _failure(run, stage, notebook, error.cell_index, f"{error.ename}: {error.evalue}", trace)
        ) from None
    except Exception as error:  # the kernel died, the disk is full
        if running.is_file():
            running.replace(failed)
        what, trace = f"{type(error).__name__}: {error}", []
        if type(error).__name__ == "DeadKernelError":
            what = "the kernel died; if dmesg tells of 'out of memory', take smaller batches or fewer workers"
            trace = monitor.last_words()
        raise StageFailed(_failure(run, stage, notebook, monitor.cell, what, trace)) from error
    finally:
        running.unlink(missing_ok=True)


def _forget_open_tasks() -> None:
    """Let asyncio not complain, when it ends, that nobody asked how the interrupted cell went."""
    from jupyter_core.utils import ensure_event_loop

    ensure_event_loop().set_exception_handler(lambda loop, context: None)


def _failure(run: Run, stage: Stage, notebook: Path, cell_index: int, error: str, trace: list[str]) -> str:
    """What went wrong, where, and how to go on, over several lines."""
    cells = notebook_cells(notebook)
    given = next(i for i, cell in enumerate(cells) if "parameters" in cell["tags"])
    number = cell_index if cell_index <= given else cell_index - 1  # papermill puts a cell of its own after that one
    source = cells[number]["source"].splitlines()
    lines = [f"{display_path(notebook)} failed in cell {number + 1} of {len(cells)}:"]
    lines += [f"    {line}" for line in source[:SOURCE_LINES]] + ["    ..."] * (len(source) > SOURCE_LINES)
    lines.append(error)
    if trace:
        failed = display_path(run.path(f"{stage.name}.failed.ipynb"))
        lines += [f"  last lines of its traceback (all of it, and the notebook so far: {failed}):"]
        lines += [f"    {line}" for line in trace[-TRACEBACK_LINES:]]
    return "\n".join([*lines, _how_to_resume(run, notebook)])


def _how_to_resume(run: Run, notebook: Path) -> str:
    own = notebook.parent != PROJECT_ROOT / "notebooks"  # other notebooks would begin from nothing
    options = ["--notebooks", display_path(notebook.parent)] if own else []
    return f"This command resumes it:\n  {run.command(*options)}"


def _put_entry(run: Run, stage: Stage, entry: dict[str, Any], **more: Any) -> None:
    manifest = read_manifest(run)
    entry.update(more)
    if entry["status"] != "running":
        entry.pop("kernel_pid", None)
    manifest["stages"][stage.name] = entry
    write_manifest(run, manifest)


def _describe_run(run: Run) -> None:
    """Write to the manifest what every number of the run depends on."""
    manifest = read_manifest(run)
    facts = {
        "run": run.name,
        "config_file": display_path(run.config_file),
        "overrides": list(run.overrides),
        "config_hash": hashlib.sha256(dump_config(run.config).encode()).hexdigest(),
        "seed": run.config.seed,
        **describe_machine(run),
    }
    write_manifest(run, facts | {"stages": manifest["stages"]})


def describe_machine(run: Run) -> dict[str, Any]:
    """Device, versions and commit: what numbers depend on beside the settings."""
    device = run.make_runtime().device
    if device.type == "cuda":
        import torch

        kind = f"cuda ({torch.cuda.get_device_name(device)})"
    else:
        kind = f"{device.type} ({platform.machine()})"
    return {
        "device": kind,
        "python": platform.python_version(),
        "platform": platform.platform(),
        **git_state(),
        "packages": _package_versions(),
    }


def git_state() -> dict[str, Any]:
    """``git_commit`` and ``git_dirty`` of the checkout, None where there is none."""

    def git(*words: str) -> str:
        command = ["git", "--no-optional-locks", "-C", str(PROJECT_ROOT), *words]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=30).stdout.strip()

    try:
        return {"git_commit": git("rev-parse", "HEAD"), "git_dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):  # no git, or no checkout
        return {"git_commit": None, "git_dirty": None}


def _package_versions() -> dict[str, str]:
    installed = {}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            installed[package] = importlib.metadata.version(package)
    return installed


# ------------------------------------------------------------------------------------- kernel, progress, interruptions


class NotebookMonitor:
    """Follows one notebook from a thread of its own: draws the progress bar, notes the kernel's peak memory.

    On a terminal there is one bar over the notebook's cells; behind it stands the bar of the loop that runs inside the
    kernel (:func:`smaflib.runtime.progress`). Elsewhere, in a log file, a line says that the stage starts.

    Attributes:
        cell: index of the running cell.
        peak_memory_mb: the most memory that the kernel held, where the system tells.
    """

    def __init__(
        self,
        title: str,
        num_cells: int,
        on_kernel: Callable[[int], None],
        spare: SpareKernel | None = None,
        library: str = "",
    ) -> None:
        self._spare, self._library = spare, library
        self.cell = 0
        self.peak_memory_mb: int | None = None
        self._title, self._num_cells, self._on_kernel = title, num_cells, on_kernel
        self._kernel_pid: int | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._folder = tempfile.TemporaryDirectory(prefix="smaf-")
        self._progress = Path(self._folder.name) / "progress"
        self._log = Path(self._folder.name) / "log"

    def __enter__(self) -> NotebookMonitor:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        self.kill_kernel()
        self._folder.cleanup()

    def log_start(self, reason: str) -> None:
        if not sys.stderr.isatty():
            _log(f"{self._title}  starts" + (f" ({reason})" if reason != NEVER_RAN else ""))

    def start_cell(self, cell_index: int, **_: object) -> None:
        """Hook of nbclient."""
        self.cell = cell_index
        self._progress.unlink(missing_ok=True)  # the bar of the cell before

    def kill_kernel(self) -> None:
        """End the kernel's process group at once: itself if it is still there, and workers that it left."""
        if self._kernel_pid is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._kernel_pid, signal.SIGKILL)

    def last_words(self) -> list[str]:
        """What a kernel that crashed left in its log about where it did."""
        log = self._log.read_text(encoding="utf-8", errors="replace") if self._log.is_file() else ""
        _, found, after = log.partition("Fatal Python error")
        return (found + after).splitlines()[:TRACEBACK_LINES]

    def kernel_manager_class(self) -> type[AsyncKernelManager]:
        """Starts kernels of this very interpreter; an installed kernel called python3 may belong to another one."""
        from jupyter_client.kernelspec import KernelSpec
        from jupyter_client.manager import AsyncKernelManager

        command = [sys.executable, "-m", "smaflib.runs.kernel"]
        spec = KernelSpec(
            argv=[*command, "-f", "{connection_file}"],
            display_name="Python 3",
            language="python",
            env=KERNEL_ENVIRONMENT
            | {
                "SMAF_PROGRESS_FILE": str(self._progress),
                "IPYTHONDIR": str(self._progress.with_name("ipython")),  # no start-up files of the user's
            },
        )

        class ThisInterpreter(AsyncKernelManager):
            def __init__(manager, **options: Any) -> None:  # noqa: N805
                # Sockets in a folder of this user's: code and outputs do not pass through ports that all can reach.
                sockets = {"transport": "ipc", "connection_file": str(self._progress.with_name("kernel.json"))}
                super().__init__(**options, **sockets)

            @property
            def kernel_spec(manager) -> KernelSpec:  # noqa: N805 - self is the watch here
                return spec

            async def _async_launch_kernel(manager, kernel_cmd: list[str], **options: Any) -> None:  # noqa: N805
                # jupyter_client names this method as the one to override for launching in another way.
                process = self._spare and self._spare.become_kernel(
                    self._library,
                    kernel_cmd[len(command) :],
                    options["env"],
                    options.get("cwd") or os.getcwd(),
                    str(self._log),
                )
                if not process:
                    await super()._async_launch_kernel(kernel_cmd, **options)
                    return
                provisioner: Any = manager.provisioner
                provisioner.process, provisioner.pid, provisioner.pgid = process, process.pid, process.pid
                manager._reconcile_connection_info(provisioner.connection_info)

            _launch_kernel = _async_launch_kernel

            async def start_kernel(manager, **options: Any) -> None:  # type: ignore[override]  # noqa: N805
                # Its log would tear the progress bar: it reports even the interrupt by which it is shut down.
                with self._log.open("wb") as log:
                    await manager._async_start_kernel(stdout=log, stderr=log, **options)
                pid = getattr(manager.provisioner, "pid", None)  # only a process of this machine has one
                if pid is not None:
                    self._kernel_pid = pid
                    self._on_kernel(pid)

        return ThisInterpreter

    def _follow(self) -> None:
        hidden = not sys.stderr.isatty()
        layout = "{desc}  {bar:20} cell {n_fmt}/{total_fmt} [{elapsed}{postfix}]"
        with tqdm(
            total=self._num_cells, desc=self._title, bar_format=layout, leave=False, disable=hidden, dynamic_ncols=True
        ) as bar:
            while not self._ended.wait(0.3):
                self._note_memory()
                bar.n = self.cell + 1
                bar.set_postfix_str(self._inner_bar(), refresh=True)

    def _inner_bar(self) -> str:
        try:
            return self._progress.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):  # no loop runs, or it is being written
            return ""

    def _note_memory(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            status = Path(f"/proc/{self._kernel_pid}/status").read_text()
            if peak := re.search(r"VmHWM:\s*(\d+) kB", status):
                self.peak_memory_mb = round(int(peak[1]) / 1024)


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

    wanted = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
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

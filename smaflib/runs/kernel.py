"""The kernel that executes a notebook: a process of this interpreter, which ends with its runner.

papermill starts ``python -m smaflib.runs.kernel -f <connection file>``. ipykernel ends by itself when its parent is
killed, but leaves the worker processes that a notebook has started; this kernel ends them, too.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smaflib.files import HOME, PROJECT_ROOT, python_path

if TYPE_CHECKING:
    from jupyter_client.manager import AsyncKernelManager
    from nbformat import NotebookNode

LOCK, FOLDER = "SMAF_KERNEL_LOCK", "SMAF_KERNEL_FOLDER"
"""Environment variables: a file that the kernel keeps locked as long as it lives; its temporary folder."""

LONGEST_SOCKET_FOLDER = 80
"""Systems limit the path of a socket to some hundred bytes."""


class NotebookKernel:
    """Executes one notebook in a kernel of its own, with a progress bar if stderr is a terminal.

    A context manager; leaving it ends the kernel and its workers.

    Args:
        title: of the progress bar.
        num_cells: of the notebook.
        lock: a file that stays locked while the kernel lives.

    Attributes:
        cell: index of the running cell.
        peak_memory_mb: most memory that the kernel has held, on Linux.
    """

    def __init__(self, title: str, num_cells: int, lock: Path | None = None) -> None:
        self.cell = 0
        self.peak_memory_mb: int | None = None
        self._title, self._num_cells = title, num_cells
        self._pid: int | None = None
        self._temporary = tempfile.TemporaryDirectory(prefix="smaf-", ignore_cleanup_errors=True)
        self._folder = Path(self._temporary.name)
        self._progress = self._folder / "progress"
        self._ended = threading.Event()
        self._bar = threading.Thread(target=self._draw_bar, daemon=True)
        self._env = {
            # OpenMP threads wait actively for a short time only: beside another job a training step is 3 times as fast.
            "GOMP_SPINCOUNT": os.environ.get("GOMP_SPINCOUNT", "20000"),
            "IPYTHONDIR": str(self._folder / "ipython"),  # without the user's start-up files
            "MPLBACKEND": "module://matplotlib_inline.backend_inline",
            "PYTHONHASHSEED": "0",
            "PYTHONPATH": python_path(),
            "SMAF_PROGRESS_FILE": str(self._progress),
            "TMPDIR": str(self._folder),  # killed workers leave temporary files
            FOLDER: str(self._folder),
            HOME: str(PROJECT_ROOT),
        } | ({LOCK: str(lock)} if lock else {})

    def __enter__(self) -> NotebookKernel:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self._ended.set()
        self._bar.join()
        self._temporary.cleanup()

    def execute(self, notebook: Path, target: Path | None, parameters: dict[str, Any], cwd: Path) -> NotebookNode:
        """Execute a notebook with papermill, writing it to ``target`` after each cell."""
        import papermill

        return papermill.execute_notebook(
            notebook,
            target,
            parameters,
            kernel_name="python3",
            language="python",
            cwd=cwd,
            progress_bar=False,
            kernel_manager_class=self._manager_class(),
            on_cell_start=self._start_cell,
            on_cell_complete=self._note_memory,
            store_widget_state=False,
            coalesce_streams=True,
            shutdown_kernel="immediate",  # tearing a kernel down takes two seconds
        )

    def kill(self) -> None:
        """End the kernel and its workers at once."""
        if self._pid is not None:
            with contextlib.suppress(OSError):  # it has ended
                if os.name == "posix":
                    os.killpg(self._pid, signal.SIGKILL)
                else:
                    os.kill(self._pid, signal.SIGTERM)

    def last_words(self) -> list[str]:
        """Where a kernel that crashed did so, as it wrote into its log."""
        log = (self._folder / "log").read_text(encoding="utf-8", errors="replace")
        _, found, after = log.partition("Fatal Python error")
        return (found + after).splitlines()[:12]

    def _manager_class(self) -> type[AsyncKernelManager]:
        """Starts kernels of this interpreter; an installed kernel called python3 may belong to another one."""
        from jupyter_client.kernelspec import KernelSpec
        from jupyter_client.manager import AsyncKernelManager

        kernel = self
        command = [sys.executable, "-m", "smaflib.runs.kernel", "-f", "{connection_file}"]
        spec = KernelSpec(argv=command, display_name="Python 3", language="python", env=self._env)

        class ThisInterpreter(AsyncKernelManager):
            def __init__(self, **options: Any) -> None:
                # Sockets in a folder of this user: other users could listen to ports.
                if os.name == "posix" and len(os.fsencode(kernel._folder)) < LONGEST_SOCKET_FOLDER:
                    options["transport"] = "ipc"
                super().__init__(**options, connection_file=str(kernel._folder / "kernel.json"))

            @property
            def kernel_spec(self) -> KernelSpec:
                return spec

            async def _async_start_kernel(self, **options: Any) -> None:
                # In the terminal a kernel's output would tear the progress bar.
                with (kernel._folder / "log").open("wb") as log:
                    await super()._async_start_kernel(**options, stdout=log, stderr=log)
                kernel._pid = self.provisioner.pid  # type: ignore[union-attr]

            start_kernel = _async_start_kernel

        return ThisInterpreter

    def _start_cell(self, cell_index: int, **_: object) -> None:
        self.cell = cell_index
        self._progress.unlink(missing_ok=True)  # of the cell before

    def _note_memory(self, **_: object) -> None:
        with contextlib.suppress(OSError):
            peak = re.search(r"VmHWM:\s*(\d+) kB", Path(f"/proc/{self._pid}/status").read_text())
            self.peak_memory_mb = round(int(peak[1]) / 1024) if peak else None

    def _draw_bar(self) -> None:
        """A bar over the cells, and behind it the bar of the loop inside the kernel."""
        if not sys.stderr.isatty():
            return
        from tqdm import tqdm

        layout = "{desc}  {bar:20} cell {n_fmt}/{total_fmt} [{elapsed}{postfix}]"
        with tqdm(total=self._num_cells, desc=self._title, bar_format=layout, leave=False, dynamic_ncols=True) as bar:
            while not self._ended.wait(0.3):
                inner = ""
                with contextlib.suppress(OSError, UnicodeDecodeError):  # no loop runs, or it is being written
                    inner = self._progress.read_text(encoding="utf-8")
                bar.n = self.cell + 1
                bar.set_postfix_str(inner, refresh=True)


def _end_with_parent() -> None:
    """Kill this process group, workers included, once the parent process is gone."""
    parent = os.getppid()
    while os.getppid() == parent:
        time.sleep(0.5)
    shutil.rmtree(os.environ.get(FOLDER, ""), ignore_errors=True)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    if os.name == "posix" and os.getpgrp() == os.getpid():  # never a group that others belong to
        threading.Thread(target=_end_with_parent, daemon=True).start()
    if LOCK in os.environ:
        from filelock import FileLock

        lock = FileLock(os.environ[LOCK])
        lock.acquire()
    from ipykernel.kernelapp import launch_new_instance

    faulthandler.enable(os.dup(2), all_threads=False)  # ipykernel replaces 2 by a pipe that dies with it
    launch_new_instance()

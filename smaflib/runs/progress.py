"""Following a notebook while it runs: its progress bar, its kernel's memory, its kernel's end."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from smaflib.files import HOME, PROJECT_ROOT, python_path

if TYPE_CHECKING:  # seconds to import, and a run whose stages are all complete needs none of it
    from jupyter_client.manager import AsyncKernelManager

TRACEBACK_LINES = 12

KERNEL_ENVIRONMENT = {
    "MPLBACKEND": "module://matplotlib_inline.backend_inline",
    "PYTHONHASHSEED": "0",
    "PYTHONPATH": python_path(),
    HOME: str(PROJECT_ROOT),
}
"""What every kernel needs from its start, beside the runner's own environment."""


LONGEST_TEMPORARY = 50
"""Bytes of the temporary folder's path; below a longer one, sockets would have longer paths than systems allow."""


class KernelFolder:
    """A temporary folder for one kernel's sockets, log and progress; only this user can look into it.

    A runner that is killed leaves its folder behind. It is locked by its runner, so the next one can tell which are
    nobody's any more, and removes them.

    Attributes:
        path: of the folder.
    """

    def __init__(self) -> None:
        from filelock import FileLock

        base = tempfile.gettempdir()
        if len(os.fsencode(base)) > LONGEST_TEMPORARY and os.path.isdir("/tmp"):
            base = "/tmp"
        _remove_abandoned(Path(base))
        self.path = Path(tempfile.mkdtemp(prefix="smaf-", dir=base))
        self._lock = FileLock(self.path / "lock")
        self._lock.acquire()

    def remove(self) -> None:
        """Remove the folder and all that is in it."""
        self._lock.release()
        shutil.rmtree(self.path, ignore_errors=True)


def _remove_abandoned(base: Path) -> None:
    from filelock import FileLock, Timeout

    for lock in base.glob("smaf-*/lock"):
        # Timeout: its runner lives. OSError: another user's, or another runner has just removed it.
        with contextlib.suppress(Timeout, OSError), FileLock(lock).acquire(timeout=0):
            shutil.rmtree(lock.parent, ignore_errors=True)


class NotebookMonitor:
    """Follows one notebook from a thread of its own: draws the progress bar, notes the kernel's peak memory.

    On a terminal there is one bar over the notebook's cells; behind it stands the bar of the loop that runs inside the
    kernel (:func:`smaflib.runtime.progress`).

    Args:
        title: what stands before the bar.
        num_cells: of the notebook.
        on_kernel: is told the kernel's process id.
        spare: gives a kernel that is ready, see :class:`smaflib.runs.provisioner.Provisioner`.
        env: further environment of the kernel.

    Attributes:
        cell: index of the running cell.
        peak_memory_mb: the most memory that the kernel held, where the system tells.
    """

    def __init__(
        self,
        title: str,
        num_cells: int,
        on_kernel: Callable[[int], None],
        spare: Callable[..., Any] | None = None,
        env: Mapping[str, str] | None = None,
    ) -> None:
        self.cell = 0
        self.peak_memory_mb: int | None = None
        self._title, self._num_cells, self._on_kernel, self._spare = title, num_cells, on_kernel, spare
        self._kernel_pid: int | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._temporary = KernelFolder()
        self._folder = self._temporary.path
        self._progress = self._folder / "progress"
        # A kernel is killed in the end, with its workers: what they keep in temporary folders goes with this one.
        own = {"SMAF_PROGRESS_FILE": str(self._progress), "TMPDIR": str(self._folder)}
        self._env = KERNEL_ENVIRONMENT | own | dict(env or {})

    def __enter__(self) -> NotebookMonitor:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        self.kill_kernel()
        self._temporary.remove()

    def kernel_manager_class(self) -> type[AsyncKernelManager]:
        """What starts the notebook's kernel: an option of papermill."""
        from smaflib.runs.provisioner import kernel_manager_class

        return kernel_manager_class(self._folder, self._env, spare=self._spare, on_kernel=self._note_kernel)

    def start_cell(self, cell_index: int, **_: object) -> None:
        """Hook of nbclient."""
        self.cell = cell_index
        self._progress.unlink(missing_ok=True)  # the bar of the cell before

    def kill_kernel(self) -> None:
        """End the kernel's process group at once: itself if it is still there, and workers that it left."""
        if self._kernel_pid is not None:
            with contextlib.suppress(OSError):  # it has ended
                if hasattr(os, "killpg"):
                    os.killpg(self._kernel_pid, signal.SIGKILL)
                else:  # Windows has no groups; workers leave with their parent by themselves
                    os.kill(self._kernel_pid, signal.SIGTERM)

    def last_words(self) -> list[str]:
        """What a kernel that crashed left in its log about where it did."""
        path = self._folder / "log"
        log = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
        _, found, after = log.partition("Fatal Python error")
        return (found + after).splitlines()[:TRACEBACK_LINES]

    def _note_kernel(self, pid: int) -> None:
        self._kernel_pid = pid
        self._on_kernel(pid)

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

"""The kernel that executes a notebook: a process of this interpreter, which ends with its runner.

ipykernel ends by itself when its parent is killed, and the workers of :mod:`smaflib.processes` and torch with it.
"""

import contextlib
import os
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

from smaflib.files import HOME, PROJECT_ROOT


class NotebookKernel:
    """Executes one notebook in a kernel of its own, with progress bars if stderr is a terminal."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.last_words: list[str] = []  # what a kernel that crashed wrote to its log
        self._pid: int | None = None

    def execute(self, notebook: Path, target: Path, parameters: dict[str, Any], cwd: Path) -> Any:
        """Execute a notebook with papermill, writing it to ``target`` after each cell; then end kernel and workers."""
        import papermill

        layout = "{desc}  {bar:20} cell {n_fmt}/{total_fmt} [{elapsed}]"
        bar = {"desc": self.title, "bar_format": layout, "leave": False, "dynamic_ncols": True}
        with tempfile.TemporaryDirectory(prefix="smaf-", ignore_cleanup_errors=True) as folder:
            try:
                return papermill.execute_notebook(
                    notebook,
                    target,
                    parameters,
                    kernel_name="python3",
                    language="python",
                    cwd=cwd,
                    progress_bar=bar if sys.stderr.isatty() else False,
                    kernel_manager_class=self._manager_class(folder),
                    store_widget_state=False,
                    coalesce_streams=True,
                    shutdown_kernel="immediate",  # tearing a kernel down takes two seconds
                )
            finally:
                self.kill()
                self.last_words = Path(folder, "log").read_text(encoding="utf-8", errors="replace").splitlines()[:12]
                if sys.stderr.isatty():
                    print("\r\033[J", end="", file=sys.stderr, flush=True)  # the bar of a killed kernel

    def kill(self) -> None:
        """End the kernel and its workers at once."""
        if self._pid is not None:
            with contextlib.suppress(OSError):  # it has ended
                os.killpg(self._pid, signal.SIGKILL)

    def _manager_class(self, folder: str) -> type:
        """Starts kernels of this interpreter; an installed kernel called python3 may belong to another one."""
        from jupyter_client.kernelspec import KernelSpec
        from jupyter_client.manager import AsyncKernelManager

        kernel, log = self, Path(folder, "log")
        log.touch()
        command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        spec = KernelSpec(argv=command, display_name="Python 3", language="python", env=_environment(folder))
        # Sockets in a folder of this user: other users could listen to ports. The system limits their paths.
        transport = "ipc" if len(os.fsencode(folder)) < 80 else "tcp"

        class ThisInterpreter(AsyncKernelManager):
            kernel_spec = spec

            def __init__(self, **options: Any) -> None:
                super().__init__(**options, transport=transport, connection_file=f"{folder}/kernel.json")

            async def _async_start_kernel(self, **options: Any) -> None:
                # In the terminal a kernel's output would tear the progress bar.
                with log.open("wb") as output:
                    await super()._async_start_kernel(**options, stdout=output, stderr=output)
                kernel._pid = self.provisioner.pid  # type: ignore[union-attr]

            start_kernel = _async_start_kernel

        return ThisInterpreter


def _environment(folder: str) -> dict[str, str]:
    return {
        # OpenMP threads wait actively for a short time only: beside another job a training step is 3 times as fast.
        "GOMP_SPINCOUNT": os.environ.get("GOMP_SPINCOUNT", "20000"),
        "IPYTHONDIR": f"{folder}/ipython",  # without the user's start-up files
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",
        "PYDEVD_DISABLE_FILE_VALIDATION": "1",  # a warning of ipykernel's debugger
        "PYTHONHASHSEED": "0",
        # This very package, also where another one is installed.
        "PYTHONPATH": os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")])),
        "SMAF_PROGRESS_FILE": _terminal(),
        "TMPDIR": folder,  # killed workers leave temporary files
        HOME: str(PROJECT_ROOT),
    }


def _terminal() -> str:
    """The terminal of stderr as a file that the kernel can open."""
    with contextlib.suppress(OSError, AttributeError):  # no terminal, or none with a name
        name = os.ttyname(sys.stderr.fileno())
        return name if os.access(name, os.W_OK) else os.devnull
    return os.devnull

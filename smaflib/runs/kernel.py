"""An IPython kernel that does not outlive the runner, and one that has its imports behind it when it is needed.

``python -m smaflib.runs.kernel -f <connection file>`` starts a kernel at once; with ``--spare`` in its place it imports
what the notebooks import, then waits for its orders on standard input (:class:`SpareKernel`): nine notebooks that each
wait five seconds for their imports would spend a sixth of the mini run on that.

Where the environment names a file for it (:mod:`smaflib.config_reads`), the kernel notes there which settings its
notebook reads. ipykernel ends a kernel whose parent was killed, but not the worker processes that the kernel started:
this one ends them, too.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

PRELOADED = (
    "matplotlib.figure",
    "pandas",
    "smaflib.classifier",
    "smaflib.pseudo_masks",
    "smaflib.report.html",
    "smaflib.segmentation",
    "smaflib.self_training",
    "smaflib.thresholds",
)
"""What the chain's notebooks import, all but pyplot (and with it ``smaflib.report.plots``): imported before there is a
shell, it would not show its figures in it."""


class SpareKernel:
    """A process that makes itself ready to be the next kernel while the current notebook runs.

    A context manager: leaving it ends a process that was not used. If this process is killed, the spare one sees the
    end of its input and goes.

    Args:
        env: environment that the process must have from its start, beside that of this process.
    """

    def __init__(self, env: Mapping[str, str]) -> None:
        self._env = dict(os.environ) | dict(env)
        self._process: subprocess.Popen[bytes] | None = None
        self._version = ""

    def __enter__(self) -> SpareKernel:
        return self

    def __exit__(self, *_: object) -> None:
        self.discard()

    def prepare(self, version: str) -> None:
        """Start a process, unless one of that version is there."""
        if self._process is not None and self._version == version:
            return
        self.discard()
        self._version = version
        self._process = subprocess.Popen(
            [sys.executable, "-m", "smaflib.runs.kernel", "--spare"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=self._env,
            start_new_session=True,
        )

    def become_kernel(
        self, version: str, arguments: Sequence[str], env: Mapping[str, str], cwd: str, log: str
    ) -> subprocess.Popen[bytes] | None:
        """Turn the spare process into a kernel.

        Args:
            version: of the code now.
            arguments: of its command line, such as ``-f <connection file>``.
            env: its whole environment.
            cwd: its folder.
            log: a file that takes its standard output and error.

        Returns:
            The process; None if there is none of that version, or it has died.
        """
        process, self._process = self._process, None
        if process is None:
            return None
        if self._version == version and process.poll() is None:
            orders = {"arguments": list(arguments), "env": dict(env), "cwd": cwd, "log": log}
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError), process.stdin:
                process.stdin.write(json.dumps(orders).encode() + b"\n")
                process.stdin.flush()
                return process
        self._process = process
        self.discard()
        return None

    def discard(self) -> None:
        """End the spare process, if there is one."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            if process.stdin is not None:
                with contextlib.suppress(BrokenPipeError):
                    process.stdin.close()


def await_orders() -> dict[str, Any]:
    """Import, wait until :meth:`SpareKernel.become_kernel` speaks, and become what it says; exit if nobody does."""
    for module in PRELOADED:
        # What does not import here fails again in the notebook's own cell, where its reader sees it.
        with contextlib.suppress(Exception):
            __import__(module)
    line = sys.stdin.readline()
    if not line:
        sys.exit()
    orders: dict[str, Any] = json.loads(line)
    os.environ.clear()
    os.environ.update(orders["env"])
    tempfile.tempdir = None  # an import may have asked already where temporary files go
    os.chdir(orders["cwd"])
    log = os.open(orders["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nothing, 0), (log, 1), (log, 2)):
        os.dup2(source, target)
    return orders


def follow_parent(interval: float = 0.5) -> None:
    """Kill this process group, workers included, once the parent process is gone; checked every ``interval`` s."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(interval)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True, name="follow_parent").start()


def recording_settings() -> contextlib.AbstractContextManager[None]:
    """Note which settings are read, if the environment asks for it."""
    # A library that does not import fails again in the notebook's own cell, where its reader sees it.
    with contextlib.suppress(Exception):
        from smaflib.config_reads import recording_where_asked

        return recording_where_asked()
    return contextlib.nullcontext()


if __name__ == "__main__":
    if os.name == "posix" and os.getpgrp() == os.getpid():  # never a group that others belong to
        follow_parent()
    if "--spare" in sys.argv:
        sys.argv = [sys.argv[0], *await_orders()["arguments"]]
    from ipykernel.kernelapp import launch_new_instance

    faulthandler.enable(os.dup(2), all_threads=False)  # ipykernel puts a pipe in place of 2, which dies with it
    with recording_settings():
        launch_new_instance()

"""Starting the processes of a stage, following them, and saying what went wrong in one of them.

A notebook's kernel cannot fork processes that use a GPU, so torchrun starts new ones (``python -m
torch.distributed.run``) and the kernel waits. What they make lies in the run folder, where the kernel then finds it.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from smaflib import errors, files
from smaflib.config import Config, TrainingConfig, dump_config
from smaflib.config_reads import not_noting
from smaflib.distributed.ranks import ranks_here
from smaflib.errors import ConfigError, InputError, RunError
from smaflib.runtime import PROGRESS_FILE, num_cores

RESTARTS = 3
"""Times that torchrun starts all processes again after one was killed. What was written is not computed again."""

MEETING_SECONDS = 300.0
"""How long a process waits until all have come. They start together and then import torch, which takes seconds."""

FAILED_SECONDS = 45.0
"""How long torchrun may take to end once a process has said why it failed: it gives the others half a minute, and
starts one that hangs again."""

WORKER = "smaflib.distributed.worker"
"""The module that torchrun runs. It stands above the stages, which it calls, and this one below them."""

PREFIX, LOCK = "smaf-ranks-", "lock"

TASK, FAILURE = "task.json", "failure.json"
"""Files in the folder that a waiting process and its workers share."""

FINAL = (InputError, RunError, FloatingPointError, OSError, MemoryError, torch.OutOfMemoryError)
"""What would come again if the processes were started again. An error of communication is none of them: it says that
another process has ended."""


@dataclass(frozen=True)
class Task:
    """A call of a function of :mod:`smaflib.pipeline`, for other processes.

    Attributes:
        function: its name.
        folder: of the workspace.
        data_folder: of the workspace.
        config: of the workspace.
        arguments: beside the workspace; what JSON can hold.
    """

    function: str
    folder: Path
    data_folder: Path
    config: Config
    arguments: dict[str, Any]


def num_processes(config: Config) -> int:
    """How many processes share a stage's work: ``processes``, where ``auto`` is one per GPU and one without a GPU.

    ``auto`` is no more than the smallest batch has images. In a process that is one of several already it is 1.

    Raises:
        ConfigError: if more are asked for than there are GPUs.
    """
    if not ranks_here().alone:
        return 1
    with not_noting():  # how many processes there are decides no result
        wanted, on_gpu = config.processes, config.device in ("auto", "cuda") and torch.cuda.is_available()
        smallest_batch = min(training.batch_size for training in trainings(config).values())
    gpus = torch.cuda.device_count() if on_gpu else 0
    if wanted == "auto":
        return max(1, min(gpus, smallest_batch))
    if on_gpu and wanted > gpus:
        raise ConfigError(
            f"processes is {wanted}, but there {'is one GPU' if gpus == 1 else f'are {gpus} GPUs'} here; set "
            "processes=auto or device=cpu"
        )
    return wanted


def trainings(config: Config) -> dict[str, TrainingConfig]:
    """The trainings of a run, by the name of their settings."""
    found: dict[str, TrainingConfig] = {"classifier": config.classifier, "self_training": config.self_training}
    return found | ({"segmentation": config.segmentation} if config.segmentation.enabled else {})


def run_in_processes(task: Task, number: int) -> None:
    """Let several processes call a function together; returns when all of them have finished.

    A process that is killed ends the others, and torchrun starts all of them again, :data:`RESTARTS` times. This
    function ends them where it is interrupted, and they end by themselves once this process is gone.

    Args:
        task: the call. The function must be one that goes on where it stopped.
        number: of processes, all on this machine.

    Raises:
        ConfigError, DataError, WeightsError, RunError, FloatingPointError, OSError, MemoryError: what the function
            raised in one of the processes.
        RunError: if a process does not come within :data:`MEETING_SECONDS`; if processes ended in another way more
            often than they are started again, with the last words of one.
    """
    with _shared_folder() as folder:
        _write_task(folder / TASK, task)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={number}"]
        command += [f"--max-restarts={RESTARTS}", f"--log-dir={folder / 'logs'}", "--redirects=3"]
        command += ["--module", WORKER, str(folder)]
        with (folder / "torchrun.log").open("w", encoding="utf-8") as log, _shown_progress(folder) as shown:
            process = subprocess.Popen(command, env=_environment(folder, number), stdout=log, stderr=log)
            try:
                deadline = math.inf
                while process.poll() is None and time.monotonic() < deadline:
                    time.sleep(0.1)
                    shown()
                    if deadline == math.inf and (folder / FAILURE).is_file():
                        deadline = time.monotonic() + FAILED_SECONDS
            finally:
                end_process(process)
        _raise_failure(folder)
        if process.returncode:
            raise RunError(
                f"{number} processes of {task.function} ended {RESTARTS + 1} times before they had finished; where one "
                "is killed, memory is short as a rule: set fewer processes, or a smaller batch_size. The last words of "
                f"one:\n{_last_words(folder)}"
            )


@contextlib.contextmanager
def _shared_folder() -> Iterator[Path]:
    """A temporary folder for the task, the processes' logs and what went wrong; this process holds its lock.

    A process that is killed leaves its folder, with a lock that nobody holds any more: those are deleted first, but for
    one so young that its process may be about to lock it.
    """
    for left in Path(tempfile.gettempdir()).glob(f"{PREFIX}*/{LOCK}"):
        with contextlib.suppress(OSError, Timeout):  # another user's; at work
            if time.time() - left.stat().st_mtime > MEETING_SECONDS:
                with FileLock(left).acquire(timeout=0):
                    shutil.rmtree(left.parent)
    with tempfile.TemporaryDirectory(prefix=PREFIX) as name, FileLock(Path(name, LOCK)):
        yield Path(name)


def _write_task(path: Path, task: Task) -> None:
    with not_noting():  # the settings that the function reads are this stage's, not those that are handed over
        config = dump_config(task.config)
    places = {"folder": str(task.folder), "data_folder": str(task.data_folder)}
    own = {"parent": os.getpid(), "meeting_seconds": MEETING_SECONDS}
    files.write_json(path, {"function": task.function, "config": config, "arguments": task.arguments} | places | own)


def _environment(folder: Path, number: int) -> dict[str, str]:
    own = {
        # Without it torchrun would say that it sets it.
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or str(max(1, num_cores() // number)),
        "PYTHONPATH": files.python_path(),
        "PYTHONFAULTHANDLER": "1",
        PROGRESS_FILE: os.environ.get(PROGRESS_FILE, str(folder / "progress")),
    }
    return dict(os.environ) | own


@contextlib.contextmanager
def _shown_progress(folder: Path) -> Iterator[Any]:
    """A function that shows the first process's progress bar here, unless the runner shows it."""
    path, last = folder / "progress", ""

    def show() -> None:
        nonlocal last
        with contextlib.suppress(OSError, UnicodeDecodeError):  # no loop runs, or it is being written
            line = path.read_text(encoding="utf-8") if PROGRESS_FILE not in os.environ else last
            if line != last:
                sys.stderr.write(f"\r{line}")
                sys.stderr.flush()
                last = line

    yield show
    if last:
        sys.stderr.write("\n")


def end_process(process: subprocess.Popen[bytes]) -> None:
    """End a process, which ends those that it has started; kill it if it has not ended by itself after 45 s.

    torchrun gives its processes 30 s.
    """
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(timeout=45)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _raise_failure(folder: Path) -> None:
    path = folder / FAILURE
    if not path.is_file():
        return
    failure = json.loads(path.read_text(encoding="utf-8"))
    kinds = {kind.__name__: kind for kind in (*FINAL, *vars(errors).values()) if isinstance(kind, type)}
    raise kinds.get(failure["type"], RunError)(failure["message"])


def _last_words(folder: Path, lines: int = 12) -> str:
    """The end of what a process wrote before it ended, of the one that wrote last."""
    written = [path for path in (folder / "logs").rglob("std*.log") if path.stat().st_size]
    written = sorted(written, key=lambda path: path.stat().st_mtime) or [folder / "torchrun.log"]
    with written[-1].open(encoding="utf-8", errors="replace") as log:
        return "".join(deque(log, lines)).rstrip()

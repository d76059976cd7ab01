"""One of the processes that torchrun starts: joins the others and calls the function it was told to.

Called with a folder that holds the task, ``python -m smaflib.distributed.worker FOLDER``, by
:func:`smaflib.distributed.launch.run_in_processes` alone.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch.distributed as dist

from smaflib import pipeline
from smaflib.config import check_settings
from smaflib.config_reads import follow, recording_where_asked
from smaflib.distributed.launch import FAILURE, FINAL, TASK
from smaflib.errors import RunError
from smaflib.files import duration, write_json

TIMEOUT = datetime.timedelta(minutes=30)
"""How long a process waits for another one in a collective operation: one may refine its part of the masks later."""


def main(folder: Path) -> None:
    """Join the others and do the task.

    A failure that would come again is written down for the process that waits, and ends the task in every process.
    """
    if (folder / FAILURE).exists():  # torchrun starts the others again, too
        return
    task: dict[str, Any] = json.loads((folder / TASK).read_text(encoding="utf-8"))
    _leave_with(task["parent"], folder)
    try:
        with recording_where_asked():
            _do(task, folder)
    except FINAL as error:
        if not isinstance(error, ConnectionError):
            _write_failure(folder, error)
        raise
    finally:
        with contextlib.suppress(Exception):  # the others may be gone
            dist.destroy_process_group()


def _do(task: dict[str, Any], folder: Path) -> None:
    import yaml

    config = check_settings(yaml.safe_load(task["config"]))
    work = pipeline.Workspace(Path(task["folder"]), config, data_home=Path(task["data_folder"]))
    on_gpu = work.make_runtime().device.type == "cuda"
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    # A file of its own for each start: torchrun's store still holds the addresses of those that were there before.
    meeting = folder / f"meeting{os.environ['TORCHELASTIC_RESTART_COUNT']}"
    store = dist.FileStore(str(meeting), size)  # type: ignore[attr-defined]
    _meet(store, rank, size, task["meeting_seconds"])
    dist.init_process_group("nccl" if on_gpu else "gloo", store=store, timeout=TIMEOUT, rank=rank, world_size=size)
    follow(config)
    getattr(pipeline, task["function"])(work, **task["arguments"])
    dist.barrier()  # the first process writes what is common, and must not be ended before


def _meet(store: Any, rank: int, size: int, seconds: float) -> None:
    """Return once every process has put its name into a store of torch.distributed.

    Raises:
        RunError: naming those that have not come in time.
    """
    names = [f"rank {number}" for number in range(size)]
    store.set(names[rank], "is here")
    try:
        store.wait(names, datetime.timedelta(seconds=seconds))
    except RuntimeError as error:  # the time is over
        if not (absent := [name for name in names if not store.check([name])]):
            return
        raise RunError(
            f"{', '.join(absent)} of {size} processes did not come within {duration(seconds)}, before any work began; "
            "as a rule a driver or a file server hangs. Nothing was lost: once that is mended, the same command goes on"
        ) from error


def _write_failure(folder: Path, error: BaseException) -> None:
    if not (folder / FAILURE).exists():  # the first one says why the others failed
        known = next(kind for kind in type(error).__mro__ if kind.__module__ in ("builtins", "smaflib.errors"))
        write_json(folder / FAILURE, {"type": known.__name__, "message": str(error)})


def _leave_with(parent: int, folder: Path) -> None:
    """End this process once torchrun, or the process that started it, is gone."""
    torchrun = os.getppid()

    def watch() -> None:
        while os.getppid() == torchrun and _is_there(parent):
            time.sleep(0.5)
        with contextlib.suppress(OSError):  # so that torchrun, if it lives, starts nothing again
            write_json(folder / FAILURE, {"type": "RunError", "message": "the process that waited has ended"})
        os._exit(1)

    if os.name == "posix":
        threading.Thread(target=watch, daemon=True, name="leave_with_parent").start()


def _is_there(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


if __name__ == "__main__":
    main(Path(sys.argv[1]))

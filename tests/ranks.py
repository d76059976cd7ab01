"""What processes of :mod:`test_processes` do; a light module, since each of them imports it anew."""

from __future__ import annotations

import os
import time
from pathlib import Path

from smaflib.processes import barrier, rank


def end_second(folder: Path) -> None:
    (folder / f"{rank()}.{time.monotonic_ns()}").touch()
    if rank() == 1:
        raise OSError(28, "No space left on device")
    barrier()


def wait(folder: Path) -> None:
    (folder / f"{os.getpid()}.pid").touch()
    while True:
        time.sleep(1)

"""Settings of the whole test run."""

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from smaflib.explorer.state import Gallery

# One thread: sums in one order, and threads that wait for each other on busy cores take ten times as long.
torch.set_num_threads(1)

# A shell starts what goes to its background with interrupts ignored, and whatever that starts would ignore them, too.
signal.signal(signal.SIGINT, signal.default_int_handler)

# No deadline: the first call of a torch kernel is slow. In CI the examples are the same every time.
settings.register_profile("smaflib", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("smaflib")


@pytest.fixture(scope="session")
def pretrained() -> Gallery:
    """Three drawn images, the pretrained networks, and their maps, computed once; tests change copies."""
    return Gallery.pretrained(3)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder that is a disk of 32 MB, in memory; skips where this user may not mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    try:
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", str(folder)], capture_output=True, text=True
        )
    except FileNotFoundError:
        pytest.skip("there is no mount command here")
    if mounted.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)

"""Settings of the whole test run."""

import os
import signal

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

SLOWEST = ("test_notebooks", "test_presets", "test_processes", "test_in_lab", "test_installed", "test_segmentation")
"""Files that start first, so that no worker waits for one of them at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    names = {name: number for number, name in enumerate(SLOWEST)}
    items.sort(key=lambda item: names.get(item.path.stem, len(names)))


@pytest.fixture(scope="session")
def pretrained() -> Gallery:
    """Three drawn images, the pretrained networks, and their maps, computed once; tests change copies."""
    return Gallery.pretrained(3)

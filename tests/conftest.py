"""Settings of the whole test run."""

import copy
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from smaflib import plugins
from smaflib.apps.masks import make_masks
from smaflib.explorer.state import PHOTOS, Gallery, PhotoGallery

# One thread: sums in one order, and threads that wait for each other on busy cores take ten times as long.
torch.set_num_threads(1)

# A shell starts what goes to its background with interrupts ignored, and whatever that starts would ignore them, too.
signal.signal(signal.SIGINT, signal.default_int_handler)

# No deadline: the first call of a torch kernel is slow. In CI the examples are the same every time.
settings.register_profile("smaflib", deadline=None, max_examples=25, derandomize=bool(os.environ.get("CI")))
settings.load_profile("smaflib")

SLOWEST = ("test_notebooks", "test_in_lab", "test_processes", "test_presets", "test_installed", "test_runner")
"""Files that start first, so that no worker waits for one of them at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    names = {name: number for number, name in enumerate(SLOWEST)}
    items.sort(key=lambda item: names.get(item.path.stem, len(names)))


@pytest.fixture(scope="session")
def pretrained() -> Gallery:
    """Three drawn images, the pretrained networks, and their maps, computed once; tests change copies."""
    return Gallery.pretrained(3)


@pytest.fixture(scope="session")
def photo_maps() -> PhotoGallery:
    """Two photos, their classes, and the first one's maps, computed once; see ``photos``."""
    gallery = Gallery.photos([Path(str(resources.files("skimage"))) / "data" / name for name in PHOTOS[:2]])
    gallery.cams(0, "teacher", False)
    return gallery


@pytest.fixture
def photos(photo_maps: PhotoGallery) -> PhotoGallery:
    """A cat and a cup of coffee, to which a test may add photos and classes."""
    gallery = copy.copy(photo_maps)
    gallery.samples, gallery._cams, gallery._found = [*gallery.samples], {**gallery._cams}, {**gallery._found}
    gallery._classes = {index: [*classes] for index, classes in gallery._classes.items()}
    return gallery


@pytest.fixture(scope="session")
def masks_kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six photos, a table, and ``out`` with finished masks, made once; nobody changes this copy."""
    from test_custom_images import config_of

    folder = tmp_path_factory.mktemp("masks") / "work"
    make_masks(config_of(folder), folder / "out")
    return shutil.copytree(folder, folder.with_name("kept"))


@pytest.fixture
def masks_folder(masks_kept: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """That folder where it was made, as a later call finds it; whoever trains fails."""
    folder = masks_kept.with_name("work")
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(masks_kept, folder)
    monkeypatch.setattr("smaflib.apps.masks.train_teacher", lambda work: pytest.fail("trained"))
    return folder


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    """Settings of a run on two drawn images."""
    path = tmp_path / "tiny.yaml"
    path.write_text("data: {kind: mini, num_train: 2, num_val: 2}\n")
    return path


@pytest.fixture
def code_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The working directory, for modules of custom code, which are forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(plugins.FOLDERS, "")
    monkeypatch.setattr(sys, "path", [*sys.path])
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.startswith(("my_", "own_")):
            del sys.modules[name]

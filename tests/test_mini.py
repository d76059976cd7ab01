"""The mini data set: what makes it honest is stated as numbers here."""

import csv
import hashlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from minidata import dataset as mini
from minidata.dataset import CLASS_NAMES, VOID, Scene, draw_scene, make_mini
from smaflib.data.masks import VOC_PALETTE

SIZE = 128


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [draw_scene(seed=0, index=index, size=SIZE) for index in range(150)]


def files_below(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- the task ---------------------------------------------------------------------------------------------------------


def test_part_is_a_smallish_share_of_each_class(scenes: list[Scene]) -> None:
    shares: dict[str, list[float]] = {name: [] for name in CLASS_NAMES}
    for scene in scenes:
        for thing in scene.objects:
            shares[thing.class_name].append(thing.num_part_pixels / thing.num_pixels)
    for name, values in shares.items():
        assert len(values) > 20, name
        assert 0.15 < np.mean(values) < 0.36, name
        assert min(values) > 0.05, name


def test_saliency_is_as_good_as_a_detector_and_no_better(scenes: list[Scene]) -> None:
    hit = false = missed = 0
    for scene in scenes:
        known = scene.mask != VOID
        ground_truth, guess = (scene.mask > 0) & known, (scene.saliency > 127) & known
        hit += (ground_truth & guess).sum()
        false += (guess & ~ground_truth).sum()
        missed += (ground_truth & ~guess).sum()
    assert hit / (hit + false + missed) == pytest.approx(0.76, abs=0.035)
    assert hit / (hit + false) == pytest.approx(0.89, abs=0.04)
    assert hit / (hit + missed) == pytest.approx(0.83, abs=0.04)


# --- masks and labels -------------------------------------------------------------------------------------------------


def test_labels_and_objects_agree_with_the_mask(scenes: list[Scene]) -> None:
    for scene in scenes:
        pixels = Counter(scene.mask[(scene.mask > 0) & (scene.mask != VOID)].tolist())
        assert scene.class_names == tuple(CLASS_NAMES[index - 1] for index in sorted(pixels))
        counted: Counter[int] = Counter()
        for thing in scene.objects:
            counted[CLASS_NAMES.index(thing.class_name) + 1] += thing.num_pixels
            assert thing.extent >= 12 and thing.num_pixels >= 40 and thing.num_part_pixels >= 1
        assert counted == pixels


def test_void_lies_between_every_object_and_the_rest(scenes: list[Scene]) -> None:
    for scene in scenes:
        mask = scene.mask
        for one, other in (
            (mask[:, 1:], mask[:, :-1]),
            (mask[1:], mask[:-1]),
            (mask[1:, 1:], mask[:-1, :-1]),
            (mask[1:, :-1], mask[:-1, 1:]),
        ):
            assert not ((one != other) & (one != VOID) & (other != VOID)).any()


# --- determinism ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seed", "index", "size", "digest"),
    [(0, 0, 128, "3ed3277a30b9ba8b"), (0, 7, 128, "813a1bfd47404442"), (3, 11, 96, "ee1994c0af7ae360")],
)
def test_scenes_are_the_same_as_ever(seed: int, index: int, size: int, digest: str) -> None:
    """Results in docs/ are of these very pixels."""
    scene = draw_scene(seed, index, size)
    pixels = b"".join(part.tobytes() for part in (scene.image, scene.mask, scene.saliency))
    assert hashlib.sha256(pixels).hexdigest()[:16] == digest
    assert scene.image.shape == (size, size, 3) and scene.mask.shape == scene.saliency.shape == (size, size)


@pytest.mark.parametrize("wrong", [{"num_train": 0}, {"num_val": -1}, {"size": 63}, {"seed": -1}], ids=str)
def test_make_mini_refuses_nonsense_before_it_writes(tmp_path: Path, wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="no data set has"):
        make_mini(tmp_path / "deep" / "mini", **({"num_train": 1, "num_val": 1} | wrong))
    assert list(tmp_path.iterdir()) == []


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mini_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("mini") / "data" / "mini"
    make_mini(root, num_train=9, num_val=3, seed=4)
    return root


def test_files_hold_the_scenes(mini_root: Path) -> None:
    with (mini_root / "labels.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["image", "labels"] and len(rows) == 13
    lists = [mini_root / "ImageSets/Segmentation" / f"{split}.txt" for split in ("train", "val")]
    assert [len(path.read_text().splitlines()) for path in lists] == [9, 3]
    for index, (image, labels) in enumerate(rows[1:]):
        scene = draw_scene(seed=4, index=index)
        assert (image, labels) == (f"{index:06d}.jpg", ";".join(scene.class_names))
        mask = Image.open(mini_root / "SegmentationClass" / f"{index:06d}.png")
        assert mask.getpalette() == VOC_PALETTE.ravel().tolist() and np.array_equal(np.asarray(mask), scene.mask)
        saliency = Image.open(mini_root / "Saliency" / f"{index:06d}.png")
        assert saliency.mode == "L" and np.array_equal(np.asarray(saliency), scene.saliency)
        jpeg = np.asarray(Image.open(mini_root / "JPEGImages" / image)).astype(int)
        assert np.abs(jpeg - scene.image).mean() < 5  # noise is what JPEG loses; another scene is 40 away


def test_files_are_the_same_with_two_workers(mini_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Threads instead of processes: they start at once, and the work is divided alike.
    monkeypatch.setattr(mini, "ProcessPoolExecutor", lambda workers, mp_context: ThreadPoolExecutor(workers))
    seen = []

    def progress(iterable, *, total, desc):  # type: ignore[no-untyped-def]
        for item in iterable:
            seen.append((total, desc))
            yield item

    root = tmp_path / "mini"
    root.mkdir()  # an empty folder is taken
    make_mini(root, num_train=9, num_val=3, seed=4, num_workers=2, progress=progress)
    assert files_below(root) == files_below(mini_root)
    assert seen == [(12, "mini data set")] * 12
    assert [path.name for path in tmp_path.iterdir()] == ["mini"]


def test_existing_data_is_never_touched(tmp_path: Path) -> None:
    folder, file = tmp_path / "folder", tmp_path / "file"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    file.write_text("mine")
    for root in (folder, file):
        with pytest.raises(FileExistsError, match=f"{root.name} exists and is not an empty folder"):
            make_mini(root, 1, 0)
    assert files_below(tmp_path) == {"folder/notes.txt": b"mine", "file": b"mine"}

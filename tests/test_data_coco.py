"""The COCO layout: labels and masks from a JSON file of instances."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from smaflib.config import Config
from smaflib.data import Samples, load_samples, make_data
from smaflib.data.check import check_data
from smaflib.data.classes import COCO_CLASSES
from smaflib.errors import DataError

WIDTH, HEIGHT = 10, 8
CATEGORIES = [{"id": 1, "name": "person"}, {"id": 18, "name": "dog"}, {"id": 67, "name": "dining table"}]


def box(left: int, top: int, right: int, bottom: int) -> list[float]:
    """A rectangle of whole pixels as COCO's polygon."""
    return [left, top, right, top, right, bottom, left, bottom]


def instance(number: int, image: int, category: int, polygon: list[float], area: float) -> dict[str, Any]:
    fields = {"id": number, "image_id": image, "category_id": category, "area": area, "iscrowd": 0}
    return fields | {"segmentation": [polygon], "bbox": [0, 0, 1, 1]}


def run_lengths(mask: np.ndarray) -> dict[str, Any]:
    """COCO's uncompressed run lengths of a mask, column by column, zeros first."""
    counts, value = [0], 0
    for pixel in mask.flatten(order="F").tolist():
        if pixel != value:
            counts.append(0)
            value = pixel
        counts[-1] += 1
    return {"counts": counts, "size": list(mask.shape)}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Image 7: a table with a dog on it; 3: a crowd of persons; 5: nothing. One image for validation: a dog."""
    root = tmp_path / "coco"
    generator = np.random.default_rng(0)
    crowd = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    crowd[2:5, 1:4] = 1
    instances = [
        instance(1, 7, 18, box(3, 2, 6, 5), 9),  # the smaller one comes first in the file
        instance(2, 7, 67, box(1, 1, 9, 7), 48),
        instance(3, 3, 1, [], 9) | {"iscrowd": 1, "segmentation": run_lengths(crowd)},
    ]
    splits = {"train2014": ([7, 5, 3], instances), "val2014": ([9], [instance(4, 9, 18, box(0, 0, 5, 4), 20)])}
    (root / "annotations").mkdir(parents=True)
    for name, (numbers, objects) in splits.items():
        (root / name).mkdir()
        images = [{"id": n, "file_name": f"COCO_{name}_{n:012}.jpg", "width": WIDTH, "height": HEIGHT} for n in numbers]
        for facts in images:
            pixels = generator.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / str(facts["file_name"]))
        content = {"images": images, "annotations": objects, "categories": CATEGORIES}
        (root / "annotations" / f"instances_{name}.json").write_text(json.dumps(content))
    return root


def config(root: Path, **data: Any) -> Config:
    settings = {"kind": "coco", "root": root, "train_split": "train2014", "val_split": "val2014"}
    return Config.model_validate({"data": settings | data})


def load(root: Path, **data: Any) -> Samples:
    return load_samples(config(root, **data), "train")


def names_of(samples: Samples) -> list[list[str]]:
    return [[samples.class_names[number] for number in files.labels] for files in samples.files]


def test_labels_are_the_classes_of_the_instances_and_empty_images_are_left_out(root: Path) -> None:
    samples = load(root)
    assert samples.image_ids == ["COCO_train2014_000000000003", "COCO_train2014_000000000007"]
    assert names_of(samples) == [["person"], ["dog", "dining table"]]
    assert samples[1].image.shape == (3, HEIGHT, WIDTH) and samples[1].image_label.shape == (80,)
    assert names_of(load_samples(config(root), "val")) == [["dog"]]
    assert load(root, max_images=1).image_ids == ["COCO_train2014_000000000003"]


def test_masks_are_painted_large_instances_first(root: Path, tmp_path: Path) -> None:
    assert not load(root).has_ground_truth
    make_data(config(root), tmp_path / "run")
    samples = load_samples(config(root), "train", tmp_path / "run")
    crowd, table = [sample.mask for sample in samples.with_ground_truth()]
    assert crowd is not None and table is not None
    expected = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    expected[1:7, 1:9] = COCO_CLASSES.index("dining table") + 1
    expected[2:5, 3:6] = COCO_CLASSES.index("dog") + 1  # on the table, though it comes first in the file
    assert np.array_equal(table.numpy(), expected)
    assert int((crowd == 1).sum()) == 9 and bool((crowd[2:5, 1:4] == 1).all())
    assert load_samples(config(root), "val", tmp_path / "run").has_ground_truth


@pytest.mark.parametrize("text", ["[1, 2]", '{"images": [', ""])
def test_damaged_file_of_instances_is_named(root: Path, text: str) -> None:
    (root / "annotations/instances_train2014.json").write_text(text)
    with pytest.raises(DataError, match="train2014.json is no complete file of COCO instances"):
        load(root)


def test_what_is_missing_is_named(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"no file .*instances_train2017\.json; unpack the annotations .*train2014"):
        load(root, train_split="train2017")
    (tmp_path / "saliency").mkdir()
    with pytest.raises(DataError, match="no saliency map in .*saliency for COCO_train2014_000000000007"):
        load(root, saliency=tmp_path / "saliency", class_names=["dog"])
    (root / "train2014/COCO_train2014_000000000003.jpg").unlink()
    with pytest.raises(DataError, match=r"no image in .*train2014 for .*0003.* \(1 of 2 missing\); unpack train2014"):
        load(root)
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    with pytest.raises(DataError, match="need pycocotools; install it: pip install pycocotools"):
        make_data(config(root), tmp_path / "run")


def change(root: Path, **parts: Any) -> None:
    """Replace parts of the file of the training split."""
    file = root / "annotations/instances_train2014.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | parts))


DOG = instance(1, 7, 18, box(3, 2, 6, 5), 9)
NO_OUTLINE: list[Any] = [
    {},
    None,
    [],
]


@pytest.mark.parametrize("outline", NO_OUTLINE, ids=str)
def test_instance_without_an_outline_counts_and_its_image_gets_no_mask(
    root: Path, tmp_path: Path, outline: object
) -> None:
    person, table = instance(2, 3, 1, box(1, 1, 9, 7), 48), instance(3, 7, 67, box(1, 1, 9, 7), 48)
    change(
        root, annotations=[person, table, DOG | {"segmentation": outline} if outline != {} else no_segmentation(DOG)]
    )
    assert names_of(load(root)) == [["person"], ["dog", "dining table"]]
    make_data(config(root), tmp_path / "run")
    samples = load_samples(config(root), "train", tmp_path / "run")
    assert [files.mask is not None for files in samples.files] == [True, False]
    assert samples.annotated.image_ids == ["COCO_train2014_000000000003"]
    assert not check_data(config(root))[1]
    assert not list((tmp_path / "run").rglob("*7.png"))


def no_segmentation(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name != "segmentation"}


@pytest.mark.parametrize(
    ("parts", "settings", "words"),
    [
        ({}, {"class_names": ["Dining Table"]}, r"no category 'Dining Table' \(did you mean 'dining table'\?\)"),
        ({}, {"class_names": ["dog", "diningtable"]}, r"no category 'diningtable' \(did you mean 'dining table'\?\)"),
        (
            {"categories": [{"id": 1, "name": "tv"}, {"id": 18, "name": "dog"}]},
            {"class_names": ["dog", "tvmonitor"]},
            r"no category 'tvmonitor' \(did you mean 'tv'\?\)",
        ),
        ({"categories": [{"id": 18, "name": "cell"}]}, {}, r"categories that are not COCO's, such as 'cell'; set data"),
        ({"annotations": None}, {}, "no complete file of COCO instances"),
        ({"annotations": []}, {}, "train2014 has no image of person, "),
        ({"images": [{"id": 7}]}, {}, r"no complete file of COCO instances \(KeyError\('file_name'\)"),
    ],
)
def test_what_fits_no_class_or_image_is_refused(
    root: Path, parts: dict[str, Any], settings: dict[str, Any], words: str
) -> None:
    change(root, **parts)
    with pytest.raises(DataError, match=words):
        load(root, **settings)


@pytest.mark.parametrize("other", ["a.png", "A.jpg", "sub/a.jpg", "a.jpg"])
def test_two_images_of_one_id_are_refused(root: Path, other: str) -> None:
    size = {"width": WIDTH, "height": HEIGHT}
    for name in ("a.jpg", "a.png", "A.jpg"):
        Image.new("RGB", (WIDTH, HEIGHT)).save(root / "train2014" / name)
    images = [{"id": 7, "file_name": "a.jpg"} | size, {"id": 8, "file_name": other} | size]
    change(root, images=images, annotations=[DOG])
    assert load(root)[0].image_id == "a"  # only one of them is in use
    change(root, annotations=[DOG, DOG | {"id": 2, "image_id": 8}])
    with pytest.raises(DataError, match=rf"a\.jpg and {other} would share the mask [aA]\.png; rename one"):
        load(root)

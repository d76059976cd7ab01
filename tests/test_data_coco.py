"""The COCO layout: labels and masks from a JSON file of instances."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from smaflib.config import Config
from smaflib.data import Samples, load_samples, make_data
from smaflib.data.classes import COCO_CLASSES
from smaflib.data.coco import read_instances
from smaflib.data.masks import read_mask
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


def test_classes_are_cocos_80() -> None:
    assert len(set(COCO_CLASSES)) == 80
    assert (COCO_CLASSES[0], COCO_CLASSES[16], COCO_CLASSES[79]) == ("person", "dog", "toothbrush")


def test_labels_are_the_classes_of_the_instances_and_empty_images_are_left_out(root: Path) -> None:
    samples = load(root)
    assert samples.image_ids == ["COCO_train2014_000000000003", "COCO_train2014_000000000007"]
    assert names_of(samples) == [["person"], ["dog", "dining table"]]
    assert samples[1].image.shape == (3, HEIGHT, WIDTH) and samples[1].image_label.shape == (80,)
    assert names_of(load_samples(config(root), "val")) == [["dog"]]
    assert load(root, max_images=1).image_ids == ["COCO_train2014_000000000003"]


def test_some_classes_only(root: Path) -> None:
    samples = load(root, class_names=["dog"])
    assert samples.image_ids == ["COCO_train2014_000000000007"] and names_of(samples) == [["dog"]]
    with pytest.raises(DataError, match="has no image of bird; check data.class_names"):
        load(root, class_names=["bird"])


def test_masks_are_painted_large_instances_first(root: Path, tmp_path: Path) -> None:
    assert not load(root).has_ground_truth
    make_data(config(root), tmp_path / "run")
    samples = load_samples(config(root), "train", tmp_path / "run")
    crowd, table = [sample.mask for sample in samples.with_masks()]
    assert crowd is not None and table is not None
    expected = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    expected[1:7, 1:9] = COCO_CLASSES.index("dining table") + 1
    expected[2:5, 3:6] = COCO_CLASSES.index("dog") + 1  # on the table, though it comes first in the file
    assert np.array_equal(table.numpy(), expected)
    assert int((crowd == 1).sum()) == 9 and bool((crowd[2:5, 1:4] == 1).all())
    assert load_samples(config(root), "val", tmp_path / "run").has_ground_truth


def test_masks_of_the_config_are_used_instead(root: Path, tmp_path: Path) -> None:
    make_data(config(root), tmp_path / "run")
    folder = tmp_path / "run" / "data" / "train2014"
    make_data(config(root, masks=folder), tmp_path / "other")
    assert not (tmp_path / "other").exists()
    assert load(root, masks=folder).has_ground_truth
    with pytest.raises(DataError, match="data.masks"):
        load(root, masks=tmp_path / "no_such_folder")


def test_masks_hold_the_chosen_classes_only(root: Path, tmp_path: Path) -> None:
    make_data(config(root, class_names=["dog"]), tmp_path)
    mask = read_mask(tmp_path / "data/train2014/COCO_train2014_000000000007.png")
    assert mask.unique().tolist() == [0, 1] and int((mask == 1).sum()) == 9


def test_killed_painting_goes_on_with_what_is_missing(root: Path, tmp_path: Path) -> None:
    make_data(config(root), tmp_path)
    first, second = sorted((tmp_path / "data/train2014").iterdir())
    times = second.stat().st_mtime_ns
    whole = first.read_bytes()
    first.unlink()
    make_data(config(root), tmp_path)
    assert first.read_bytes() == whole and second.stat().st_mtime_ns == times


@pytest.mark.parametrize("name", ["../secret.jpg", "/etc/passwd", "", "a\\b.jpg", "n" * 300])
def test_file_name_that_leads_elsewhere_is_refused(root: Path, name: str) -> None:
    path = root / "annotations" / "instances_train2014.json"
    content = json.loads(path.read_text())
    for image in content["images"]:
        image["file_name"] = name
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match="no plain file name") as caught:
        load(root)
    assert len(str(caught.value)) < 600


def test_what_is_missing_is_named(root: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no file .*instances_train2017\.json; unpack the annotations .*train2014"):
        load(root, train_split="train2017")
    (root / "train2014/COCO_train2014_000000000003.jpg").unlink()
    with pytest.raises(DataError, match=r"no image .*0003\.jpg, which .*instances_train2014\.json lists; unpack train"):
        load(root)
    path = root / "annotations/instances_val2014.json"
    path.write_text(path.read_text()[:50])
    with pytest.raises(DataError, match=r"instances_val2014\.json is no complete file of COCO instances"):
        load_samples(config(root), "val")
    path.write_text("[1, 2]")
    with pytest.raises(DataError, match="is no complete file of COCO instances"):
        load_samples(config(root), "val")
    with pytest.raises(DataError, match="there is no saliency map COCO_train2014_000000000007.png"):
        (tmp_path / "saliency").mkdir()
        load(root, saliency=tmp_path / "saliency", class_names=["dog"])


def test_root_must_be_set() -> None:
    with pytest.raises(ValueError, match="the folder that holds annotations/ and the folders of images"):
        Config.model_validate({"data": {"kind": "coco"}})


def damaged(root: Path, path: str, value: Any, name: str = "train2014") -> Path:
    """A file of instances with one value, such as ``images.0.height``, replaced; ``...`` takes it out."""
    file = root / "annotations" / f"instances_{name}.json"
    content = json.loads(file.read_text())
    *parents, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    node = content
    for part in parents:
        node = node[part]
    if value is ...:
        del node[last]
    else:
        node[last] = value
    file.write_text(json.dumps(content))
    return file


@pytest.mark.parametrize("value", [..., None, "7", 1.5, True, -1, [7], {}, 10**30])
@pytest.mark.parametrize(
    "path",
    ["images.0.id", "images.1.height", "images.0.width", "categories.0.id", "annotations.0.image_id"]
    + ["annotations.2.category_id", "annotations.1.id"],
)
def test_damaged_numbers_are_named(root: Path, path: str, value: object) -> None:
    file = damaged(root, path, value)
    with pytest.raises(DataError) as caught:
        load(root)
    message = str(caught.value)
    assert str(file) in message and path in message and "unpack it again" in message and len(message) < 600


LISTS, NAMES = ["images", "categories", "annotations"], ["images.0.file_name", "categories.1.name"]


@pytest.mark.parametrize(
    ("path", "value"),
    [(path, value) for path in LISTS + NAMES for value in (..., None, 7, {})] + [(path, []) for path in NAMES],
)
def test_damaged_lists_and_names_are_named(root: Path, path: str, value: object) -> None:
    file = damaged(root, path, value)
    with pytest.raises(DataError) as caught:
        load(root)
    assert str(file) in str(caught.value) and path in str(caught.value)


@pytest.mark.parametrize("path", ["images.0.height", "images.0.width"])
@pytest.mark.parametrize("value", [0, 65_501, 1_000_000_000])
def test_impossible_sizes_are_refused(root: Path, path: str, value: int) -> None:
    damaged(root, path, value)
    with pytest.raises(DataError, match=path):
        load(root)


@pytest.mark.parametrize("kind", ["images", "categories"])
def test_ids_given_twice_are_refused(root: Path, kind: str) -> None:
    damaged(root, f"{kind}.1.id", json.loads(damaged(root, f"{kind}.1.id", 7).read_text())[kind][0]["id"])
    with pytest.raises(DataError, match=f"gives an id of its {kind} twice"):
        load(root)


OUTLINES: list[object] = [
    ...,
    None,
    [],
    [[]],
    [[1.0, 1.0, 2.0, 2.0]],
    [["a"] * 6],
    [[float("inf")] * 6],
    {"counts": [5, 5], "size": [HEIGHT, WIDTH]},
    {"counts": [80], "size": [WIDTH, HEIGHT]},
    {"counts": [-1, 81], "size": [HEIGHT, WIDTH]},
    {"counts": "no runs at all", "size": [HEIGHT, WIDTH]},
    {"counts": "", "size": [HEIGHT, WIDTH]},
    {"counts": "PP", "size": [9, 9]},
    {"counts": [80]},
    {"size": [HEIGHT, WIDTH]},
    7,
]


def test_file_that_does_not_fit_the_memory_is_refused_before_it_is_read(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = root / "annotations" / "instances_train2014.json"
    size = path.stat().st_size
    monkeypatch.setattr("smaflib.data.coco.memory_of", lambda device: 10 * size)
    assert len(read_instances(root, "train2014").instances) == 3  # labels take less than outlines
    with pytest.raises(DataError, match=f"{path} has 0 MB; .* this machine has 0.0 GB; take a machine with more"):
        read_instances(root, "train2014", outlines=True)


@pytest.mark.parametrize("outline", OUTLINES, ids=str)
def test_outlines_that_do_not_fit_are_refused_before_a_mask_of_theirs_is_written(
    root: Path, tmp_path: Path, outline: object
) -> None:
    file = damaged(root, "annotations.0.segmentation", outline)
    assert len(load(root)) == 2  # labels need no outlines
    with pytest.raises(DataError) as caught:
        make_data(config(root), tmp_path / "run")
    assert str(file) in str(caught.value) and len(str(caught.value)) < 600
    assert not (tmp_path / "run/data/train2014/COCO_train2014_000000000007.png").exists()


@pytest.mark.parametrize("area", [..., None, "9", -1, float("nan")])
def test_areas_that_are_no_numbers_are_refused(root: Path, tmp_path: Path, area: object) -> None:
    damaged(root, "annotations.0.area", area)
    with pytest.raises(DataError, match=r"annotations\.0\.area"):
        make_data(config(root), tmp_path / "run")


def test_nested_json_is_no_end_of_the_program(root: Path) -> None:
    (root / "annotations/instances_train2014.json").write_text("[" * 100_000)
    with pytest.raises(DataError, match="is no complete file of COCO instances"):
        load(root)

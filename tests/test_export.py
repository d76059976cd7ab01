"""`smaf export`: what other programs read from the files equals the masks."""

from __future__ import annotations

import json
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from PIL import Image, ImageDraw
from pycocotools import mask as coco_masks
from pycocotools.coco import COCO
from scipy.ndimage import binary_dilation, binary_erosion
from skimage.draw import polygon2mask
from typer.testing import CliRunner

from smaflib.apps.cli import app
from smaflib.apps.export import export_masks
from smaflib.config import check_settings, dump_config
from smaflib.data.masks import save_mask
from smaflib.errors import ConfigError, DataError, RunError

NAMES = ["cat", 'dög & "b"']  # alphabetical, as masks count them
FORMS = ("coco", "labelme", "yolo", "cvat", "png")
RING = np.array([[1, 1, 1, 0], [1, 0, 1, 255], [1, 1, 1, 2]], dtype=np.uint8)


def make_folder(folder: Path, masks: list[np.ndarray]) -> Path:
    """What `smaf masks` leaves: masks of the photos 0.png, 1.png, ..., and the settings."""
    (folder / "photos").mkdir(parents=True)
    for number, mask in enumerate(masks):
        Image.new("RGB", mask.shape[::-1]).save(folder / "photos" / f"{number}.png")
        save_mask(folder / "out" / "masks" / f"{number}.png", mask)
    rows = [f"{number}.png,{';'.join(NAMES)}\n" for number in range(len(masks))]
    (folder / "labels.csv").write_text("".join(["image,labels\n", *rows]), encoding="utf-8")
    data = {"kind": "folder", "images": folder / "photos", "labels": folder / "labels.csv"}
    (folder / "out" / "config.yaml").write_text(dump_config(check_settings({"data": data})), encoding="utf-8")
    return folder / "out"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_folder(tmp_path, [RING, np.zeros((2, 5), dtype=np.uint8)])


def differs_at_the_border_only(read: np.ndarray, exact: np.ndarray) -> bool:
    near = np.ones((3, 3))
    grown, shrunk = binary_dilation(exact, near), binary_erosion(exact, near, border_value=1)
    return not (read & ~grown).any() and not (shrunk & ~read).any()


def coco(out: Path, masks: list[np.ndarray]) -> Iterator[tuple[int, int, np.ndarray]]:
    """Photo, mask value and pixels of each object, as pycocotools reads them."""
    exact, drawn = COCO(out / "instances.json"), COCO(out / "polygons.json")
    assert [each["name"] for each in exact.loadCats(exact.getCatIds())] == NAMES
    for each in exact.loadAnns(exact.getAnnIds()):
        runs = exact.annToRLE(each)
        pixels = exact.annToMask(each).astype(bool)
        assert each["area"] == coco_masks.area(runs) and each["bbox"] == coco_masks.toBbox(runs).tolist()
        assert differs_at_the_border_only(drawn.annToMask(drawn.anns[each["id"]]).astype(bool), pixels)
        photo = exact.imgs[each["image_id"]]
        number = int(photo["file_name"].removesuffix(".png"))
        assert (photo["height"], photo["width"]) == masks[number].shape
        yield number, each["category_id"], pixels


def filled(points: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """A polygon's pixels by scikit-image; Pillow, which LabelMe uses, may only add or lose pixels at the border."""
    pixels = polygon2mask(shape, points[:, ::-1] - 0.5)
    picture = Image.new("1", shape[::-1])
    ImageDraw.Draw(picture).polygon([tuple(point) for point in points.tolist()], fill=1, outline=1)
    assert differs_at_the_border_only(np.array(picture), pixels)
    return pixels


def labelme(out: Path, masks: list[np.ndarray]) -> Iterator[tuple[int, int, np.ndarray]]:
    for number, mask in enumerate(masks):
        content = json.loads((out / f"{number}.json").read_text())
        with Image.open(out / content["imagePath"]) as photo:
            assert photo.size == (content["imageWidth"], content["imageHeight"]) == mask.shape[::-1]
        objects: dict[Any, np.ndarray] = {}
        for shape in content["shapes"]:
            key = shape["group_id"], NAMES.index(shape["label"]) + 1
            objects[key] = objects.get(key, False) | filled(np.array(shape["points"]), mask.shape)
        yield from ((number, value, pixels) for (_, value), pixels in objects.items())


def yolo(out: Path, masks: list[np.ndarray]) -> Iterator[tuple[int, int, np.ndarray]]:
    content = yaml.safe_load((out / "data.yaml").read_text())
    assert content == {"train": "images", "val": "images", "names": NAMES}
    for number, mask in enumerate(masks):
        assert (out / "images" / f"{number}.png").is_file()
        for line in (out / "labels" / f"{number}.txt").read_text().splitlines():
            value, *points = line.split()
            relative = np.array(points, dtype=float).reshape(-1, 2)
            assert relative.min() >= 0 and relative.max() <= 1
            yield number, int(value) + 1, filled(relative * mask.shape[::-1], mask.shape)


def cvat(out: Path, masks: list[np.ndarray]) -> Iterator[tuple[int, int, np.ndarray]]:
    root = ElementTree.parse(out / "annotations.xml").getroot()
    assert [name.text for name in root.findall("meta/task/labels/label/name")] == NAMES
    for image, mask in zip(root.findall("image"), masks, strict=True):
        assert (int(image.attrib["height"]), int(image.attrib["width"])) == mask.shape
        for each in image:
            left, top, width, height = (int(each.attrib[name]) for name in ("left", "top", "width", "height"))
            counts = [int(count) for count in each.attrib["rle"].split(",")]
            pixels = np.zeros(mask.shape, dtype=bool)
            box = np.repeat(np.arange(len(counts)) % 2 == 1, counts).reshape(height, width)
            pixels[top : top + height, left : left + width] = box
            yield int(image.attrib["id"]), NAMES.index(each.attrib["label"]) + 1, pixels


READERS = {"coco": coco, "labelme": labelme, "yolo": yolo, "cvat": cvat}
MASKS = arrays(np.uint8, array_shapes(min_dims=2, max_dims=2, max_side=9), elements=st.sampled_from([0, 1, 1, 2, 255]))


@settings(max_examples=6)
@given(st.lists(MASKS, min_size=3, max_size=8), st.sampled_from(["part", "class"]))
def test_other_programs_read_the_same_masks(masks: list[np.ndarray], per: str) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder, counts = make_folder(Path(temporary), masks), set()
        for form, read in READERS.items():
            if (form, per) == ("yolo", "class"):
                continue
            export_masks(folder, form, Path(temporary, form), per)
            found = [np.zeros_like(mask) for mask in masks]
            objects = list(read(Path(temporary, form), masks))
            for number, value, pixels in objects:
                assert pixels.any() and not found[number][pixels].any()  # objects do not overlap
                found[number][pixels] = value
            for mask, again in zip(masks, found, strict=True):
                np.testing.assert_array_equal(again, np.where(mask == 255, 0, mask))
            counts.add(len(objects))
        assert len(counts) == 1
        export_masks(folder, "png", Path(temporary, "png"))
        for number, mask in enumerate(masks):
            with Image.open(Path(temporary, "png", f"{number}.png")) as picture:
                assert picture.mode == "L"
                np.testing.assert_array_equal(np.array(picture), mask)


def test_a_ring_and_a_pixel_worked_out_by_hand(folder: Path, tmp_path: Path) -> None:
    for form in FORMS:
        export_masks(folder, form, tmp_path / "new" / form)
    ring, pixel = json.loads((tmp_path / "new/coco/instances.json").read_text())["annotations"]
    assert ring["segmentation"] == {"size": [3, 4], "counts": [0, 4, 1, 4, 3]}  # column by column
    assert (ring["bbox"], ring["area"], ring["category_id"]) == ([0, 0, 3, 3], 8, 1)
    assert (pixel["segmentation"]["counts"], pixel["bbox"], pixel["category_id"]) == ([11, 1], [3, 2, 1, 1], 2)
    masks = ElementTree.parse(tmp_path / "new/cvat/annotations.xml").findall("image/mask")
    assert [each.attrib["rle"] for each in masks] == ["0, 4, 1, 4", "0, 1"]  # row by row
    # The middles of the pixel's four edges, in shares of width and height.
    number, *points = (tmp_path / "new/yolo/labels/0.txt").read_text().splitlines()[1].split()
    corners = {(0.75, 0.833333), (0.875, 0.666667), (1.0, 0.833333), (0.875, 1.0)}
    assert number == "1" and set(zip(map(float, points[::2]), map(float, points[1::2]), strict=True)) == corners
    assert (tmp_path / "new/yolo/labels/1.txt").read_text() == ""
    rows = (tmp_path / "new/png/labelmap.txt").read_text(encoding="utf-8").splitlines()
    assert rows[1:] == ["background:0,0,0::", f"{NAMES[0]}:1,1,1::", f"{NAMES[1]}:2,2,2::"]
    assert {path.name for path in (tmp_path / "new").iterdir()} == set(FORMS)


def test_unfinished_masks_are_not_exported(folder: Path, tmp_path: Path) -> None:
    (folder / "masks/1.png").unlink()
    with pytest.raises(RunError, match=r"no masks yet of 1 \(1 of 2\); give the same smaf masks command again"):
        export_masks(folder, "coco", tmp_path / "new")


def test_masks_keep_their_class_names_when_labels_change(folder: Path, tmp_path: Path) -> None:
    save_mask(folder / "corrected" / "0.png", RING)
    (folder / "made.json").write_text(json.dumps({"learned": {"class_names": NAMES}}))
    (tmp_path / "labels.csv").write_text("image,labels\n0.png,ape\n1.png,cat\n")
    export_masks(folder, "coco", tmp_path / "new")
    names = [each["name"] for each in json.loads((tmp_path / "new/instances.json").read_text())["categories"]]
    assert names == [*NAMES, "ape"]


def test_folders_that_hold_other_things_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="photos exists; choose another --out"):
        export_masks(folder, "labelme", tmp_path / "photos")
    with pytest.raises(ConfigError, match="has no config.yaml; give the folder that smaf masks --out wrote"):
        export_masks(tmp_path / "photos", "coco", tmp_path / "new")
    with pytest.raises(ConfigError, match="leave out --per class"):
        export_masks(folder, "yolo", tmp_path / "new", per="class")


@pytest.mark.parametrize("form", FORMS)
def test_a_damaged_mask_leaves_nothing_half_written(form: str, folder: Path, tmp_path: Path) -> None:
    before = {path.name for path in tmp_path.iterdir()}
    save_mask(folder / "masks/1.png", np.full((2, 5), 3, dtype=np.uint8))
    with pytest.raises(DataError, match=r"1\.png holds the value 3"):
        export_masks(folder, form, tmp_path / "new")
    assert {path.name for path in tmp_path.iterdir()} == before


def test_the_command_leaves_out_small_objects(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["export", "out", "--format", "coco", "--out", "new", "--per", "class", "--min-pixels", "2"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0 and "coco: new" in done.output
    assert [each["area"] for each in json.loads(Path("new/instances.json").read_text())["annotations"]] == [8]

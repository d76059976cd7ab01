"""The VOC layout loader, and reading one sample."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from smaflib.config import Config
from smaflib.data import Samples, load_samples
from smaflib.data.check import check_data
from smaflib.data.masks import save_mask
from smaflib.data.voc import open_image, read_image
from smaflib.errors import DataError

CLASSES = ("cat", "dog", "sofa")
WIDTH, HEIGHT = 12, 8
LISTS, CSV = "ImageSets/Segmentation/train.txt", {"label_source": "csv", "labels": "labels.csv"}


def annotation(*names: str) -> str:
    objects = "".join(f"<object><name>{name}</name><difficult>0</difficult></object>" for name in names)
    return f"<annotation><filename>a.jpg</filename>{objects}</annotation>"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Three training images and one for validation: a is a cat, b a dog on a sofa, c and d are sofas."""
    root = tmp_path / "voc"
    for folder in ("JPEGImages", "Annotations", "ImageSets/Segmentation", "SegmentationClass", "Saliency"):
        (root / folder).mkdir(parents=True)
    generator = np.random.default_rng(0)
    for name, labels in {"a": ["cat"], "b": ["sofa", "dog"], "c": ["sofa"], "d": ["sofa"]}.items():
        pixels = generator.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / "JPEGImages" / f"{name}.jpg")
        (root / "Annotations" / f"{name}.xml").write_text(annotation(*labels))
        mask = np.zeros((HEIGHT, WIDTH), np.uint8)
        mask[2:4] = 255
        for row, label in enumerate(labels, start=4):
            mask[row] = CLASSES.index(label) + 1
        save_mask(root / "SegmentationClass" / f"{name}.png", mask)
        Image.fromarray(np.where(mask > 0, 255, 51).astype(np.uint8)).save(root / "Saliency" / f"{name}.png")
    (root / "ImageSets/Segmentation/train.txt").write_text("a\nb\nc\n")
    (root / "ImageSets/Segmentation/val.txt").write_text("d\n")
    (root / "labels.csv").write_text("image,labels\na,cat\nb.jpg,dog;sofa\nc,sofa\nd,sofa\n")
    return root


def config(root: Path, **data: Any) -> Config:
    return Config.model_validate({"data": {"kind": "voc", "root": root, "class_names": CLASSES, **data}})


def load(root: Path, **data: Any) -> Samples:
    return load_samples(config(root, **data), "train")


def test_sample_has_the_documented_shapes_and_ranges(root: Path) -> None:
    sample = load(root, saliency="Saliency").with_ground_truth().with_saliency()[1]
    assert sample.image_id == "b"
    assert sample.image.shape == (3, HEIGHT, WIDTH) and sample.image.dtype == torch.uint8
    assert sample.image_label.tolist() == [0, 1, 1] and sample.image_label.dtype == torch.float32
    assert sample.mask is not None and sample.saliency is not None
    assert sample.mask.shape == (HEIGHT, WIDTH) and sample.mask.unique().tolist() == [0, 2, 3, 255]
    assert sample.saliency.shape == (HEIGHT, WIDTH) and sample.saliency.dtype == torch.float32
    assert sample.saliency.unique().tolist() == pytest.approx([0.2, 1.0])


@pytest.mark.parametrize(
    ("listed", "image_ids"),
    [
        ("/JPEGImages/c.jpg /SegmentationClassAug/c.png\n/JPEGImages/b.jpg /SegmentationClassAug/a.png", ["c", "b"]),
        ("c.jpg\nb.JPG\na.png", ["c", "b", "a"]),  # all three are .jpg
        ("JPEGImages\\c\r\nD:\\photos\\b.jpg\r\n", ["c", "b"]),
        ("c  1\na -1\nb 0\n", ["c", "a", "b"]),  # ImageSets/Main
        ("my cat\nmy dog.jpeg\nmy cat 1\n", ["my cat", "my dog", "my cat 1"]),
        ("x/my cat.jpg x/a.png\nmy dog 1\n", ["my cat", "my dog"]),
        ("a\na\n", ["a"]),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_list_is_read_as_meant(root: Path, listed: str, image_ids: list[str], encoding: str) -> None:
    for name in ("my cat.jpg", "my dog.png", "my cat 1.jpeg"):
        Image.new("RGB", (WIDTH, HEIGHT)).save(root / "JPEGImages" / name)
        (root / "Annotations" / f"{Path(name).stem}.xml").write_text(annotation("cat"))
    (root / LISTS).write_text(listed, encoding=encoding)
    samples = load(root)
    assert samples.image_ids == image_ids and len(list(samples)) == len(image_ids)


@pytest.mark.parametrize(
    ("listed", "words"),
    [
        ("a b\n", r"no image in .*JPEGImages for a b "),
        ("a\nx/b.jpg\ny/b.jpg\n", r"b\.jpg and y/b\.jpg would share the mask b\.png; rename one, or correct the list"),
        ("C.jpg\nc.jpg\n", r"C\.jpg and c\.jpg would share the mask c\.png"),
        ("b\nC\n", r"no image in .* for C \(did you mean 'c'\?\) \(1 of 2"),
    ],
)
def test_row_that_means_no_image_or_the_same_is_refused(root: Path, listed: str, words: str) -> None:
    Image.new("RGB", (WIDTH, HEIGHT)).save(root / "JPEGImages/C.jpg")
    Image.new("RGB", (WIDTH, HEIGHT)).save(root / "JPEGImages/C.png")
    (root / LISTS).write_text(listed)
    with pytest.raises(DataError, match=words):
        load(root)


def test_class_name_that_no_xml_has_is_refused_with_the_nearest(root: Path) -> None:
    (root / "Annotations/b.xml").write_text(annotation("sofa", "dining table"))
    with pytest.raises(DataError, match=r"'Dining-Table' \(did you mean 'dining table'\?\); they have dining table"):
        load(root, class_names=("cat", "sofa", "Dining-Table"))
    assert load(root, class_names=("cat", "sofa", "Dining-Table"), max_images=1).image_ids == ["a"]
    assert load(root, class_names=("cat", "sofa", "bird")).image_labels.sum(dim=0).tolist() == [1, 2, 0]
    assert load(root, class_names=()).class_names[14] == "person"
    (root / "Annotations/b.xml").write_text(annotation("sofa", "dog"))
    assert len(load(root, class_names=("cat", "dog", "sofa", "zebra"))) == 3  # no object is without a class


def test_difficult_objects_count_and_parts_and_unknown_classes_do_not(root: Path) -> None:
    (root / "Annotations/a.xml").write_text(
        "<annotation><object><name>dog</name><difficult>1</difficult><part><name>cat</name></part></object>"
        "<object><name>unicorn</name></object></annotation>"
    )
    assert load(root)[0].image_label.tolist() == [0, 1, 0]


def test_masks_folder_can_be_chosen(root: Path) -> None:
    (root / "SegmentationClass").rename(root / "SegmentationClassAug")
    assert load(root, masks="SegmentationClassAug").has_ground_truth
    assert load(root, masks=root / "SegmentationClassAug").has_ground_truth
    assert not load(root).has_ground_truth
    with pytest.raises(DataError, match=r"there is no folder .*Other; correct data\.masks"):
        load(root, masks="Other")


def test_orientation_flag_does_not_turn_voc_images(root: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # a viewer turns the picture by a quarter
    Image.new("RGB", (WIDTH, HEIGHT)).save(root / "JPEGImages/a.jpg", exif=exif)
    assert load(root).with_ground_truth()[0].image.shape == (3, HEIGHT, WIDTH)


def test_saliency_must_be_there_for_training_images_only(root: Path) -> None:
    (root / "Saliency/d.png").unlink()
    assert load_samples(config(root, saliency="Saliency"), "val").with_saliency()[0].saliency is None
    (root / "Saliency/b.png").unlink()
    with pytest.raises(DataError, match=r"no saliency map in .*Saliency for b \(1 of 3 missing\)"):
        load(root, saliency="Saliency")


def save(root: Path, path: str, content: object) -> None:
    """A file of text, bytes, a mask (array) or a picture; None deletes it."""
    file = root / path
    if content is None:
        file.rename(root / "gone")
    elif isinstance(content, np.ndarray):
        save_mask(file, content)
    elif isinstance(content, Image.Image):
        content.save(file)
    else:
        file.write_bytes(content if isinstance(content, bytes) else str(content).encode())


STRUCTURE: list[tuple[str, object, dict[str, Any], str]] = [
    ("JPEGImages", None, {}, r"there is no folder .*JPEGImages; set data\.root"),
    (LISTS, None, {}, r"no split list .*train\.txt; data\.train_split and data\.val_split can be: val"),
    (LISTS, "a\nbb\n", {}, r"no image in .*JPEGImages for bb \(did you mean 'b'\?\) \(1 of 2 missing\); .*train\.txt"),
    ("Annotations/b.xml", None, {}, r"b\.xml cannot be read \(.*No such file.*; add it, or set"),
    ("Annotations/b.xml", "<annotation><object>", {}, r"b\.xml cannot be read \(no element"),
    ("labels.csv", "image,labels\na,cat\nb,dog\n", CSV, r"no line in .*labels\.csv for c \(1 of 3 missing\)"),
    ("Saliency", None, {"saliency": "Saliency"}, r"there is no folder .*Saliency; correct data\.saliency"),
]


@pytest.mark.parametrize(("path", "content", "settings", "words"), STRUCTURE)
def test_structure_is_checked_before_anything_is_decoded(
    root: Path, path: str, content: object, settings: dict[str, Any], words: str
) -> None:
    save(root, path, content)
    with pytest.raises(DataError, match=words):
        load(root, **settings)


SMALL = Image.new("L", (6, 5))
FILES: list[tuple[str, object, str]] = [
    ("JPEGImages/a.jpg", None, r"a\.jpg cannot be read as an image: .*No such file"),
    ("SegmentationClass/a.png", SMALL, r"the mask .*a\.png is 6 x 5 pixels, but its image .*a\.jpg is 12 x 8"),
    ("SegmentationClass/a.png", np.full((8, 12), 4), r"a\.png holds the value 4; with 3 classes"),
    ("Saliency/a.png", SMALL, r"the saliency map .*a\.png is 6 x 5 pixels, but its image .*a\.jpg is 12 x 8"),
    (
        "Saliency/a.png",
        Image.new("RGB", (12, 8), (9, 9, 8)),
        r"a\.png is no saliency map, it has colours; save it as an",
    ),
]


@pytest.mark.parametrize(("path", "content", "words"), FILES)
def test_damaged_file_is_named_when_its_sample_is_read(root: Path, path: str, content: object, words: str) -> None:
    samples = load(root, saliency="Saliency")
    save(root, path, content)
    assert samples[1].image_id == "b"
    with pytest.raises(DataError, match=words):
        samples.with_ground_truth().with_saliency()[0]


def test_truncated_and_deep_images_are_refused(root: Path) -> None:
    path = root / "JPEGImages/b.jpg"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"b\.jpg cannot be read as an image: .*runcated"):
        load(root)[1]
    Image.new("I;16", (4, 4)).save(root / "deep.png")
    with pytest.raises(DataError, match=r"deep\.png has more than 8 bits per channel \(mode I;16\)"):
        read_image(root / "deep.png")


def test_saliency_of_zero_and_one_is_refused_with_the_cure(root: Path) -> None:
    pixels = np.zeros((HEIGHT, WIDTH), np.uint8)
    Image.fromarray(pixels).save(root / "Saliency/a.png")  # nothing is salient
    pixels[2:4] = 1
    Image.fromarray(pixels).save(root / "Saliency/b.png")
    samples = load(root, saliency="Saliency").with_saliency()
    assert samples[0].saliency is not None and samples[0].saliency.max() == 0
    with pytest.raises(DataError, match=r"b\.png holds 0 and 1 where 255 is salient: multiply it by 255"):
        samples[1]
    _, problems = check_data(config(root, saliency="Saliency"))
    assert len(problems) == 1 and "b.png holds 0 and 1" in problems[0]


# The mini set is read by the same loader.


@pytest.fixture
def mini_root(root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("minidata.CLASS_NAMES", CLASSES)
    run_folder = root.parent / "run"
    run_folder.mkdir()
    return root.rename(run_folder / "data")


def test_mini_lies_in_the_run_folder_with_labels_and_saliency(mini_root: Path) -> None:
    settings = Config.model_validate({"data": {"kind": "mini"}})
    samples = load_samples(settings, "train", mini_root.parent)
    assert samples.class_names == CLASSES
    assert samples.image_labels.tolist() == [[1, 0, 0], [0, 1, 1], [0, 0, 1]]
    assert samples.has_ground_truth and samples.has_saliency
    (mini_root / "Annotations").rename(mini_root / "unused")
    elsewhere = Config.model_validate({"data": {"kind": "mini", "root": mini_root}})
    assert load_samples(elsewhere, "val").image_ids == ["d"]


def test_missing_mini_set_says_what_makes_it(tmp_path: Path) -> None:
    settings = Config.model_validate({"data": {"kind": "mini"}})
    with pytest.raises(DataError, match="no mini data set in .*data; notebook 01 or `smaf run CONFIG"):
        load_samples(settings, "train", tmp_path)
    with pytest.raises(DataError, match=re.escape("give run_folder, or set data.root")):
        load_samples(settings, "train")


def test_a_photo_is_opened_upright_and_a_large_one_is_shrunk(tmp_path: Path) -> None:
    picture = Image.new("RGB", (60, 40), (200, 0, 0))
    exif = picture.getexif()
    exif[0x0112] = 6  # the camera was turned
    picture.save(tmp_path / "photo.jpg", exif=exif)
    image = open_image(str(tmp_path / "photo.jpg"))
    assert image.dtype == torch.uint8 and tuple(image.shape) == (3, 60, 40)  # small ones keep their size
    assert tuple(open_image(tmp_path / "photo.jpg", longest_side=30).shape) == (3, 30, 20)
    with pytest.raises(DataError, match="gone.jpg"):
        open_image(tmp_path / "gone.jpg")


def test_a_large_jpeg_is_decoded_smaller_and_may_be_a_files_content(monkeypatch: pytest.MonkeyPatch) -> None:
    """libjpeg leaves out what the working size does not need, which makes the photos of a phone quick."""
    decoded, content = [], io.BytesIO()
    Image.new("RGB", (4032, 3024), "red").save(content, "JPEG")
    transpose = ImageOps.exif_transpose
    monkeypatch.setattr(ImageOps, "exif_transpose", lambda picture: decoded.append(picture.size) or transpose(picture))
    assert tuple(open_image("a.jpg", content=content.getvalue()).shape) == (3, 384, 512) and decoded == [(2016, 1512)]
    with pytest.raises(DataError, match=r"letter.jpg cannot be read as an image"):
        open_image("letter.jpg", content=b"dear sir")

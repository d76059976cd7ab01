"""Custom images, the CSV, and the template configs/custom.yaml."""

from __future__ import annotations

import csv
import io
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from smaflib.config import Config
from smaflib.data import Samples, load_samples
from smaflib.data.labels import image_stem, read_label_rows, write_labels
from smaflib.data.masks import save_mask
from smaflib.errors import DataError
from smaflib.files import compose

WIDTH, HEIGHT = 12, 8


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "my photos"
    folder.mkdir()
    for name in ("a.jpg", "b.JPEG", "c.png", "d.e.webp"):
        Image.new("RGB", (WIDTH, HEIGHT), (200, 100, 50)).save(folder / name)
    return folder


def load(photos: Path, text: str | bytes | None = None, **data: Any) -> Samples:
    labels = photos / "labels.csv"
    if text is None:
        text = "image,labels\na.jpg,cat\nb.JPEG,dog;cat\nc.png,dog\nd.e.webp,ape\n"
    labels.write_bytes(text.encode() if isinstance(text, str) else text)
    split = data.pop("split", "train")
    settings = {"data": {"kind": "folder", "images": photos, "labels": labels, "longest_side": None, **data}}
    return load_samples(Config.model_validate(settings), split)


def test_images_of_all_kinds_load_with_their_labels(photos: Path) -> None:
    samples = load(photos)
    assert samples.image_ids == ["a", "b", "c", "d.e"]
    assert samples.class_names == ("ape", "cat", "dog")
    assert samples.image_labels.tolist() == [[0, 1, 0], [0, 1, 1], [0, 0, 1], [1, 0, 0]]
    assert all(sample.image.shape == (3, HEIGHT, WIDTH) for sample in samples)
    assert samples[3].image_label.tolist() == [1, 0, 0]
    assert not samples.has_ground_truth and not samples.has_saliency
    ordered = load(photos, class_names=("dog", "cat", "zebra", "ape"))
    assert ordered[1].image_label.tolist() == [1, 1, 0, 0]
    assert len(load(photos, split="val")) == 0


def test_image_without_a_label_is_a_negative_of_all_classes(photos: Path) -> None:
    samples = load(photos, "image,labels\na.jpg,cat\nb.JPEG,\nc.png\n")
    assert samples.image_ids == ["a", "b", "c"] and samples.class_names == ("cat",)
    assert samples.image_labels.tolist() == [[1], [0], [0]]
    with pytest.raises(DataError, match=r"labels\.csv: no image has a label"):
        load(photos, "image,labels\na.jpg,\nb.JPEG,\n")


def test_images_of_any_size_are_worked_on_at_one_size(photos: Path) -> None:
    save_mask(photos.parent / "masks" / "a.png", np.full((HEIGHT, WIDTH), 1, np.uint8))
    Image.new("RGB", (4000, 3000), (9, 9, 9)).save(photos / "b.JPEG")
    save_mask(photos.parent / "masks" / "b.png", np.full((3000, 4000), 2, np.uint8))
    text, names = "image,labels\na,cat\nb,dog\n", ("cat", "dog")
    samples = load(photos, text, masks=photos.parent / "masks", class_names=names, longest_side=60).with_ground_truth()
    assert [sample.image.shape for sample in samples] == [(3, 40, 60), (3, 45, 60)]
    assert [sample.full_size for sample in samples] == [(HEIGHT, WIDTH), (3000, 4000)]
    for number, (sample, mask) in enumerate(zip(samples, samples.ground_truth or (), strict=True)):
        assert sample.mask is not None and torch.equal(sample.mask, mask) and mask.unique().tolist() == [number + 1]
        assert samples.at_full_size(number, mask).shape == sample.full_size


@pytest.mark.parametrize(
    "text",
    [
        b"image,labels\r\na.jpg,cat;dog\r\nc.png,dog\r\n",
        b"\xef\xbb\xbfimage,labels\na.jpg,cat;dog\nc.png,dog",
        b"image,labels\n a.jpg , cat ; dog \n\nc.png,  dog\n  ,  \n",
        b'"image","labels"\n"a.jpg","cat;dog"\n"c.png", "dog"\n',
        b"image,labels\na,cat;dog\nc,dog\n",
        b"image,labels\na.JPG,cat;dog\nold/c.jpg,dog\n",
        b"photographer,labels,image\nme,cat;dog,a\n,dog,c\n",
        b"Image,Labels,\na,cat;dog,\nc,dog,,\n",
        b"image;labels\r\na.jpg;cat,dog\r\nc.png;dog\r\n",
        b'\xef\xbb\xbf"Image"; "labels"; scores\na.jpg;"cat;dog";"cat 0.9;dog 0.5"\nc.png; dog',
    ],
    ids=[
        *("crlf", "bom", "spaces", "quotes", "no-ending", "other-ending", "more-columns", "spreadsheet"),
        *("semicolons", "semicolons-quotes"),
    ],
)
def test_csv_is_read_as_programs_write_it(photos: Path, text: bytes) -> None:
    samples = load(photos, text)
    assert samples.image_ids == ["a", "c"]
    assert samples.image_labels.tolist() == [[1, 1], [0, 1]]


NAMES = st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z"], exclude_characters=',;"'), min_size=1)


@given(st.dictionaries(NAMES.map(image_stem).filter(bool), st.lists(NAMES, unique=True), min_size=1), st.booleans())
def test_a_table_written_either_way_reads_the_same(rows: dict[str, list[str]], quoted: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path, found = Path(folder) / "labels.csv", []
        for column, label in ((",", ";"), (";", ","), (";", ";")):
            text = io.StringIO()
            writer = csv.writer(text, delimiter=column, quoting=csv.QUOTE_ALL if quoted else csv.QUOTE_MINIMAL)
            writer.writerows([("image", "labels"), *((image, label.join(labels)) for image, labels in rows.items())])
            path.write_text(text.getvalue(), encoding="utf-8-sig", newline="")
            found.append(read_label_rows(path))
    composed = {image_stem(name): tuple(dict.fromkeys(map(compose, labels))) for name, labels in rows.items()}
    assert found[0] == found[1] == found[2]
    assert {stem: row.labels for stem, row in found[0].items()} == composed


@given(
    st.dictionaries(NAMES.map(image_stem).filter(bool), st.lists(NAMES, unique=True), min_size=1),
    st.lists(NAMES, unique=True),
    st.sampled_from([(",", ";"), (";", ","), (";", ";")]),
    st.data(),
)
def test_labels_that_are_written_are_read_and_other_rows_stay(
    rows: dict[str, list[str]], labels: list[str], marks: tuple[str, str], data: st.DataObject
) -> None:
    changed, ending = data.draw(st.sampled_from([*rows])), data.draw(st.sampled_from(["", ".jpg", " ", ".png "]))
    with tempfile.TemporaryDirectory() as folder:
        path, text = Path(folder) / "labels.csv", io.StringIO()
        lines = [(name + ending, marks[1].join(each)) for name, each in rows.items()]
        csv.writer(text, delimiter=marks[0]).writerows([("image", "labels"), *lines])
        path.write_text(text.getvalue(), encoding=data.draw(st.sampled_from(["utf-8", "utf-8-sig"])), newline="")
        before = read_label_rows(path)
        write_labels(path, compose(changed), labels)
        after = read_label_rows(path)
    labels = list(dict.fromkeys(map(compose, labels)))
    assert after.pop(compose(changed)).labels == tuple(labels)
    assert before.pop(compose(changed)) and after == before


def test_labels_are_written_into_tables_of_any_form(tmp_path: Path) -> None:
    table = tmp_path / "labels.csv"
    for before, after in {
        b"image,labels\n a.jpg , cat\nb\n\nc,\n": b"image,labels\na.jpg,cat;dog\nb,\nc,\n",
        b"by,labels,image\nme,,b\n,ape,old/a.png\n": b"by,labels,image\nme,,b\n,cat;dog,old/a.png\n",
        b"image,labels,note\na\n": b"image,labels,note\na,cat;dog,\n",
        b"image,labels,,\na,ape,my,dog\n": b"image,labels,,\na,cat;dog,my,dog\n",
        b'\xef\xbb\xbfImage; "labels"\r\na;ape,cat\r\n': b'\xef\xbb\xbfImage;labels\na;"cat;dog"\n',
        b'image,labels\n"a, b",cat\na,\n': b'image,labels\n"a, b",cat\na,cat;dog\n',
    }.items():
        table.write_bytes(before)
        write_labels(table, "a", ["cat", "dog"])
        assert table.read_bytes() == after


def test_windows_letters_are_read_but_not_a_workbook(photos: Path) -> None:
    table = photos / "labels.csv"
    table.write_bytes("image;labels\na.jpg;Bär\n".encode("cp1252"))
    assert read_label_rows(table)["a"].labels == ("Bär",)
    for content in (b"PK\x03\x04\x00\xe4", b"image,labels\na.jpg,\x81\n", b"\xff\xfe\x00"):
        table.write_bytes(content)
        with pytest.raises(DataError, match=r"labels\.csv is not UTF-8 .*a table as 'CSV UTF-8'"):
            read_label_rows(table)


def test_a_path_names_a_photo_of_a_subfolder_and_a_name_the_one_beside(photos: Path) -> None:
    (photos / "dog").mkdir()
    for name, width in (("a.jpg", 3), ("x.jpg", 5)):
        Image.new("RGB", (width, 2)).save(photos / "dog" / name)
    samples = load(photos, "image,labels\na,cat\ndog/x.jpg,dog\n")
    assert samples.image_ids == ["a", "x"]
    assert [sample.image.shape for sample in samples] == [(3, HEIGHT, WIDTH), (3, 2, 5)]
    assert load(photos, "image,labels\ndog/a.jpg,dog\n")[0].image.shape == (3, 2, 3)
    assert load(photos, "image,labels\nold/a.jpg,dog\n")[0].image.shape == (3, HEIGHT, WIDTH)
    with pytest.raises(DataError, match=r"no image in .*my photos for x "):
        load(photos, "image,labels\nx,dog\n")


def test_letters_of_a_mac_are_the_same_letters(photos: Path) -> None:
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    (photos / "a.jpg").rename(photos / f"{decomposed}.jpg")
    Image.new("L", (WIDTH, HEIGHT)).save(photos.parent / f"{decomposed}.png")
    table = f"image,labels\n{composed},{composed}\nb.JPEG,{decomposed}\n"
    samples = load(photos, table)
    assert samples.image_ids == [composed, "b"] and samples.class_names == (composed,)
    assert samples[0].image.shape == (3, HEIGHT, WIDTH)
    samples = load(photos, table.splitlines()[0] + f"\n{decomposed}.jpg,{composed}", saliency=photos.parent)
    assert samples.image_ids == [composed] and samples.has_saliency
    assert load(photos, table, class_names=(decomposed,)).image_labels.tolist() == [[1], [1]]


def test_photo_is_turned_as_its_orientation_flag_says_and_the_mask_must_fit_that(photos: Path) -> None:
    pixels = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    pixels[0, :] = 255  # the upper edge of the stored picture is the right edge of the upright one
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(photos / "c.png", exif=exif)
    masks = photos.parent / "masks"
    save_mask(masks / "c.png", np.zeros((WIDTH, HEIGHT), np.uint8))
    samples = load(photos, "image,labels\nc,cat\n", masks=masks, class_names=("cat",)).with_ground_truth()
    assert samples[0].image.shape == (3, WIDTH, HEIGHT)
    assert (samples[0].image[:, :, -1] == 255).all() and (samples[0].image[:, :, :-1] == 0).all()
    save_mask(masks / "c.png", np.zeros((HEIGHT, WIDTH), np.uint8))
    with pytest.raises(DataError, match=r"masks.c\.png is 12 x 8 pixels, but its image .*c\.png is 8 x 12"):
        samples[0]


def test_masks_and_saliency_are_found_by_name(photos: Path) -> None:
    for stem in ("a", "b", "c", "d.e"):
        save_mask(photos.parent / "masks" / f"{stem}.png", np.full((HEIGHT, WIDTH), 2, np.uint8))
        Image.new("L", (WIDTH, HEIGHT), 255).save(photos.parent / f"{stem}.png")
    names = ("cat", "dog", "ape")
    samples = load(photos, masks=photos.parent / "masks", saliency=photos.parent, class_names=names)
    assert samples.has_ground_truth and samples.has_saliency
    sample = samples.with_ground_truth().with_saliency()[3]
    assert sample.mask is not None and sample.mask.unique().tolist() == [2]
    assert sample.saliency is not None and sample.saliency.unique().tolist() == [1]
    (photos.parent / "d.e.png").unlink()
    with pytest.raises(DataError, match=r"no saliency map in .* for d\.e"):
        load(photos, saliency=photos.parent)
    (photos.parent / "masks/d.e.png").unlink()
    assert load(photos, masks=photos.parent / "masks", class_names=names).annotated.image_ids == ["a", "b", "c"]
    with pytest.raises(DataError, match=r"no mask in .*nowhere for a.* \(4 of 4 missing\); .*leave data\.masks empty"):
        (photos.parent / "nowhere").mkdir()
        load(photos, masks=photos.parent / "nowhere", class_names=names)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "image,labels\na.jpg,cat\nx.jpg,cat\n",
            r"no image in .*my photos for x\.jpg .* \(1 of 2 missing\); correct .*labels\.csv",
        ),
        ("image|labels\na.jpg|cat\n", r"separated by a comma.* or the other way round; it is 'image|labels'"),
        ("image;labels\na.jpg;cat;dog\n", r"line 2: more fields than columns \(dog\); .* by ; within quotes"),
        ('image;labels\na.jpg;"cat\n', r"labels\.csv, line 2: .*check the quotes"),
        ("image,labels\n", "lists no image"),
        ("image,labels\n,cat\n", "line 2: no image name"),
        ("image,labels\na.jpg,cat,dog\n", r"line 2: more fields than columns \(dog\); separate labels by ;"),
        ("image,labels\na.jpg,cat\n\na.jpg,dog\n", r"line 4: a\.jpg is already listed on line 2; put all of an image"),
        ("image,labels\na.jpg,cat\na.png,dog\n", r"line 3: a\.png is already .* masks are named a\.png"),
        (
            "image,labels\na.jpg,cat\nA.png,dog\n",
            r"a\.jpg and A\.png would share the mask A\.png; rename one, or correct .*labels\.csv",
        ),
        ('image,labels\na.jpg,"cat\n', r"labels\.csv, line 2: .*check the quotes"),
        ("image,labels\na.jpg,cat\nb.JPEG,dog;Catt\n", r"line 3: there is no class 'Catt' \(did you mean 'cat'\?\)"),
    ],
)
def test_bad_csv_is_refused_with_line_and_cure(photos: Path, text: str | bytes, words: str) -> None:
    with pytest.raises(DataError, match=words) as caught:
        load(photos, text, class_names=("cat", "dog"))
    assert "labels.csv" in str(caught.value)


def test_missing_folder_and_missing_csv_are_named(photos: Path) -> None:
    with pytest.raises(DataError, match=r"there is no folder .*nowhere; set data\.images"):
        load(photos, images=photos / "nowhere")
    with pytest.raises(DataError, match=r"there is no CSV file .*nowhere\.csv; set data\.labels"):
        load(photos, labels=photos / "nowhere.csv")


def test_masks_need_the_order_of_classes(photos: Path) -> None:
    with pytest.raises(DataError, match=r"data\.masks needs data\.class_names, in the order of the mask values"):
        load(photos, masks=photos)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (("cat", "dog", "cat"), "'cat' is given twice"),
        (("background", "cat"), "leave out 'background'"),
        (("cat", "<img src=x onerror=alert(1)>"), "is unusable; .* none of ; < > \\$"),
        (("cat", "a\x1b[31mb"), "is unusable"),
        (("cat", ""), "is unusable"),
        (tuple(f"class{number}" for number in range(255)), "255 classes, but a mask of 8 bits has room for 254"),
    ],
)
def test_unusable_class_names_are_refused(photos: Path, names: tuple[str, ...], words: str) -> None:
    with pytest.raises(DataError, match=words):
        load(photos, class_names=names)

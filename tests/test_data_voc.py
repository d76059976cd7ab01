"""The VOC layout loader, and reading one sample."""

from __future__ import annotations

import os
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from smaflib.config import Config
from smaflib.data import Samples, load_samples
from smaflib.data.classes import VOC_CLASSES
from smaflib.data.masks import mask_values, save_mask
from smaflib.data.voc import read_image, read_saliency
from smaflib.errors import DataError

CLASSES = ("cat", "dog", "sofa")
WIDTH, HEIGHT = 12, 8


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


def test_list_of_the_augmented_set_comes_from_its_masks_where_there_is_none(root: Path) -> None:
    with pytest.raises(DataError, match=r"no split list .*train_aug\.txt"):
        load(root, train_split="train_aug")
    folder = root / "SegmentationClassAug"
    folder.mkdir()
    for name in "cabd":
        (folder / f"{name}.png").write_bytes((root / "SegmentationClass" / f"{name}.png").read_bytes())
    assert load(root, train_split="train_aug").image_ids == ["a", "b", "c"]  # d is for validation
    (root / "ImageSets/Segmentation/train_aug.txt").write_text("b\n")
    assert load(root, train_split="train_aug").image_ids == ["b"]


def test_lists_of_paths_are_lists_of_names(root: Path) -> None:
    lines = [f"/JPEGImages/{name}.jpg /SegmentationClassAug/{name}.png" for name in "cb"]
    (root / "ImageSets/Segmentation/train.txt").write_text("\n".join(lines))
    assert load(root).image_ids == ["c", "b"]


def test_sample_has_the_documented_shapes_and_ranges(root: Path) -> None:
    sample = load(root, saliency="Saliency").with_masks()[1]
    assert sample.image_id == "b"
    assert sample.image.shape == (3, HEIGHT, WIDTH) and sample.image.dtype == torch.uint8
    assert sample.image_label.tolist() == [0, 1, 1] and sample.image_label.dtype == torch.float32
    assert sample.mask is not None and sample.saliency is not None
    assert sample.mask.shape == (HEIGHT, WIDTH) and sample.mask.unique().tolist() == [0, 2, 3, 255]
    assert sample.saliency.shape == (HEIGHT, WIDTH) and sample.saliency.dtype == torch.float32
    assert sample.saliency.unique().tolist() == pytest.approx([0.2, 1.0])


def test_splits_follow_their_lists_in_order(root: Path) -> None:
    (root / "ImageSets/Segmentation/train.txt").write_text("\ufeffc\r\n\r\n b \r\na", encoding="utf-8")
    assert load(root).image_ids == ["c", "b", "a"]
    assert load_samples(config(root), "val").image_ids == ["d"]
    assert load(root, train_split="val").image_ids == ["d"]


def test_xml_and_csv_and_masks_give_the_same_labels(root: Path) -> None:
    expected = [[1, 0, 0], [0, 1, 1], [0, 0, 1]]
    assert load(root, label_source="xml").image_labels.tolist() == expected
    assert load(root, label_source="csv", labels="labels.csv").image_labels.tolist() == expected
    assert load(root, label_source="masks").image_labels.tolist() == expected


def test_difficult_objects_count_and_parts_and_unknown_classes_do_not(root: Path) -> None:
    (root / "Annotations/a.xml").write_text(
        "<annotation><object><name>dog</name><difficult>1</difficult><part><name>cat</name></part></object>"
        "<object><name>unicorn</name></object></annotation>"
    )
    assert load(root)[0].image_label.tolist() == [0, 1, 0]


def test_classes_are_voc_s_twenty_unless_named(root: Path) -> None:
    assert load(root, class_names=()).class_names == tuple(VOC_CLASSES)


def test_no_mask_is_opened_unless_the_ground_truth_is_asked_for(root: Path) -> None:
    for mask in (root / "SegmentationClass").iterdir():
        mask.write_bytes(b"not a picture")
    samples = load(root)
    assert [sample.mask for sample in samples] == [None, None, None]
    with pytest.raises(DataError, match=r"SegmentationClass.a\.png cannot be decoded"):
        samples.with_masks()[0]


def test_missing_masks_mean_that_there_is_no_ground_truth(root: Path) -> None:
    (root / "SegmentationClass/b.png").unlink()
    samples = load(root)
    assert not samples.has_ground_truth
    with pytest.raises(DataError, match="no mask for b"):
        samples.with_masks()


def test_masks_folder_can_be_chosen(root: Path) -> None:
    (root / "SegmentationClass").rename(root / "SegmentationClassAug")
    assert load(root, masks="SegmentationClassAug").has_ground_truth
    assert load(root, masks=root / "SegmentationClassAug").has_ground_truth
    assert not load(root).has_ground_truth
    with pytest.raises(DataError, match=r"there is no folder .*Other; set data\.masks"):
        load(root, masks="Other")


def test_max_images_keeps_the_first_and_opens_no_other(root: Path) -> None:
    (root / "JPEGImages/c.jpg").unlink()
    assert load(root, max_images=2).image_ids == ["a", "b"]


def test_cache_keeps_decoded_samples(root: Path) -> None:
    cached, fresh = load(root, cache=True), load(root)
    assert cached[0] is cached[0]
    assert fresh[0] is not fresh[0]


def test_samples_travel_to_loader_processes(root: Path) -> None:
    samples = pickle.loads(pickle.dumps(load(root)))
    assert torch.equal(samples[2].image, load(root)[2].image)


def test_orientation_flag_does_not_turn_voc_images(root: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # a viewer turns the picture by a quarter
    Image.new("RGB", (WIDTH, HEIGHT)).save(root / "JPEGImages/a.jpg", exif=exif)
    assert load(root).with_masks()[0].image.shape == (3, HEIGHT, WIDTH)


# Structure: checked for the whole split before anything is decoded.


def test_missing_root_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"there is no folder .*JPEGImages; set data\.root"):
        load(tmp_path)


def test_missing_split_list_names_the_ones_that_exist(root: Path) -> None:
    with pytest.raises(DataError, match=r"no split list .*train_aug\.txt; set data\.train_split .* train, val"):
        load(root, train_split="train_aug")


def test_empty_split_list_is_an_error(root: Path) -> None:
    (root / "ImageSets/Segmentation/train.txt").write_text("\n \n")
    with pytest.raises(DataError, match=r"the split list .*train\.txt is empty"):
        load(root)


def test_image_listed_twice_is_an_error_with_both_lines(root: Path) -> None:
    (root / "ImageSets/Segmentation/train.txt").write_text("a\nb\na\n")
    with pytest.raises(DataError, match=r"train\.txt, line 3: a is listed twice, before on line 1"):
        load(root)


def test_listed_image_that_is_missing_is_named(root: Path) -> None:
    (root / "ImageSets/Segmentation/train.txt").write_text("a\nbb\n")
    with pytest.raises(
        DataError, match=r"train\.txt, line 2: there is no image bb\.jpg .*JPEGImages \(did you mean 'b'"
    ):
        load(root)


def test_missing_annotation_says_how_to_use_a_csv(root: Path) -> None:
    (root / "Annotations/b.xml").unlink()
    with pytest.raises(DataError, match=r"no annotation .*b\.xml; add it, or set data\.label_source=csv"):
        load(root)


@pytest.mark.parametrize("text", ["<annotation><object>", "", '<?xml version="1.0" encoding="klingon"?><a/>'])
def test_malformed_annotation_is_named(root: Path, text: str) -> None:
    (root / "Annotations/b.xml").write_text(text)
    with pytest.raises(DataError, match=r"b\.xml is no readable XML"):
        load(root)


@pytest.mark.parametrize(("names", "found"), [((), "no object at all"), (("horse", "cow"), "only cow, horse")])
def test_annotation_without_a_known_class_is_an_error(root: Path, names: tuple[str, ...], found: str) -> None:
    (root / "Annotations/c.xml").write_text(annotation(*names))
    with pytest.raises(DataError, match=rf"c\.xml: an image without a label, {found}"):
        load(root)


def test_image_that_the_csv_leaves_out_is_an_error(root: Path) -> None:
    (root / "labels.csv").write_text("image,labels\na,cat\nb,dog\n")
    with pytest.raises(DataError, match=r"labels\.csv: there is no line for c, an image without a label"):
        load(root, label_source="csv", labels="labels.csv")


def test_unknown_class_in_the_csv_is_an_error_even_outside_the_split(root: Path) -> None:
    (root / "labels.csv").write_text("image,labels\na,cat\nb,dog\nc,sofa\nd,soffa\n")
    with pytest.raises(DataError, match=r"labels\.csv, line 5: there is no class 'soffa' \(did you mean 'sofa'\?\)"):
        load(root, label_source="csv", labels="labels.csv")


def test_labels_from_masks_need_masks(root: Path) -> None:
    (root / "SegmentationClass/b.png").unlink()
    with pytest.raises(DataError, match=r"label_source is 'masks', but there is no mask b\.png in .*SegmentationClass"):
        load(root, label_source="masks")
    (root / "SegmentationClass").rename(root / "elsewhere")
    with pytest.raises(DataError, match=r"there is no mask a\.png"):
        load(root, label_source="masks")


def test_labels_from_an_empty_mask_are_an_error(root: Path) -> None:
    save_mask(root / "SegmentationClass/c.png", np.zeros((HEIGHT, WIDTH), np.uint8))
    with pytest.raises(DataError, match=r"c\.png is all background: an image without a label"):
        load(root, label_source="masks")


def test_saliency_must_be_there_for_training_images_only(root: Path) -> None:
    (root / "Saliency/d.png").unlink()
    assert load_samples(config(root, saliency="Saliency"), "val")[0].saliency is None
    (root / "Saliency/b.png").unlink()
    with pytest.raises(DataError, match=r"no saliency map b\.png .* classifier\.pretraining=plain"):
        load(root, saliency="Saliency")
    with pytest.raises(DataError, match=r"there is no folder Nowhere; set data\.saliency"):
        load(root, saliency="Nowhere")


# Decoding: errors come when the sample is read.


def test_truncated_image_is_found_when_it_is_read(root: Path) -> None:
    path = root / "JPEGImages/b.jpg"
    path.write_bytes(path.read_bytes()[:-100])
    samples = load(root)
    assert samples[0].image_id == "a"
    with pytest.raises(DataError, match=r"b\.jpg cannot be decoded: .*truncated.*fetch or save it again"):
        samples[1]


@pytest.mark.parametrize("content", [b"", b"hello", b"\xff\xd8\xff\xe0"])
def test_file_that_is_no_picture_is_named(root: Path, content: bytes) -> None:
    (root / "JPEGImages/a.jpg").write_bytes(content)
    with pytest.raises(DataError, match=r"a\.jpg cannot be decoded"):
        load(root)[0]


@pytest.mark.filterwarnings("ignore")  # Pillow warns of odd metadata in pictures that it can decode
@pytest.mark.parametrize("ending", ["jpg", "png", "webp"])
def test_damaged_pictures_raise_nothing_but_data_errors(tmp_path: Path, ending: str) -> None:
    generator = np.random.default_rng(0)
    path = tmp_path / f"a.{ending}"
    Image.fromarray(generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path)
    whole = path.read_bytes()
    for _ in range(60):
        damaged = np.frombuffer(whole, np.uint8).copy()
        damaged[generator.integers(0, min(len(whole), 400), 4)] = generator.integers(0, 256, 4)
        path.write_bytes(damaged.tobytes()[: generator.integers(1, len(whole))])
        try:
            read_image(path, oriented=True)
        except DataError as error:
            assert path.name in str(error)


def test_image_with_16_bits_is_refused(tmp_path: Path) -> None:
    Image.new("I;16", (4, 4)).save(tmp_path / "deep.png")
    with pytest.raises(DataError, match=r"deep\.png is a picture of mode I;16.*save it as 8-bit RGB"):
        read_image(tmp_path / "deep.png")


def test_mask_of_another_size_is_an_error_with_both_sizes(root: Path) -> None:
    save_mask(root / "SegmentationClass/a.png", np.zeros((5, 6), np.uint8))
    samples = load(root)
    assert samples[0].image.shape == (3, HEIGHT, WIDTH)
    with pytest.raises(DataError, match=r"the mask .*a\.png is 6 x 5 pixels, but its image .*a\.jpg is 12 x 8"):
        samples.with_masks()[0]


def test_saliency_of_another_size_is_an_error_with_both_sizes(root: Path) -> None:
    Image.new("L", (6, 5)).save(root / "Saliency/a.png")
    with pytest.raises(DataError, match=r"the saliency map .*a\.png is 6 x 5 pixels, but its image .*a\.jpg is 12 x 8"):
        load(root, saliency="Saliency")[0]


def test_mask_value_beyond_the_classes_is_an_error(root: Path) -> None:
    save_mask(root / "SegmentationClass/a.png", np.full((HEIGHT, WIDTH), 4, np.uint8))
    with pytest.raises(DataError, match=r"a\.png holds the value 4, but there are 3 classes"):
        load(root).with_masks()[0]
    with pytest.raises(DataError, match="holds the value 4"):
        load(root, label_source="masks")


def test_grey_saliency_may_be_stored_as_colour_but_must_be_grey(tmp_path: Path) -> None:
    path = tmp_path / "map.png"
    Image.new("RGB", (3, 2), (51, 51, 51)).save(path)
    assert read_saliency(path).unique().tolist() == pytest.approx([0.2])
    Image.new("RGB", (3, 2), (51, 51, 52)).save(path)
    with pytest.raises(DataError, match=r"map\.png is a saliency map in colour; save it as a grey PNG"):
        read_saliency(path)
    Image.new("I;16", (3, 2)).save(path)
    with pytest.raises(DataError, match=r"mode I;16; save it as an 8-bit grey PNG"):
        read_saliency(path)


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
    elsewhere = settings.model_copy(update={"data": replace_data(settings, root=mini_root)})
    assert load_samples(elsewhere, "val").image_ids == ["d"]


def replace_data(settings: Config, **data: Any) -> Any:
    return settings.data.model_copy(update=data)


def test_missing_mini_set_says_what_makes_it(tmp_path: Path) -> None:
    settings = Config.model_validate({"data": {"kind": "mini"}})
    with pytest.raises(DataError, match="no mini data set in .*data; notebook 01 makes it, as does `smaf run CONFIG"):
        load_samples(settings, "train", tmp_path)
    with pytest.raises(DataError, match=re.escape("give run_folder, or set data.root")):
        load_samples(settings, "train")


@pytest.mark.skipif("SMAF_PHOTOS" not in os.environ, reason="SMAF_PHOTOS names no folder of real photos in VOC layout")
def test_real_photos_load_in_voc_layout() -> None:
    photos = Path(os.environ["SMAF_PHOTOS"])
    settings = config(photos, class_names=(), label_source="csv", labels="labels.csv")
    splits = [load_samples(settings, "train"), load_samples(settings, "val")]
    assert [len(samples) for samples in splits] == [30, 10]
    for sample in (sample for samples in splits for sample in samples.with_masks()):
        assert sample.image.dtype == torch.uint8 and sample.mask is not None
        assert sample.mask.shape == sample.image.shape[1:]
        shown = sorted(set(mask_values(sample.mask)) - {0, 255})
        assert shown == (sample.image_label.nonzero().flatten() + 1).tolist()

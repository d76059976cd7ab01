"""The folder layout of PASCAL VOC, and reading one sample of it.

``JPEGImages``, ``ImageSets/Segmentation/<split>.txt``, image labels from ``Annotations`` or a CSV, and where they exist
``SegmentationClass`` and a folder of saliency maps. The mini set has the same layout.
"""

from __future__ import annotations

import functools
import os
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from smaflib.config import DataConfig, Split
from smaflib.data.classes import VOC_CLASSES, VOID_LABEL
from smaflib.data.labels import (
    LabelRow,
    check_class_names,
    class_numbers,
    image_stem,
    nearest,
    read_label_rows,
)
from smaflib.data.masks import check_mask_values, decoding, mask_values, read_mask
from smaflib.data.sample import Sample, SampleFiles, Samples
from smaflib.errors import DataError

SPLITS: tuple[Split, ...] = get_args(Split)


def load_voc(data: DataConfig, split: Split) -> Samples:
    """The samples of one split in VOC layout, nothing decoded yet.

    Image labels come from where ``data.label_source`` says. From XML, every object counts, also one marked
    ``difficult``, as in the label lists that this field uses; names of unknown classes are passed over, so that
    ``data.class_names`` may be a part of VOC's 20. Only ``masks`` opens masks here, and only then.

    ``data.labels``, ``data.masks`` and ``data.saliency`` may be relative to ``data.root``. An image without a mask is
    fine (``has_ground_truth`` is then False); a training image without a saliency map is not, once ``data.saliency``
    is set. With ``data.max_images`` only the first images of the list are taken. The field's list ``train_aug`` may be
    missing where its masks are there: then it is the images of ``SegmentationClassAug`` without those of
    ``data.val_split``. The masks themselves are not opened for that.

    Raises:
        DataError: naming file, line and cure, if a folder, list, image, label or saliency map of the split is missing
            or does not fit.
    """
    if data.root is None:
        raise DataError("data.root is not set; give the folder that holds JPEGImages (VOCdevkit/VOC2012)")
    class_names = data.class_names or tuple(VOC_CLASSES)
    check_class_names(class_names)
    folder = data.root / "JPEGImages"
    images = {path.stem: path for path in list_files(folder, (".jpg",), "set data.root to the folder that holds it")}
    list_path = data.split_list(split)
    augmented = data.root / "SegmentationClassAug"
    if list_path.stem == "train_aug" and not list_path.is_file() and augmented.is_dir():
        listed = _augmented_list(augmented, list_path.with_name(f"{data.val_split}.txt"))
    else:
        listed = _read_split(list_path)
    if data.max_images is not None:
        listed = listed[: data.max_images]
    masks_folder = _within(data.root, data.masks) if data.masks else data.root / "SegmentationClass"
    masks = list_pngs(masks_folder, "data.masks") if data.masks or masks_folder.is_dir() else {}
    saliency_folder = _within(data.root, data.saliency) if data.saliency else None
    saliency = list_pngs(saliency_folder, "data.saliency") if saliency_folder else {}

    image_ids = [image_id for _, image_id in listed]
    _refuse_missing(listed, images, list_path, folder)
    if saliency_folder and split == "train":
        require_saliency(image_ids, saliency, saliency_folder)
    labels = _image_labels(data, data.root, image_ids, class_names, masks, masks_folder)
    files = tuple(
        SampleFiles(image_id, images[image_id], numbers, saliency.get(image_id), masks.get(image_id))
        for image_id, numbers in zip(image_ids, labels, strict=True)
    )
    # VOC's masks were drawn over the pixels as stored, so an orientation flag must not turn them.
    read = functools.partial(read_sample, oriented=False)
    return Samples(files, class_names, split, read, cached=data.cache)


def read_sample(files: SampleFiles, num_classes: int, load_masks: bool, oriented: bool) -> Sample:
    """Decode one sample.

    Args:
        files: where its parts are.
        num_classes: K.
        load_masks: also read the mask.
        oriented: turn the image as its EXIF orientation says, the way picture viewers show it.

    Raises:
        DataError: if a file is damaged, the saliency map or the mask has another size than the image, or a mask value
            is neither 0 to K nor 255.
    """
    image = read_image(files.image, oriented)
    image_label = torch.zeros(num_classes)
    image_label[list(files.labels)] = 1
    saliency = mask = None
    if files.saliency is not None:
        saliency = read_saliency(files.saliency)
        _refuse_other_size("the saliency map", files.saliency, saliency, files.image, image)
    if load_masks and files.mask is not None:
        mask = read_mask(files.mask)
        _refuse_other_size("the mask", files.mask, mask, files.image, image)
        check_mask_values(mask, num_classes, files.mask)
    return Sample(files.image_id, image, image_label, saliency, mask)


def read_image(path: Path, oriented: bool = False) -> Tensor:
    """Read a picture as uint8 (3, H, W), RGB; transparency is dropped.

    Raises:
        DataError: if the file is missing or damaged, or has more than 8 bits per colour (which would be cut off).
    """
    with decoding(path) as picture:
        if picture.mode.startswith(("I", "F")):
            raise DataError(
                f"{path} is a picture of mode {picture.mode}, not of 8 bits per colour; save it as 8-bit RGB"
            )
        upright = ImageOps.exif_transpose(picture) if oriented else picture
        pixels = np.array(upright.convert("RGB"))  # (H, W, 3)
        return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))


def read_saliency(path: Path) -> Tensor:
    """Read a grey picture as float32 (H, W) in [0, 1]; grey that is stored as colour is fine.

    Raises:
        DataError: if the file is missing or damaged, or is not grey with 8 bits.
    """
    with decoding(path) as picture:
        grey = picture if picture.mode == "L" else _to_grey(picture, path)
        return torch.from_numpy(np.array(grey)).float() / 255


def list_files(folder: Path, endings: Sequence[str], cure: str) -> list[Path]:
    """Files of a folder with one of these endings, capital or not, sorted by name; hidden files do not count.

    Raises:
        DataError: with ``cure``, if there is no such folder.
    """
    try:
        names = [entry.name for entry in os.scandir(folder) if entry.is_file() and not entry.name.startswith(".")]
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DataError(f"there is no folder {folder}; {cure}") from error
    except OSError as error:
        raise DataError(f"the folder {folder} cannot be read: {error}") from error
    return [folder / name for name in sorted(names) if name.lower().endswith(tuple(endings))]


def list_pngs(folder: Path, setting: str) -> dict[str, Path]:
    """The masks or saliency maps of a folder by image.

    Raises:
        DataError: naming ``setting``, if there is no such folder.
    """
    cure = f"set {setting} to the folder that holds <image>.png, or leave it out"
    return {path.stem: path for path in list_files(folder, (".png",), cure)}


def require_saliency(image_ids: Sequence[str], saliency: dict[str, Path], folder: Path) -> None:
    """Raise a :class:`DataError` if an image has no saliency map."""
    if missing := [image_id for image_id in image_ids if image_id not in saliency]:
        raise DataError(
            f"there is no saliency map {', '.join(f'{image_id}.png' for image_id in missing[:3])} in {folder} "
            f"({len(missing)} of {len(image_ids)} are missing); make it, or leave data.saliency empty and train with "
            "classifier.pretraining=plain"
        )


def check_saliency_sizes(samples: Samples) -> None:
    """Compare the size of every saliency map with that of its image, from the files' headers: seconds for 10,000.

    Raises:
        DataError: with their number and the first three, if some fit neither the image as stored nor upright.
    """
    wrong = []
    for files in samples.files:
        if files.saliency is None:
            continue
        with decoding(files.saliency) as saliency, decoding(files.image) as image:
            if saliency.size != image.size and saliency.size != ImageOps.exif_transpose(image).size:
                sizes = " x ".join(map(str, saliency.size)), " x ".join(map(str, image.size))
                wrong.append(f"{files.saliency} is {sizes[0]} pixels, its image {sizes[1]}")
    if wrong:
        raise DataError(
            f"{len(wrong)} of {len(samples)} saliency maps are not of their image's size: {'; '.join(wrong[:3])}; "
            "make them anew at the image's size, or leave data.saliency empty and train with "
            "classifier.pretraining=plain"
        )


def _refuse_missing(listed: list[tuple[int, str]], images: dict[str, Path], list_path: Path, folder: Path) -> None:
    missing = [(line, image_id) for line, image_id in listed if image_id not in images]
    if not missing:
        return
    line, first = missing[0]
    names = ", ".join(f"{image_id}.jpg" for _, image_id in missing[:3])
    count = f" ({len(missing)} of {len(listed)} are missing)" if len(missing) > 1 else nearest(first, list(images))
    raise DataError(
        f"{list_path}, line {line}: there is no image {names} in {folder}{count}; add it or take the line out"
    )


def _to_grey(picture: Image.Image, path: Path) -> Image.Image:
    if picture.mode.startswith(("I", "F")):
        raise DataError(f"{path} is a saliency map of mode {picture.mode}; save it as an 8-bit grey PNG")
    colours = np.array(picture.convert("RGB"))
    if (colours != colours[..., :1]).any():
        raise DataError(f"{path} is a saliency map in colour; save it as a grey PNG, white where the objects are")
    return picture.convert("RGB").getchannel(0)


def _refuse_other_size(what: str, path: Path, part: Tensor, image_path: Path, image: Tensor) -> None:
    (height, width), (image_height, image_width) = part.shape, image.shape[1:]
    if (height, width) != (image_height, image_width):
        raise DataError(
            f"{what} {path} is {width} x {height} pixels, but its image {image_path} is {image_width} x "
            f"{image_height}; bring both to one size"
        )


def _within(root: Path, path: Path) -> Path:
    """A path relative to the data set, or, where it is not there, to where the program runs."""
    return root / path if (root / path).exists() else path


def _read_split(path: Path) -> list[tuple[int, str]]:
    """Line numbers and names of the images of a split list."""
    if not path.is_file():
        ready = sorted(other.stem for other in path.parent.glob("*.txt"))
        raise DataError(
            f"there is no split list {path}; set data.train_split and data.val_split to lists that exist there: "
            f"{', '.join(ready) or 'there are none'}"
        )
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as UTF-8 text: {error}") from error
    # Some lists of the field hold paths: /JPEGImages/2007_000032.jpg /SegmentationClassAug/2007_000032.png
    rows = [(line, row.split()) for line, row in enumerate(text.splitlines(), start=1)]
    listed = [(line, Path(row[0]).stem if row[0].startswith("/") else row[0]) for line, row in rows if row]
    if not listed:
        raise DataError(f"the split list {path} is empty; it must name one image per line")
    first: dict[str, int] = {}
    for line, image_id in listed:
        if first.setdefault(image_id, line) != line:
            raise DataError(f"{path}, line {line}: {image_id} is listed twice, before on line {first[image_id]}")
    return listed


def _augmented_list(folder: Path, val_list: Path) -> list[tuple[int, str]]:
    """Names of the images that have an augmented mask and are not for validation, numbered."""
    held_out = {name for _, name in _read_split(val_list)}
    names = [path.stem for path in list_files(folder, (".png",), "unpack SegmentationClassAug there")]
    return list(enumerate((name for name in names if name not in held_out), start=1))


def _image_labels(
    data: DataConfig,
    root: Path,
    image_ids: list[str],
    class_names: tuple[str, ...],
    masks: dict[str, Path],
    masks_folder: Path,
) -> list[tuple[int, ...]]:
    if data.label_source == "masks":
        return [_labels_of_mask(image_id, masks, masks_folder, len(class_names)) for image_id in image_ids]
    annotations = (root / "Annotations").is_dir()
    if data.label_source == "xml" or (data.label_source == "auto" and annotations):
        return [_labels_of_xml(root / "Annotations" / f"{image_id}.xml", class_names) for image_id in image_ids]
    if data.labels is None and data.label_source == "csv":
        raise DataError("data.label_source is 'csv' but data.labels is not set; give the CSV image,labels")
    path = _within(root, data.labels or Path("labels.csv"))
    rows = read_label_rows(path)
    numbers = {image_stem(row.image): _row_numbers(row, class_names, path) for row in rows}
    for image_id in image_ids:
        if image_id not in numbers:
            raise DataError(
                f"{path}: there is no line for {image_id}, an image without a label; add {image_id},<labels>"
            )
    return [numbers[image_id] for image_id in image_ids]


def _row_numbers(row: LabelRow, class_names: tuple[str, ...], path: Path) -> tuple[int, ...]:
    return class_numbers(row.labels, class_names, f"{path}, line {row.line}")


def _labels_of_xml(path: Path, class_names: tuple[str, ...]) -> tuple[int, ...]:
    if not path.is_file():
        raise DataError(
            f"there is no annotation {path}; add it, or set data.label_source=csv and data.labels to a CSV image,labels"
        )
    try:
        root = ElementTree.parse(path).getroot()
    except (ElementTree.ParseError, OSError, ValueError, LookupError) as error:  # the last two: an odd encoding
        raise DataError(f"{path} is no readable XML: {error}; fetch the annotation again") from error
    # Objects have parts with names of their own (head, hand), one level deeper: findall does not go there.
    names = {(element.findtext("name") or "").strip() for element in root.findall("object")}
    known = sorted(names.intersection(class_names))
    if not known:
        found = f"only {', '.join(sorted(names))}" if names else "no object at all"
        raise DataError(
            f"{path}: an image without a label, {found}; take the image out of the split list or add the class to "
            "data.class_names"
        )
    return class_numbers(known, class_names, str(path))


def _labels_of_mask(image_id: str, masks: dict[str, Path], folder: Path, num_classes: int) -> tuple[int, ...]:
    if image_id not in masks:
        raise DataError(
            f"data.label_source is 'masks', but there is no mask {image_id}.png in {folder}; add it, set data.masks, "
            "or take the labels from xml or csv"
        )
    mask = read_mask(masks[image_id])
    check_mask_values(mask, num_classes, masks[image_id])
    numbers = tuple(value - 1 for value in mask_values(mask) if value not in (0, VOID_LABEL))
    if not numbers:
        raise DataError(f"{masks[image_id]} is all background: an image without a label; take it out of the split list")
    return numbers

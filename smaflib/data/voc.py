"""The folder layout of PASCAL VOC.

``JPEGImages``, ``ImageSets/Segmentation/<split>.txt``, image labels from ``Annotations`` or a CSV, and optionally
``SegmentationClass`` and a folder of saliency maps. The mini set has the same layout.
"""

import functools
import os
import re
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import get_args

import numpy as np
import torch
import torchvision.transforms.v2.functional as F
from PIL import ImageOps
from torch import Tensor
from torchvision.transforms import InterpolationMode

from smaflib.config import DataConfig, Split
from smaflib.data.classes import VOC_CLASSES
from smaflib.data.labels import IMAGE_ENDINGS, check_class_names, class_numbers, image_stem, nearest, read_label_rows
from smaflib.data.masks import check_mask_values, decoding, read_mask
from smaflib.data.sample import Sample, SampleFiles, Samples
from smaflib.data.transforms import working_size
from smaflib.errors import DataError
from smaflib.files import compose, read_text

SPLITS: tuple[Split, ...] = get_args(Split)


def load_voc(data: DataConfig, split: Split) -> Samples:
    """The samples of one split in VOC layout, nothing decoded yet.

    Image labels come from ``data.label_source``. In XML every object counts, ``difficult`` ones too, as in the label
    lists of the field; unknown classes are ignored, so that ``data.class_names`` may be a subset of VOC's 20.

    Images may lack a mask, but not a saliency map once ``data.saliency`` is set.
    """
    assert data.root is not None  # Config has checked it
    class_names = data.class_names or tuple(VOC_CLASSES)
    check_class_names(class_names)
    images = _read_split(data, split)
    masks_folder = data.masks or data.root / "SegmentationClass"
    masks = list_pngs(masks_folder if data.masks or masks_folder.is_dir() else None, "data.masks")
    annotations = data.root / "Annotations"
    if data.label_source == "xml" or (data.label_source == "auto" and annotations.is_dir()):
        files = {compose(path.stem): path for path in annotations.glob("*.xml")}
        names = {image_id: _names_in_xml(files.get(image_id, annotations / f"{image_id}.xml")) for image_id in images}
        if split == "train" and not data.max_images:  # a part of the images may lack a class
            _check_class_names(class_names, set().union(*names.values()))
        labels = {key: tuple(k for k, name in enumerate(class_names) if name in found) for key, found in names.items()}
    else:
        path = data.labels or data.root / "labels.csv"
        rows = read_label_rows(path)
        require_all(list(images), rows, f"line in {path}", "add <image>,<labels>")
        labels = {
            image_id: class_numbers(rows[image_id].labels, class_names, f"{path}, line {rows[image_id].line}")
            for image_id in images
        }
    # VOC's masks were drawn over the pixels as stored: an EXIF orientation must not rotate the image.
    return make_samples(data, split, class_names, images, labels, masks, oriented=False)


def make_samples(
    data: DataConfig,
    split: Split,
    class_names: tuple[str, ...],
    images: dict[str, Path],
    labels: dict[str, tuple[int, ...]],
    masks: dict[str, Path],
    oriented: bool,
) -> Samples:
    """The samples of the images that have ``labels``, in that order; the training split needs all saliency maps."""
    saliency = list_pngs(data.saliency, "data.saliency")
    if data.saliency and split == "train":
        require_all(list(labels), saliency, f"saliency map in {data.saliency}", "add it or correct data.saliency")
    files = tuple(
        SampleFiles(image_id, images[image_id], numbers, saliency.get(image_id), masks.get(image_id))
        for image_id, numbers in labels.items()
    )
    read = functools.partial(read_sample, oriented=oriented)
    return Samples(files, class_names, split, read, cached=data.cache)


def read_sample(files: SampleFiles, num_classes: int, oriented: bool) -> Sample:
    """Decode all parts of a sample that ``files`` names; ``oriented``: turn it by EXIF, as image viewers do."""
    image = read_image(files.image, oriented)
    image_label = torch.zeros(num_classes)
    image_label[list(files.labels)] = 1
    saliency = read_saliency(files.saliency) if files.saliency else None
    mask = read_mask(files.mask) if files.mask else None
    for what, path, part in (("saliency map", files.saliency, saliency), ("mask", files.mask, mask)):
        if part is not None and part.shape != image.shape[1:]:
            size = f"its image {files.image} is {image.shape[2]} x {image.shape[1]}; bring both to one size"
            raise DataError(f"the {what} {path} is {part.shape[1]} x {part.shape[0]} pixels, but {size}")
    if mask is not None:
        check_mask_values(mask, num_classes, files.mask)
    return Sample(files.image_id, image, image_label, saliency, mask)


def read_image(path: Path, oriented: bool = False, side: int | None = None, content: bytes | None = None) -> Tensor:
    """Read an image as uint8 (3, H, W), RGB; transparency is dropped. ``side``: pixels that are enough."""
    with decoding(path, content) as picture:
        if side:  # libjpeg decodes a phone's photo smaller, in a fraction of the time
            picture.draft("RGB", (2 * side, 2 * side))
        # Pillow keeps the upper 8 bits of 16-bit colours, which makes some images black.
        if picture.mode.startswith(("I", "F")) or ";16" in str(getattr(picture, "tile", "")):
            raise DataError(f"{path} has more than 8 bits per channel (mode {picture.mode}); save it with 8 bits")
        upright = ImageOps.exif_transpose(picture) if oriented else picture
        pixels = np.array(upright.convert("RGB"))  # (H, W, 3)
        return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))


def open_image(path: str | Path, longest_side: int = 512, content: bytes | None = None) -> Tensor:
    """Read a photo as uint8 (3, H, W), RGB, upright; a larger one is shrunk to ``longest_side`` pixels.

    ``content`` is that of a file which is not on this disk; ``path`` is its name. DataError if there is no such file,
    or it is no JPEG, PNG or WebP image.
    """
    image = read_image(Path(path), True, longest_side, content)
    height, width = working_size(image.shape[1:], longest_side)
    return F.resize(image, [height, width], InterpolationMode.BICUBIC) if height < image.shape[1] else image


def read_saliency(path: Path) -> Tensor:
    """Read a grey image, which may be stored as RGB, as float32 (H, W) in [0, 1]."""
    channels = read_image(path)
    if (channels != channels[:1]).any():
        raise DataError(f"{path} is no saliency map, it has colours; save it as an 8-bit grey PNG")
    if channels.max() == 1:
        raise DataError(f"{path} holds 0 and 1 where 255 is salient: multiply it by 255, or by 0 if nothing is")
    return channels[0].float() / 255


def list_files(folder: Path, endings: Sequence[str], cure: str, below: bool = False) -> list[Path]:
    """Files of a folder, then of its subfolders (``below``), with one of these extensions, by name; no hidden ones."""
    if not folder.is_dir():
        raise DataError(f"there is no folder {folder}; {cure}")
    shown = {entry.name: entry for entry in os.scandir(folder) if not entry.name.startswith(".")}
    names = [name for name in sorted(shown) if name.lower().endswith(tuple(endings)) and shown[name].is_file()]
    inside = [folder / name for name in sorted(shown) if below and shown[name].is_dir()]
    return [folder / name for name in names] + [path for each in inside for path in list_files(each, endings, cure)]


def find_images(rows: Sequence[str], folder: Path, setting: str, cure: str) -> dict[str, Path]:
    """The images that ``rows`` of a list name, by id: a name, a path, an image's and a mask's path, VOC's ``a -1``.

    A DataError if one is missing, or if two would share a mask: ``a.jpg`` and ``a.png``, on a Mac also ``A``.
    """
    paths = list_files(folder, IMAGE_ENDINGS, setting, below=True)
    files = [(compose(path.relative_to(folder).as_posix()), path) for path in paths]
    count = Counter(image_stem(name) for name, _ in files if "/" not in name)
    # Reversed, so that a name without a folder is the file beside the subfolders.
    by_name = {image_stem(name): path for name, path in reversed(files) if count[image_stem(name)] == 1} | dict(files)
    names: dict[str, str] = {}  # by what their masks are called where case does not matter
    for row in map(compose, rows):
        first = re.match(rf".+?({'|'.join(IMAGE_ENDINGS)})(?=\s)", row, re.IGNORECASE)
        name = first[0] if first else row
        tried = (row, re.split(r"[/\\]", name)[-1], image_stem(name), image_stem(re.sub(r"\s+-?[01]$", "", name)))
        found = next((each for each in tried if each in by_name), row)
        if other := names.get(key := image_stem(found).casefold()):
            raise DataError(f"{other} and {row} would share the mask {image_stem(found)}.png; rename one, or {cure}")
        names[key] = found
    require_all(list(names.values()), by_name, f"image in {folder}", cure)
    return {image_stem(name): by_name[name] for name in names.values()}


def list_pngs(folder: Path | None, setting: str) -> dict[str, Path]:
    """The masks or saliency maps of a folder by image; none without a folder."""
    if folder is None:
        return {}
    return {compose(path.stem): path for path in list_files(folder, (".png",), f"correct {setting} or leave it out")}


def require_all(image_ids: Sequence[str], there: Collection[str], what: str, cure: str) -> None:
    """Raise a :class:`DataError` with their number and the first three, if images lack a file."""
    if missing := [image_id for image_id in image_ids if image_id not in there]:
        few = f"{', '.join(missing[:3])}{nearest(missing[0], there)} ({len(missing)} of {len(image_ids)} missing)"
        raise DataError(f"there is no {what} for {few}; {cure}")


def _read_split(data: DataConfig, split: Split) -> dict[str, Path]:
    """The images of a split list by id."""
    assert data.root is not None
    path = data.split_list(split)
    if not path.is_file():
        ready = ", ".join(sorted(other.stem for other in path.parent.glob("*.txt"))) or "none"
        raise DataError(f"there is no split list {path}; data.train_split and data.val_split can be: {ready}")
    rows = list(dict.fromkeys(filter(None, map(str.strip, read_text(path).splitlines()))))
    cure = "set data.root to the folder that holds it"
    return find_images(rows[: data.max_images], data.root / "JPEGImages", cure, f"correct the list {path}")


def _names_in_xml(path: Path) -> set[str]:
    try:
        root = ElementTree.parse(path).getroot()
    except (OSError, ElementTree.ParseError) as error:
        raise DataError(f"{path} cannot be read ({error}); add it, or set data.label_source=csv") from error
    # Parts of an object (head, hand) are one level deeper; findall does not go there.
    return {compose(name.text or "").strip() for name in root.findall("object/name")}


def _check_class_names(class_names: Sequence[str], found: set[str]) -> None:
    """Refuse class names without an object where objects are without a class; one of VOC's 20 may just be rare."""
    rare = VOC_CLASSES if found.intersection(class_names) else ()
    absent = [name for name in class_names if name not in found and name not in rare]
    if absent and (unknown := sorted(found.difference(class_names))):
        hint = f"{nearest(absent[0], unknown)}; they have {', '.join(unknown)}, which are no classes"
        raise DataError(f"data.class_names: no XML of the split has {absent[0]!r}{hint}")

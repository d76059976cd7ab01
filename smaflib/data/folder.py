"""Custom images: a folder of images and a CSV with their labels."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

from smaflib.config import DataConfig, Split
from smaflib.data.labels import IMAGE_ENDINGS, LabelRow, check_class_names, class_numbers, nearest, read_label_rows
from smaflib.data.sample import Samples
from smaflib.data.voc import list_files, list_pngs, make_samples, require_all
from smaflib.errors import DataError


def load_folder(data: DataConfig, split: Split) -> Samples:
    """The images that ``data.labels`` names, in its order; others are ignored. Nothing is decoded yet.

    All of them are the training split; ``val`` is empty. Without ``data.class_names`` the classes are the names in the
    CSV in alphabetical order. Images are rotated according to their EXIF orientation; masks and saliency maps must fit
    the rotated image.
    """
    assert data.images is not None and data.labels is not None  # Config has checked it
    if data.label_source == "masks":
        raise DataError("data.label_source: masks needs data.kind: voc; a folder of images takes its labels from a CSV")
    if data.masks and not data.class_names:
        raise DataError("data.masks needs data.class_names, in the order of the mask values 1 to K")
    rows = read_label_rows(data.labels)
    class_names = data.class_names or tuple(sorted({name for row in rows for name in row.labels}))
    check_class_names(class_names)
    by_name, images, labels = _images_by_name(data.images), {}, {}
    for row in rows:
        where = f"{data.labels}, line {row.line}"
        image = _find_image(row, by_name, data.images, where)
        images[image.stem] = image
        labels[image.stem] = class_numbers(row.labels, class_names, where)
    masks = list_pngs(data.masks, "data.masks")
    if data.masks:
        require_all(list(labels), masks, f"mask in {data.masks}", "add it or leave data.masks empty")
    samples = make_samples(data, split, class_names, images, labels, masks, oriented=True)
    return samples[: data.max_images] if split == "train" else samples[:0]


def _images_by_name(folder: Path) -> dict[str, list[Path]]:
    """Images by name, with and without extension; without, there may be several."""
    paths = list_files(folder, IMAGE_ENDINGS, "set data.images to the folder of images")
    by_stem: dict[str, list[Path]] = defaultdict(list)
    for path in paths:
        by_stem[path.stem].append(path)
    return {**by_stem, **{path.name: [path] for path in paths}}


def _find_image(row: LabelRow, images: dict[str, list[Path]], folder: Path, where: str) -> Path:
    found = images.get(row.image, [])
    if len(found) > 1:
        names = " and ".join(path.name for path in found)
        raise DataError(f"{where}: {row.image} could be {names} in {folder}; write the extension too")
    if not found:
        raise DataError(
            f"{where}: there is no image {row.image} in {folder}{nearest(row.image, list(images))}; write the file "
            f"name only, with the extension {', '.join(IMAGE_ENDINGS)} or none"
        )
    return found[0]

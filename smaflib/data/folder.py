"""Custom images: a folder of images and a CSV with their labels."""

from __future__ import annotations

import functools
from collections import defaultdict
from pathlib import Path

from smaflib.config import DataConfig, Split
from smaflib.data.labels import IMAGE_ENDINGS, LabelRow, check_class_names, class_numbers, nearest, read_label_rows
from smaflib.data.sample import SampleFiles, Samples
from smaflib.data.voc import list_files, list_pngs, read_sample, require_all
from smaflib.errors import DataError

read_upright = functools.partial(read_sample, oriented=True)


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
    images = _images_by_name(data.images)
    masks = list_pngs(data.masks, "data.masks")
    saliency = list_pngs(data.saliency, "data.saliency")

    files = []
    for row in rows:
        where = f"{data.labels}, line {row.line}"
        numbers = class_numbers(row.labels, class_names, where)
        image = _find_image(row, images, data.images, where)
        files.append(SampleFiles(image.stem, image, numbers, saliency.get(image.stem), masks.get(image.stem)))
    image_ids = [each.image_id for each in files]
    if data.masks:
        require_all(image_ids, masks, f"mask in {data.masks}", "add it or leave data.masks empty")
    if data.saliency:
        require_all(image_ids, saliency, f"saliency map in {data.saliency}", "add it or leave data.saliency empty")
    chosen = tuple(files[: data.max_images]) if split == "train" else ()
    return Samples(chosen, class_names, split, read_upright, cached=data.cache)


def unlabelled_samples(images: Path, class_names: tuple[str, ...]) -> Samples:
    """All images of a folder, without labels: to be classified."""
    paths = list_files(images, IMAGE_ENDINGS, "name the folder of images")
    if not paths:
        raise DataError(f"there is no image in {images}; {', '.join(IMAGE_ENDINGS)} files are read")
    return Samples(tuple(SampleFiles(path.stem, path, ()) for path in paths), class_names, "train", read_upright)


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

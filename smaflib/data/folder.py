"""Custom images: a folder of images and a CSV with their labels."""

from __future__ import annotations

from smaflib.config import DataConfig, Split
from smaflib.data.labels import check_class_names, class_numbers, image_stem, read_label_rows
from smaflib.data.sample import Samples
from smaflib.data.voc import find_images, list_pngs, make_samples, require_all
from smaflib.errors import DataError


def load_folder(data: DataConfig, split: Split) -> Samples:
    """The images that ``data.labels`` names, in its order; others are ignored. Nothing is decoded yet.

    All of them are the training split; ``val`` is empty. Without ``data.class_names`` the classes are the names in the
    CSV in alphabetical order. Images are rotated according to their EXIF orientation; masks and saliency maps must fit
    the rotated image.
    """
    assert data.images is not None and data.labels is not None  # Config has checked it
    if data.masks and not data.class_names:
        raise DataError("data.masks needs data.class_names, in the order of the mask values 1 to K")
    rows = read_label_rows(data.labels).values()
    class_names = data.class_names or tuple(sorted({name for row in rows for name in row.labels}))
    check_class_names(class_names)
    if not class_names:
        raise DataError(f"{data.labels}: no image has a label")
    setting = "set data.images to the folder of images"
    images = find_images(
        [row.image for row in rows], data.images, setting, f"correct {data.labels}, with extensions where needed"
    )
    labels = {
        image_stem(row.image): class_numbers(row.labels, class_names, f"{data.labels}, line {row.line}") for row in rows
    }
    masks = list_pngs(data.masks, "data.masks")
    if data.masks and masks.keys().isdisjoint(labels):  # images without one are left out of the evaluation
        require_all(list(labels), masks, f"mask in {data.masks}", "add it or leave data.masks empty")
    samples = make_samples(data, split, class_names, images, labels, masks, oriented=True)
    return samples[: data.max_images] if split == "train" else samples[:0]

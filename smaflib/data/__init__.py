"""Data sets: whatever the layout on disk, each one yields :class:`Sample` objects.

If data is missing, damaged or does not fit, a :class:`~smaflib.errors.DataError` names the file and the cure.
"""

from dataclasses import replace
from pathlib import Path

import torch

from smaflib.config import Config, DataConfig, Split
from smaflib.data.coco import load_coco
from smaflib.data.labels import check_class_names, class_numbers, image_stem, read_label_rows
from smaflib.data.prepare import make_data, summarize
from smaflib.data.sample import Sample, SampleFiles, Samples
from smaflib.data.voc import find_images, list_pngs, load_voc, make_samples, require_all
from smaflib.errors import ConfigError, DataError
from smaflib.plugins import is_custom, load_custom

__all__ = ["Sample", "SampleFiles", "Samples", "load_samples", "make_data", "summarize"]


def load_samples(config: Config, split: Split, run_folder: Path | None = None) -> Samples:
    """The samples of one split of the configured data set.

    Files are located and labels checked for the whole split; images are decoded when a sample is indexed.

    Custom images (kind ``folder``) have an empty ``val``. ``run_folder`` contains the mini set, in its folder ``data``,
    unless ``data.root`` is set. DataError if something is missing or does not fit, ConfigError if a custom data set
    cannot be loaded or breaks its contract.
    """
    data = config.data
    if is_custom(data.kind):
        samples = _load_custom(data, split)
    elif data.kind == "folder":
        samples = _load_folder(data, split)
    elif data.kind == "coco":
        samples = load_coco(data, split, run_folder)
    else:
        samples = load_voc(data if data.kind == "voc" else _mini_as_voc(data, run_folder), split)
    return replace(samples, longest_side=samples.longest_side or data.longest_side)


def _load_folder(data: DataConfig, split: Split) -> Samples:
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


def _load_custom(data: DataConfig, split: Split) -> Samples:
    """Call the function that ``data.kind`` names; check names and labels, and read the first sample."""
    samples: Samples = load_custom(data.kind)(data, split)
    check_class_names(samples.class_names)
    samples = replace(samples, split=split, cached=samples.cached or data.cache)
    num_classes, names = len(samples.class_names), set()
    if split == "train" and not samples.files:
        raise ConfigError(f"{data.kind}: the training split is empty")
    for files in samples.files:
        if files.image_id in names or Path(files.image_id).name != files.image_id:
            raise ConfigError(f"{data.kind}: the image_id {files.image_id!r} is given twice or cannot be a file name")
        if not set(files.labels) <= set(range(num_classes)):
            raise ConfigError(
                f"{data.kind}: the labels of {files.image_id} are {files.labels}, not below {num_classes}"
            )
        names.add(files.image_id)
    for sample in samples[:1]:
        if sample.image.dtype != torch.uint8 or not torch.equal(sample.image_label, samples.image_labels[0]):
            raise ConfigError(
                f"{data.kind}: {sample.image_id} needs an image of uint8 and the image_label of its files"
            )
    return samples[: data.max_images]


def _mini_as_voc(data: DataConfig, run_folder: Path | None) -> DataConfig:
    """The settings that make the VOC loader read the mini set."""
    from minidata import CLASS_NAMES  # minidata imports this package

    root = data.root or (run_folder / "data" if run_folder else None)
    if root is None or not root.is_dir():
        maker = "notebook 01 or `smaf run CONFIG --until data`"
        raise DataError(f"there is no mini data set in {root}; {maker} makes it: give run_folder, or set data.root")
    tables = {"labels": data.labels or root / "labels.csv", "saliency": data.saliency or root / "Saliency"}
    return data.model_copy(update={"root": root, "class_names": CLASS_NAMES, "label_source": "csv"} | tables)

"""Data sets: whatever the layout on the disk, each yields the same :class:`Sample`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from smaflib.config import Config, DataConfig
from smaflib.data.coco import coco_masks_folder, load_coco
from smaflib.data.folder import load_folder
from smaflib.data.masks import MaskFiles, ground_truth_of, save_mask
from smaflib.data.own import load_own
from smaflib.data.prepare import make_data, summarize
from smaflib.data.sample import Sample, SampleFiles, Samples
from smaflib.data.voc import load_voc
from smaflib.errors import DataError
from smaflib.plugins import DATA

__all__ = [
    "DataError",
    "MaskFiles",
    "Sample",
    "SampleFiles",
    "Samples",
    "load_samples",
    "make_data",
    "save_mask",
    "summarize",
    "ground_truth_of",
]


def load_samples(config: Config, split: Literal["train", "val"], run_folder: Path | None = None) -> Samples:
    """The samples of one split of the configured data set.

    Files are located and labels checked here, for the whole split; pictures are decoded when a sample is read.

    Args:
        config: its ``data`` part says where and what.
        split: ``train`` or ``val``; custom images (kind ``folder``) have no ``val``, it is empty.
        run_folder: where kind ``mini`` lies (in its folder ``data``) if ``data.root`` is not set.

    Raises:
        DataError: if something is missing or does not fit; the message names the file and the cure.
        PluginError: if a data set of somebody's own is not what it must be.
    """
    if DATA.is_own(config.data.kind):
        return load_own(config.data, split)
    if config.data.kind == "folder":
        return load_folder(config.data, split)
    if config.data.kind == "coco":
        return load_coco(config.data, split, run_folder and coco_masks_folder(config.data, split, run_folder))
    if config.data.kind == "voc":
        return load_voc(config.data, split)
    return load_voc(_mini_as_voc(config.data, run_folder), split)


def _mini_as_voc(data: DataConfig, run_folder: Path | None) -> DataConfig:
    """The settings that make the VOC loader read the mini set."""
    from minidata import CLASS_NAMES  # minidata imports this package

    root = data.root or (run_folder / "data" if run_folder else None)
    if root is None:
        raise DataError("the mini data set lies in the folder of a run: give run_folder, or set data.root")
    if not root.is_dir():
        raise DataError(
            f"there is no mini data set in {root}; notebook 01 makes it, as does `smaf run CONFIG --until data`"
        )
    if data.class_names and data.class_names != tuple(CLASS_NAMES):
        raise DataError(f"data.class_names cannot be chosen for the mini data set: it has {', '.join(CLASS_NAMES)}")
    return data.model_copy(
        update={
            "root": root,
            "class_names": tuple(CLASS_NAMES),
            "label_source": "masks" if data.label_source == "masks" else "csv",
            "labels": data.labels or root / "labels.csv",
            "saliency": data.saliency or root / "Saliency",
        }
    )

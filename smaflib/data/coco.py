"""COCO 2014 and 2017: images, and a JSON file of instances per split that labels and masks come from.

``<root>/<split>/`` holds the images and ``<root>/annotations/instances_<split>.json`` their instances, as the official
archives unpack: ``train2014``, ``val2014``, ``train2017``, ``val2017``.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from smaflib.config import DataConfig, Split
from smaflib.data.classes import COCO_CLASSES
from smaflib.data.labels import IMAGE_ENDINGS, check_class_names
from smaflib.data.masks import save_mask
from smaflib.data.sample import Samples
from smaflib.data.voc import list_files, list_pngs, make_samples, require_all
from smaflib.errors import DataError
from smaflib.runtime import progress


def load_coco(data: DataConfig, split: Split, run_folder: Path | None = None) -> Samples:
    """The samples of one split, nothing decoded yet.

    The image label holds the classes of all instances, crowds included. Images without any instance of
    ``data.class_names`` are left out, as in the field: 82,081 of 82,783 images of train2014 remain, 40,137 of 40,504
    of val2014. Without ``data.masks`` the PNGs that :func:`write_coco_masks` painted in the run folder are used.
    """
    assert data.root is not None  # Config has checked it
    name, class_names = _split_name(data, split), data.class_names or COCO_CLASSES
    check_class_names(class_names)
    instances, _ = _read_instances(data, split)
    labels = {Path(image["file_name"]).stem: tuple(sorted({k for k, _ in found})) for image, found in instances}
    folder = data.root / name
    images = {path.stem: path for path in list_files(folder, IMAGE_ENDINGS, f"unpack {name}.zip into {data.root}")}
    require_all(list(labels), images, f"image in {folder}", f"unpack {name}.zip again")
    if not labels:
        raise DataError(f"{name} has no image of {', '.join(class_names)}; check data.class_names")
    painted = run_folder / "data" / name if run_folder else None
    masks = list_pngs(data.masks or (painted if painted and painted.is_dir() else None), "data.masks")
    # COCO's annotations were drawn over the pixels as stored.
    return make_samples(data, split, class_names, images, labels, masks, oriented=False)


def write_coco_masks(data: DataConfig, split: Split, run_folder: Path) -> None:
    """Paint the instances of a split into palette PNGs below ``data`` of a run, for evaluation; existing ones are kept.

    Large instances are painted first, so that a table does not hide what is on it. A crowd is painted as its class,
    like a single instance. Pixels of classes outside ``data.class_names`` are background.
    """
    name = _split_name(data, split)
    instances, to_mask = _read_instances(data, split)
    for image, found in progress(instances, total=len(instances), desc=f"masks of {name}"):
        path = run_folder / "data" / name / f"{Path(image['file_name']).stem}.png"
        if path.is_file():
            continue
        mask = np.zeros((image["height"], image["width"]), dtype=np.uint8)
        try:
            for number, instance in sorted(found, key=lambda each: -each[1]["area"]):
                mask[to_mask(instance).astype(bool)] = number + 1
        except Exception as error:  # what pycocotools raises
            raise DataError(f"{name}: an instance of {path.stem} has no valid outline: {error!r}") from error
        save_mask(path, mask)


def _split_name(data: DataConfig, split: Split) -> str:
    return data.train_split if split == "train" else data.val_split


def _read_instances(
    data: DataConfig, split: Split
) -> tuple[list[tuple[dict[str, Any], list[tuple[int, dict[str, Any]]]]], Callable[[dict[str, Any]], np.ndarray]]:
    """Images with an instance of a class, each with pairs of class number and instance; and how to draw an instance."""
    assert data.root is not None
    path = data.root / "annotations" / f"instances_{_split_name(data, split)}.json"
    if not path.is_file():
        raise DataError(
            f"there is no file {path}; unpack the annotations of COCO into {data.root}, and set data.train_split and "
            "data.val_split to names such as train2014 and val2014"
        )
    try:
        from pycocotools.coco import COCO
    except ImportError as error:
        raise DataError("data.kind: coco needs pycocotools; install it: pip install pycocotools") from error
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # it prints its progress
            coco = COCO(path)
    except Exception as error:  # a damaged file breaks pycocotools anywhere
        raise DataError(f"{path} is no complete file of COCO instances ({error!r:.200}); unpack it again") from error
    number_of = {name: number for number, name in enumerate(data.class_names or COCO_CLASSES)}
    images = []
    for image_number in sorted(coco.imgs):
        found = [(coco.cats[each["category_id"]]["name"], each) for each in coco.imgToAnns.get(image_number, ())]
        if known := [(number_of[name], each) for name, each in found if name in number_of]:
            images.append((coco.imgs[image_number], known))
    return images[: data.max_images], coco.annToMask

"""COCO 2014 and 2017: images, and one JSON file of instances per split that labels and masks come from.

``<root>/<split>/`` holds the images and ``<root>/annotations/instances_<split>.json`` their instances, as the official
archives unpack: ``train2014``, ``val2014``, ``train2017``, ``val2017``.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from smaflib.config import DataConfig, Split
from smaflib.data.classes import COCO_CLASSES
from smaflib.data.labels import check_class_names, class_numbers
from smaflib.data.masks import save_mask
from smaflib.data.sample import SampleFiles, Samples
from smaflib.data.voc import list_pngs, read_sample, require_saliency
from smaflib.errors import DataError
from smaflib.files import is_plain_name
from smaflib.runtime import progress


def load_coco(data: DataConfig, split: Split, masks_folder: Path | None = None) -> Samples:
    """The samples of one split, nothing decoded yet.

    The image label holds the classes of all instances, crowds included. Images without any instance of
    ``data.class_names`` are left out, as in this field: 82,081 of 82,783 images of train2014 remain, 40,137 of 40,504
    of val2014. With ``data.max_images`` only the first of the remaining ones are taken.

    Args:
        data: ``root``, ``train_split`` and ``val_split`` (``train2014``), ``class_names``, ``saliency``, ``masks``.
        split: which of the two.
        masks_folder: PNGs that :func:`write_coco_masks` made, used where ``data.masks`` is not set.

    Raises:
        DataError: naming the file and the cure, if the JSON file, an image or a saliency map is missing or damaged.
    """
    root, name = _root_and_name(data, split)
    class_names = data.class_names or COCO_CLASSES
    check_class_names(class_names)
    coco = read_instances(root, name)
    present = _classes_by_image(coco, class_names)
    folder = root / name
    if not folder.is_dir():
        raise DataError(f"there is no folder {folder} of images; unpack {name}.zip into {root}")
    painted = masks_folder if masks_folder and masks_folder.is_dir() else None
    masks_folder = data.masks or painted
    masks = list_pngs(masks_folder, "data.masks") if masks_folder else {}
    saliency_folder = data.saliency
    saliency = list_pngs(saliency_folder, "data.saliency") if saliency_folder else {}

    files = []
    for number in sorted(present)[: data.max_images]:
        file_name = str(coco.imgs[number]["file_name"])
        if not is_plain_name(file_name):
            raise DataError(
                f"{_json_path(root, name)} lists an image {file_name[:100]!r}, which is no plain file name; all images "
                f"lie in {folder}"
            )
        path = folder / file_name
        if not path.is_file():
            raise DataError(f"there is no image {path}, which {_json_path(root, name)} lists; unpack {name}.zip again")
        if saliency_folder and split == "train":
            require_saliency([path.stem], saliency, saliency_folder)
        labels = class_numbers(sorted(present[number]), class_names, str(path))
        files.append(SampleFiles(path.stem, path, labels, saliency.get(path.stem), masks.get(path.stem)))
    if not files:
        raise DataError(f"{_json_path(root, name)} has no image of {', '.join(class_names)}; check data.class_names")
    # COCO's annotations were drawn over the pixels as stored.
    read = functools.partial(read_sample, oriented=False)
    return Samples(tuple(files), class_names, split, read, cached=data.cache)


def write_coco_masks(data: DataConfig, split: Split, folder: Path) -> None:
    """Paint the instances of a split into palette PNGs, for evaluation; images that have theirs already are skipped.

    Large instances are painted first, so that what lies on a table is not hidden by it. A crowd is painted as its
    class, like a single instance. Pixels of classes outside ``data.class_names`` are background.

    Args:
        data: as for :func:`load_coco`.
        split: which of the two.
        folder: takes ``<image_id>.png``, uint8 with 0 background and 1 to K the classes.

    Raises:
        DataError: if the JSON file is missing or damaged.
    """
    root, name = _root_and_name(data, split)
    class_names = data.class_names or COCO_CLASSES
    coco = read_instances(root, name)
    value_of = {number: class_names.index(label) + 1 for number, label in _names(coco).items() if label in class_names}
    numbers = sorted(_classes_by_image(coco, class_names))[: data.max_images]
    for number in progress(numbers, total=len(numbers), desc=f"masks of {name}"):
        facts = coco.imgs[number]
        path = folder / f"{Path(facts['file_name']).stem}.png"
        if path.is_file():
            continue
        mask = np.zeros((facts["height"], facts["width"]), dtype=np.uint8)
        instances = [instance for instance in coco.imgToAnns[number] if instance["category_id"] in value_of]
        for instance in sorted(instances, key=lambda instance: -float(instance["area"])):
            mask[coco.annToMask(instance).astype(bool)] = value_of[instance["category_id"]]
        save_mask(path, mask)


def coco_masks_folder(data: DataConfig, split: Split, run_folder: Path) -> Path:
    """Where a run keeps the masks that it paints."""
    return run_folder / "data" / (data.train_split if split == "train" else data.val_split)


def read_instances(root: Path, name: str) -> Any:
    """The ``pycocotools.coco.COCO`` of a split.

    Raises:
        DataError: if the file is missing, damaged or no list of instances.
    """
    path = _json_path(root, name)
    if not path.is_file():
        raise DataError(
            f"there is no file {path}; unpack the annotations of COCO into {root}, and set data.train_split and "
            "data.val_split to names such as train2014 and val2014"
        )
    try:
        from pycocotools.coco import COCO
    except ImportError as error:
        raise DataError("data.kind 'coco' needs pycocotools; install it: pip install pycocotools") from error
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # it prints how long it took
            return COCO(str(path))
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AssertionError) as error:
        raise DataError(f"{path} is no complete file of COCO instances ({error!r}); unpack it again") from error


def _root_and_name(data: DataConfig, split: Split) -> tuple[Path, str]:
    if data.root is None:
        raise DataError("data.root is not set; give the folder that holds annotations/ and the folders of images")
    return data.root, data.train_split if split == "train" else data.val_split


def _json_path(root: Path, name: str) -> Path:
    return root / "annotations" / f"instances_{name}.json"


def _names(coco: Any) -> dict[int, str]:
    """Class names by COCO's category ids, which run from 1 to 90 with gaps."""
    return {number: str(facts["name"]) for number, facts in coco.cats.items()}


def _classes_by_image(coco: Any, class_names: Iterable[str]) -> dict[int, set[str]]:
    """Names of the classes in each image that has one, by COCO's image ids."""
    names, wanted = _names(coco), set(class_names)
    present: dict[int, set[str]] = {}
    for instance in coco.anns.values():
        name = names.get(instance["category_id"])
        if name in wanted and instance["image_id"] in coco.imgs:
            present.setdefault(instance["image_id"], set()).add(name)
    return present

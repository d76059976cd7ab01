"""COCO 2014 and 2017: images, and a JSON file of instances per split that labels and masks come from.

``<root>/<split>/`` holds the images and ``<root>/annotations/instances_<split>.json`` their instances, as the official
archives unpack: ``train2014``, ``val2014``, ``train2017``, ``val2017``.
"""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from smaflib.config import DataConfig, Split
from smaflib.data.classes import COCO_CLASSES
from smaflib.data.labels import IMAGE_ENDINGS, check_class_names, class_numbers
from smaflib.data.masks import save_mask
from smaflib.data.sample import Samples
from smaflib.data.voc import list_files, list_pngs, make_samples, require_all
from smaflib.errors import DataError
from smaflib.runtime import progress

if TYPE_CHECKING:
    from pycocotools.coco import COCO


def load_coco(data: DataConfig, split: Split, masks_folder: Path | None = None) -> Samples:
    """The samples of one split, nothing decoded yet.

    The image label holds the classes of all instances, crowds included. Images without any instance of
    ``data.class_names`` are left out, as in the field: 82,081 of 82,783 images of train2014 remain, 40,137 of 40,504
    of val2014.

    Args:
        data: ``root``, ``train_split`` and ``val_split``, ``class_names``, ``saliency``, ``masks``, ``max_images``.
        split: which of the two.
        masks_folder: PNGs of :func:`write_coco_masks`, used if ``data.masks`` is not set.
    """
    assert data.root is not None  # Config has checked it
    name, class_names = _split_name(data, split), data.class_names or COCO_CLASSES
    check_class_names(class_names)
    coco = read_instances(data.root, name)
    labels = {
        Path(coco.imgs[number]["file_name"]).stem: class_numbers(sorted(names), class_names, name)
        for number, names in _present(data, coco, class_names)
    }
    folder = data.root / name
    images = {path.stem: path for path in list_files(folder, IMAGE_ENDINGS, f"unpack {name}.zip into {data.root}")}
    require_all(list(labels), images, f"image in {folder}", f"unpack {name}.zip again")
    if not labels:
        raise DataError(f"{name} has no image of {', '.join(class_names)}; check data.class_names")
    painted = masks_folder if masks_folder and masks_folder.is_dir() else None
    masks = list_pngs(data.masks or painted, "data.masks")
    # COCO's annotations were drawn over the pixels as stored.
    return make_samples(data, split, class_names, images, labels, masks, oriented=False)


def write_coco_masks(data: DataConfig, split: Split, folder: Path) -> None:
    """Paint the instances of a split into palette PNGs, for evaluation; existing ones are kept.

    Large instances are painted first, so that a table does not hide what is on it. A crowd is painted as its class,
    like a single instance. Pixels of classes outside ``data.class_names`` are background.

    Args:
        data: as for :func:`load_coco`.
        split: which of the two.
        folder: for ``<image_id>.png``, uint8, 0 background and 1 to K the classes.
    """
    assert data.root is not None
    name, class_names = _split_name(data, split), data.class_names or COCO_CLASSES
    coco = read_instances(data.root, name)
    value_of = {
        category: class_names.index(facts["name"]) + 1
        for category, facts in coco.cats.items()
        if facts["name"] in class_names
    }
    numbers = [number for number, _ in _present(data, coco, class_names)]
    for number in progress(numbers, total=len(numbers), desc=f"masks of {name}"):
        image = coco.imgs[number]
        path = folder / f"{Path(image['file_name']).stem}.png"
        if path.is_file():
            continue
        mask = np.zeros((image["height"], image["width"]), dtype=np.uint8)
        instances = [each for each in coco.imgToAnns[number] if each["category_id"] in value_of]
        try:
            for instance in sorted(instances, key=lambda each: -each["area"]):
                mask[coco.annToMask(instance).astype(bool)] = value_of[instance["category_id"]]
        except Exception as error:  # what pycocotools raises
            raise DataError(f"{name}: image {number} has an instance without a valid outline: {error!r}") from error
        save_mask(path, mask)


def coco_masks_folder(data: DataConfig, split: Split, run_folder: Path) -> Path:
    """The folder of a run for the masks that it paints."""
    return run_folder / "data" / _split_name(data, split)


def read_instances(root: Path, name: str) -> COCO:
    """The instances of a split."""
    path = root / "annotations" / f"instances_{name}.json"
    if not path.is_file():
        raise DataError(
            f"there is no file {path}; unpack the annotations of COCO into {root}, and set data.train_split and "
            "data.val_split to names such as train2014 and val2014"
        )
    try:
        from pycocotools.coco import COCO
    except ImportError as error:
        raise DataError("data.kind: coco needs pycocotools; install it: pip install pycocotools") from error
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # it prints its progress
            coco = COCO(path)
        for image in coco.imgs.values():
            Path(image["file_name"]), np.empty((image["height"], image["width"]), dtype=bool)
        for instance in coco.anns.values():
            coco.imgs[instance["image_id"]], coco.cats[instance["category_id"]]["name"]
    except Exception as error:  # a damaged file breaks pycocotools anywhere
        raise DataError(f"{path} is no complete file of COCO instances ({error!r:.200}); unpack it again") from error
    return coco


def _split_name(data: DataConfig, split: Split) -> str:
    return data.train_split if split == "train" else data.val_split


def _present(data: DataConfig, coco: COCO, class_names: tuple[str, ...]) -> list[tuple[int, set[str]]]:
    """Ids of the images with an instance of a class, and the names of these classes."""
    found = []
    for number in sorted(coco.imgs):
        names = {coco.cats[instance["category_id"]]["name"] for instance in coco.imgToAnns.get(number, ())}
        if chosen := names & set(class_names):
            found.append((number, chosen))
    return found[: data.max_images]

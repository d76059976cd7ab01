"""COCO 2014 and 2017: images, and a JSON file of instances per split that labels and masks come from.

``<root>/<split>/`` holds the images and ``<root>/annotations/instances_<split>.json`` their instances, as the official
archives unpack: ``train2014``, ``val2014``, ``train2017``, ``val2017``.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from smaflib.config import DataConfig, Split
from smaflib.data.classes import COCO_CLASSES
from smaflib.data.labels import check_class_names, image_stem, nearest
from smaflib.data.masks import save_mask
from smaflib.data.sample import Samples
from smaflib.data.voc import find_images, list_pngs, make_samples
from smaflib.errors import DataError
from smaflib.files import compose
from smaflib.runtime import progress


def load_coco(data: DataConfig, split: Split, run_folder: Path | None = None) -> Samples:
    """The samples of one split, nothing decoded yet.

    The image label holds the classes of all instances, crowds and mere boxes included. Images without any instance of
    ``data.class_names`` are left out, as in the field: 82,081 of 82,783 images of train2014 remain, 40,137 of 40,504
    of val2014. Without ``data.masks`` the PNGs that :func:`write_coco_masks` painted in the run folder are used.
    """
    assert data.root is not None  # Config has checked it
    name, class_names = getattr(data, f"{split}_split"), data.class_names or COCO_CLASSES
    check_class_names(class_names)
    instances = _read_instances(data, split)
    if not instances:
        raise DataError(f"{name} has no image of {', '.join(class_names)}; check data.class_names")
    labels = {image_id: tuple(sorted({k for k, _ in found})) for image_id, _, found in instances}
    unpack, file_names = f"unpack {name}.zip into {data.root}", [image["file_name"] for _, image, _ in instances]
    images = find_images(file_names, data.root / name, unpack, f"unpack {name}.zip again")
    painted = run_folder / "data" / name if run_folder else None
    masks = list_pngs(data.masks or (painted if painted and painted.is_dir() else None), "data.masks")
    # COCO's annotations were drawn over the pixels as stored.
    return make_samples(data, split, class_names, images, labels, masks, oriented=False)


def write_coco_masks(data: DataConfig, split: Split, run_folder: Path) -> None:
    """Paint the instances of a split into palette PNGs below ``data`` of a run, for evaluation; existing ones are kept.

    Large instances are painted first, so that a table does not hide what is on it. A crowd is painted as its class,
    like a single instance. Pixels of classes outside ``data.class_names`` are background. An image with an instance
    that is only a box gets no mask, so that evaluation leaves it out.
    """
    try:
        from pycocotools import mask as runs
    except ImportError as error:
        raise DataError("masks from COCO's outlines need pycocotools; install it: pip install pycocotools") from error
    name, instances = getattr(data, f"{split}_split"), _read_instances(data, split)
    for image_id, image, found in progress(instances, total=len(instances), desc=f"masks of {name}"):
        path, size = run_folder / "data" / name / f"{image_id}.png", (image["height"], image["width"])
        if path.is_file() or not all(each.get("segmentation") for _, each in found):
            continue
        outlines = [(number, _outline(runs, size, each["segmentation"])) for number, each in found]
        mask = np.zeros(size, dtype=np.uint8)
        for number, outline in sorted(outlines, key=lambda each: runs.area(each[1]), reverse=True):
            mask[runs.decode(outline).astype(bool)] = number + 1
        save_mask(path, mask)


def _outline(runs: Any, size: tuple[int, int], outline: Any) -> Any:
    """The run lengths of polygons or of other run lengths, by pycocotools (``runs``)."""
    if isinstance(outline, list):
        return runs.merge(runs.frPyObjects(outline, *size))
    return runs.frPyObjects(outline, *size) if isinstance(outline["counts"], list) else outline


def _read_instances(data: DataConfig, split: Split) -> list[Any]:
    """Id, entry, and pairs of class number and instance of each image."""
    assert data.root is not None
    path = data.root / "annotations" / f"instances_{getattr(data, f'{split}_split')}.json"
    if not path.is_file():
        raise DataError(f"there is no file {path}; unpack the annotations of COCO there; a split is called train2014")
    class_names = data.class_names or COCO_CLASSES
    try:
        content = json.loads(path.read_bytes())
        names = {each["id"]: compose(each["name"]) for each in content["categories"]}
        images: dict[Any, Any] = {each["id"]: (image_stem(each["file_name"]), each, []) for each in content["images"]}
        for each in content["annotations"]:
            image, name = images.get(each.get("image_id")), names.get(each.get("category_id"))
            if image and name in class_names:
                image[2].append((class_names.index(name), each))
        found = [images[number] for number in sorted(images) if images[number][2]]
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise DataError(f"{path} is no complete file of COCO instances ({error!r:.200}); unpack it again") from error
    known = set(names.values())
    if absent := [name for name in data.class_names if name not in known]:
        raise DataError(f"data.class_names: {path} has no category {absent[0]!r}{nearest(absent[0], known)}")
    if others := sorted(known.difference(class_names)) if not data.class_names else []:
        raise DataError(f"{path} has categories that are not COCO's, such as {others[0]!r}; set data.class_names")
    return found[: data.max_images]

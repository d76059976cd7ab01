"""COCO 2014 and 2017: images, and one JSON file of instances per split that labels and masks come from.

``<root>/<split>/`` holds the images and ``<root>/annotations/instances_<split>.json`` their instances, as the official
archives unpack: ``train2014``, ``val2014``, ``train2017``, ``val2017``.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from smaflib.config import DataConfig, Split
from smaflib.data.classes import COCO_CLASSES
from smaflib.data.labels import check_class_names, class_numbers
from smaflib.data.masks import save_mask
from smaflib.data.sample import SampleFiles, Samples
from smaflib.data.voc import list_pngs, read_sample, require_saliency
from smaflib.errors import DataError
from smaflib.files import is_plain_name
from smaflib.runtime import CPU, memory_of, progress

Number = Annotated[int, Field(ge=0, lt=2**63)]
Side = Annotated[int, Field(ge=1, le=65_500)]  # of an image, in pixels: JPEG's most


class _Record(TypedDict):
    """What is read of an image, category or instance; files hold more. The id is unique among its kind."""

    __pydantic_config__ = ConfigDict(strict=True)  # type: ignore[misc]

    id: Number


class _ImageRecord(_Record):
    file_name: str
    height: Side
    width: Side


class _CategoryRecord(_Record):
    name: Annotated[str, Field(max_length=100)]


class _InstanceRecord(_Record):
    image_id: Number
    category_id: Number


class _RunLengths(TypedDict):
    """A mask as lengths of runs of pixels, column by column, plain or compressed into a string."""

    __pydantic_config__ = ConfigDict(strict=True)  # type: ignore[misc]

    size: list[Side]
    counts: Annotated[str, Field(min_length=1)] | list[Number]


Coordinate = Annotated[float, Field(ge=-1e6, le=1e6)]
Polygon = Annotated[list[Coordinate], Field(min_length=6)]  # x, y of three points at least


class _OutlinedRecord(_InstanceRecord):
    area: Annotated[float, Field(ge=0, le=1e12)]
    segmentation: Annotated[list[Polygon], Field(min_length=1)] | _RunLengths


class _LabelledFile(TypedDict):
    images: list[_ImageRecord]
    categories: list[_CategoryRecord]
    annotations: list[_InstanceRecord]


class _OutlinedFile(TypedDict):
    images: list[_ImageRecord]
    categories: list[_CategoryRecord]
    annotations: list[_OutlinedRecord]


@dataclass(frozen=True)
class Instances:
    """A file of instances.

    Attributes:
        images: by id.
        names: of the categories, by id; COCO's run from 1 to 90 with gaps.
        instances: in the order of the file; with ``area`` and ``segmentation`` if they were asked for.
    """

    images: dict[int, _ImageRecord]
    names: dict[int, str]
    instances: list[Any]


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
        file_name = coco.images[number]["file_name"]
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
    coco = read_instances(root, name, outlines=True)
    value_of = {number: class_names.index(label) + 1 for number, label in coco.names.items() if label in class_names}
    shown = sorted(_classes_by_image(coco, class_names))[: data.max_images]
    instances_of: dict[int, list[_OutlinedRecord]] = {number: [] for number in shown}
    for instance in coco.instances:
        if instance["category_id"] in value_of and instance["image_id"] in instances_of:
            instances_of[instance["image_id"]].append(instance)
    for number in progress(shown, total=len(shown), desc=f"masks of {name}"):
        facts = coco.images[number]
        path = folder / f"{Path(facts['file_name']).stem}.png"
        if path.is_file():
            continue
        mask = np.zeros((facts["height"], facts["width"]), dtype=np.uint8)
        for instance in sorted(instances_of[number], key=lambda instance: -instance["area"]):
            mask[_pixels(instance, mask.shape, _json_path(root, name))] = value_of[instance["category_id"]]
        save_mask(path, mask)


def coco_masks_folder(data: DataConfig, split: Split, run_folder: Path) -> Path:
    """Where a run keeps the masks that it paints."""
    return run_folder / "data" / (data.train_split if split == "train" else data.val_split)


def read_instances(root: Path, name: str, outlines: bool = False) -> Instances:
    """The instances of a split.

    Args:
        root: holds ``annotations/``.
        name: of the split.
        outlines: read area and outline of each instance, too; they take most of the memory.

    Raises:
        DataError: if the file is missing, damaged or no list of instances, or needs more memory than there is.
    """
    path = _json_path(root, name)
    if not path.is_file():
        raise DataError(
            f"there is no file {path}; unpack the annotations of COCO into {root}, and set data.train_split and "
            "data.val_split to names such as train2014 and val2014"
        )
    _refuse_what_does_not_fit(path, outlines)
    try:
        content = (_outlined() if outlines else _labelled()).validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part)[:40] for part in first["loc"])
        problem = f"{first['msg'][:200]} at {where}" if where else first["msg"][:200]
        raise DataError(f"{path} is no complete file of COCO instances: {problem}; unpack it again") from error
    for kind in ("images", "categories"):
        if len({record["id"] for record in content[kind]}) < len(content[kind]):
            raise DataError(f"{path} gives an id of its {kind} twice; ids must be unique")
    return Instances(
        {record["id"]: record for record in content["images"]},
        {record["id"]: record["name"] for record in content["categories"]},
        content["annotations"],
    )


MEMORY = {False: 6, True: 11}
"""Bytes of memory per byte of a file of instances, without and with outlines (``benchmarks/load.py``)."""


def _refuse_what_does_not_fit(path: Path, outlines: bool) -> None:
    """Refuse a file that this machine's memory cannot take, instead of being killed half-way."""
    size, memory = path.stat().st_size, memory_of(CPU)
    needed = MEMORY[outlines] * size
    if memory is not None and needed > memory:
        raise DataError(
            f"{path} has {size / 1e6:,.0f} MB; reading it takes about {needed / 1e9:.1f} GB of memory, and this "
            f"machine has {memory / 1e9:.1f} GB; take a machine with more, or split the images and their annotations "
            "into files of fewer images each"
        )


@functools.cache  # building one takes longer than reading a small file
def _labelled() -> TypeAdapter[Any]:
    return TypeAdapter(_LabelledFile)


@functools.cache
def _outlined() -> TypeAdapter[Any]:
    return TypeAdapter(_OutlinedFile)


def _pixels(instance: _OutlinedRecord, shape: tuple[int, ...], path: Path) -> np.ndarray:
    """Which pixels of an image of (H, W) belong to an instance."""
    try:
        from pycocotools import mask as run_lengths
    except ImportError as error:
        raise DataError("data.kind 'coco' needs pycocotools; install it: pip install pycocotools") from error
    outline, (height, width) = instance["segmentation"], shape
    try:
        if isinstance(outline, list):
            code = run_lengths.merge(run_lengths.frPyObjects(outline, height, width))
        elif isinstance(outline["counts"], list):
            if sum(outline["counts"]) != height * width:
                raise ValueError(f"its runs hold {sum(outline['counts'])} pixels")
            code = run_lengths.frPyObjects(outline, height, width)
        else:
            code = outline
        if list(code["size"]) != [height, width]:
            raise ValueError(f"its size is {code['size']}")
        return run_lengths.decode(code).astype(bool)
    except (ValueError, TypeError, IndexError) as error:
        raise DataError(
            f"{path}: the outline of instance {instance['id']} does not fit its image of {width} x {height} pixels "
            f"({error!s:.100}); unpack it again"
        ) from error


def _root_and_name(data: DataConfig, split: Split) -> tuple[Path, str]:
    if data.root is None:
        raise DataError("data.root is not set; give the folder that holds annotations/ and the folders of images")
    return data.root, data.train_split if split == "train" else data.val_split


def _json_path(root: Path, name: str) -> Path:
    return root / "annotations" / f"instances_{name}.json"


def _classes_by_image(coco: Instances, class_names: Iterable[str]) -> dict[int, set[str]]:
    """Names of the classes in each image that has one, by COCO's image ids."""
    wanted = set(class_names)
    present: dict[int, set[str]] = {}
    for instance in coco.instances:
        name = coco.names.get(instance["category_id"])
        if name in wanted and instance["image_id"] in coco.images:
            present.setdefault(instance["image_id"], set()).add(name)
    return present

"""Masks in the formats of annotation tools; void belongs to no object.

Run lengths (COCO, CVAT) and PNGs are exact. Outlines run between pixels; by the even-odd rule they hold the centres of
exactly the object's pixels. Programs that round corners or paint the line add up to a pixel. No format has holes in
outlines: an outline goes into a hole and back on one line.
"""

import json
import os
import shutil
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from skimage.measure import approximate_polygon, find_contours, label, regionprops

from smaflib import files
from smaflib.apps.masks import open_masks
from smaflib.data.classes import VOID_LABEL
from smaflib.data.masks import check_mask_values, read_mask
from smaflib.data.sample import Samples
from smaflib.errors import ConfigError, RunError
from smaflib.processes import missing_files
from smaflib.report.html import write_page
from smaflib.runtime import progress

Names = tuple[str, ...]
Photos = Iterator[tuple[Path, np.ndarray, list[tuple[str, Any]]]]
"""Path, mask (H, W), and the class name and skimage's region of each object."""

TOLERANCE = 0.35
"""Of simplified outlines, in pixels; below √2/4, their distance from the nearest centres of pixels."""


def export_masks(folder: Path, form: str, out: Path, per: str = "part", min_pixels: int = 1) -> None:
    """Write the masks of ``smaf masks --out folder``, or of a run, to the new folder ``out``, all or nothing.

    Args:
        form: ``coco``, ``labelme``, ``yolo``, ``cvat`` or ``png``.
        per: an object is a connected ``part`` (8 neighbours) or all pixels of a ``class``; PNGs have no objects.
        min_pixels: objects of fewer pixels are left out, but not of PNGs.

    Raises:
        ConfigError: if ``out`` exists, ``folder`` has no config, or YOLO shall have several outlines per object.
        RunError: if masks are missing.
    """
    if out.exists():
        raise ConfigError(f"{out} exists; choose another --out, or delete it")
    if form == "yolo" and per == "class":
        raise ConfigError("an object of YOLO has one outline, and a class may need several; leave out --per class")
    if not (folder / "config.yaml").is_file():
        raise ConfigError(f"{folder} has no config.yaml; give the folder that smaf masks --out wrote")
    samples, again = open_masks(folder).samples(), "give the same smaf masks command again"
    if missing := [samples.image_ids[number] for number in missing_files(folder / "masks", samples.image_ids)]:
        few = f"{', '.join(missing[:3])} ({len(missing)} of {len(samples)})"
        raise RunError(f"{folder} has no masks yet of {few}; {again}, which resumes")
    write = {"coco": _coco, "labelme": _labelme, "yolo": _yolo, "cvat": _cvat, "png": _png}[form]
    with files.replacing(out) as temporary:
        write(_photos(samples, folder / "masks", per, min_pixels), samples.class_names, temporary)


def _photos(samples: Samples, folder: Path, per: str, min_pixels: int) -> Photos:
    for file in progress(samples.files, total=len(samples), desc="export"):
        path = folder / f"{file.image_id}.png"
        check_mask_values(mask := read_mask(path), len(samples.class_names), path)
        values = mask.where(mask != VOID_LABEL, 0).numpy()
        regions = regionprops(label(values, connectivity=2) if per == "part" else values, values)
        large = [region for region in regions if region.area >= min_pixels]
        yield file.image, mask.numpy(), [(samples.class_names[int(each.intensity_max) - 1], each) for each in large]


def _png(photos: Photos, names: Names, out: Path) -> None:
    for image, mask, _ in photos:
        files.save_image(out / f"{image.stem}.png", Image.fromarray(mask))
    rows = [f"{name}:{value},{value},{value}::" for value, name in enumerate(("background", *names))]
    files.write_text(out / "labelmap.txt", "\n".join(["# label:color_rgb:parts:actions", *rows, ""]))


def _yolo(photos: Photos, names: Names, out: Path) -> None:
    for image, mask, objects in photos:
        shapes = [(name, outlines(region)[0] / mask.shape[::-1]) for name, region in objects]
        lines = [" ".join(map(str, [names.index(name), *shape.ravel().round(6)])) for name, shape in shapes]
        files.write_text(out / "labels" / f"{image.stem}.txt", "\n".join(lines))
        with files.replacing(out / "images" / image.name) as copy:  # YOLO replaces images by labels in a photo's path
            shutil.copyfile(image, copy)
    files.write_json(out / "data.yaml", {"train": "images", "val": "images", "names": names})  # YAML includes JSON


def _labelme(photos: Photos, names: Names, out: Path) -> None:
    for image, mask, objects in photos:
        shapes = [
            {"label": name, "points": part.tolist(), "group_id": number, "shape_type": "polygon", "flags": {}}
            for number, (name, region) in enumerate(objects)
            for part in outlines(region)
        ]
        height, width = mask.shape
        size = {"imageHeight": height, "imageWidth": width}
        photo = {"imagePath": os.path.relpath(image, out), "imageData": None} | size
        content = {"version": "5.5.0", "flags": {}, "shapes": shapes} | photo
        files.write_text(out / f"{image.stem}.json", json.dumps(content))


def _cvat(photos: Photos, names: Names, out: Path) -> None:
    images = [
        (image.name, mask.shape, [(name, *region.bbox, run_lengths(region.image)) for name, region in objects])
        for image, mask, objects in photos
    ]
    write_page(out / "annotations.xml", "cvat.xml.j2", images=images, names=names)


def _coco(photos: Photos, names: Names, out: Path) -> None:
    images, drawn = [], []
    exact: list[dict[str, Any]] = []
    for number, (image, mask, objects) in enumerate(photos, start=1):
        height, width = mask.shape
        images.append({"id": number, "file_name": image.name, "width": width, "height": height})
        for name, region in objects:
            top, left, bottom, right = region.bbox
            box = {"bbox": [left, top, right - left, bottom - top], "area": int(region.area), "iscrowd": 0}
            entry = {"id": len(exact) + 1, "image_id": number, "category_id": names.index(name) + 1} | box
            whole = np.pad(region.image, ((top, height - bottom), (left, width - right)))
            runs = {"size": [height, width], "counts": run_lengths(whole.T)}  # COCO counts down the columns
            exact.append(entry | {"segmentation": runs})
            drawn.append(entry | {"segmentation": [part.ravel().tolist() for part in outlines(region)]})
    categories = [{"id": value, "name": name} for value, name in enumerate(names, start=1)]
    content = {"info": {}, "images": images, "categories": categories}
    files.write_text(out / "instances.json", json.dumps(content | {"annotations": exact}))
    files.write_text(out / "polygons.json", json.dumps(content | {"annotations": drawn}))


def run_lengths(pixels: np.ndarray) -> list[int]:
    """Lengths of the runs of False, True, False, ... in bool (H, W), row by row; the first one may be 0."""
    changes = np.flatnonzero(np.diff(pixels.ravel(), prepend=False))
    return np.diff(changes, prepend=0, append=pixels.size).tolist()


def outlines(region: Any) -> list[np.ndarray]:
    """An outline (N, 2) of x and y per connected part of a region of skimage; (0, 0) is the corner of the photo."""
    parts = regionprops(label(region.image, connectivity=2))
    return [_outline(part.image) + part.bbox[1::-1] + region.bbox[1::-1] for part in parts]


def _outline(part: np.ndarray) -> np.ndarray:
    contours = find_contours(np.pad(part, 1).astype(float), 0.5, fully_connected="high")
    # The outer contour is the leftmost; from a hole's leftmost point, a straight way left ends at a contour before it.
    ring, *holes = sorted(contours, key=lambda contour: contour[:, 1].min())
    kept = set()
    for hole in holes:
        hole = np.roll(hole[:-1], -hole[:-1, 1].argmin(), axis=0)
        row, column = hole[0]
        at = np.where((ring[:, 0] == row) & (ring[:, 1] < column), ring[:, 1], -1).argmax()
        kept |= {tuple(ring[at]), (row, column)}
        ring = np.concatenate([ring[: at + 1], hole, hole[:1], ring[at:]])
    ends = [0, *(index for index in range(1, len(ring) - 1) if tuple(ring[index]) in kept), len(ring) - 1]
    pieces = [approximate_polygon(ring[start : end + 1], TOLERANCE)[:-1] for start, end in pairwise(ends)]
    return np.concatenate(pieces)[:, ::-1] - 0.5  # contours count from the centre of the padding's first pixel

"""Convert the field's ``cls_labels.npy`` to the CSV ``image,labels`` that the VOC and folder layouts read.

The file holds a pickled dictionary from image name to a vector of K zeros and ones. Unpickling a file from the internet
runs whatever its author put there, so only the constructors of NumPy arrays are allowed.

    python -m tools.cls_labels cls_labels.npy labels.csv [voc | coco | cat,dog,...]
"""

from __future__ import annotations

import argparse
import codecs
import csv
import pickle
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy._core.multiarray import _reconstruct, scalar

from smaflib.data.classes import COCO_CLASSES, VOC_CLASSES
from smaflib.data.labels import image_stem
from smaflib.files import replacing

# As written by NumPy 1 and 2 on Python 2 and 3.
ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): codecs.encode,
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy.core.multiarray", "scalar"): scalar,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "scalar"): scalar,
}


class ArrayUnpickler(pickle.Unpickler):
    """Refuses everything but arrays."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ALLOWED:
            raise pickle.UnpicklingError(f"the file asks for {module}.{name}, which a table of labels does not need")
        return ALLOWED[module, name]


def read_cls_labels(path: Path, num_classes: int) -> dict[str, tuple[int, ...]]:
    """Class numbers, 0 to K-1, by image name; VOC's names may lack their underscore, as in IRN's file.

    Raises:
        UnpicklingError: if the file would run code.
        ValueError: if it holds something else than vectors of K zeros and ones.
    """
    with path.open("rb") as file:
        version = np.lib.format.read_magic(file)
        read_header = np.lib.format.read_array_header_1_0 if version[0] == 1 else np.lib.format.read_array_header_2_0
        read_header(file)
        table = ArrayUnpickler(file, encoding="latin1").load()
    table = table.item() if isinstance(table, np.ndarray) and table.shape == () else table
    if not isinstance(table, dict):
        raise ValueError(f"{path} holds a {type(table).__name__}, not a dictionary of labels")
    labels = {}
    for name, vector in table.items():
        values = np.asarray(vector)
        if values.shape != (num_classes,) or not np.isin(values, (0, 1)).all():
            raise ValueError(f"{path}: the labels of {name!r} are no vector of {num_classes} zeros and ones")
        image_id = image_stem(name.decode() if isinstance(name, bytes) else str(name))
        image_id = re.sub(r"^(20\d\d)(\d{6})$", r"\1_\2", image_id)  # IRN keeps VOC's names as integers
        if image_id in labels:
            raise ValueError(f"{path}: {name!r} is given twice, in two spellings")
        labels[image_id] = tuple(np.flatnonzero(values).tolist())
    return labels


def convert(path: Path, target: Path, class_names: Sequence[str]) -> int:
    """Write the CSV, without the images that have no label; returns their number."""
    labels = read_cls_labels(path, len(class_names))
    rows = [[name, ";".join(class_names[k] for k in numbers)] for name, numbers in sorted(labels.items()) if numbers]
    with replacing(target) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([["image", "labels"], *rows])
    return len(labels) - len(rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="cls_labels.npy to a CSV, without executing its content")
    parser.add_argument("npy", type=Path)
    parser.add_argument("csv", type=Path)
    parser.add_argument("classes", nargs="?", default="voc", help="voc, coco, or names joined by commas")
    given = parser.parse_args()
    names = {"voc": VOC_CLASSES, "coco": COCO_CLASSES}.get(given.classes) or given.classes.split(",")
    print(f"{given.csv}: {convert(given.npy, given.csv, names)} images without a label left out")

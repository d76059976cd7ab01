"""The field's ``cls_labels.npy``: image labels in a pickle, read without executing anything, and written as a CSV.

Most WSSS code bases pass a NumPy file around that holds a pickled dictionary from image name to a vector of K zeros and
ones. Unpickling a file from the internet runs whatever its author put there, so :func:`read_cls_labels` knows the few
constructors that such a file needs and refuses all others.
"""

from __future__ import annotations

import codecs
import csv
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy._core.multiarray import _reconstruct, scalar

from smaflib.errors import DataError
from smaflib.files import replacing

ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): codecs.encode,
} | {
    (f"numpy.{core}.multiarray", name): function
    for core in ("core", "_core")
    for name, function in (("_reconstruct", _reconstruct), ("scalar", scalar))
}
"""What a pickled dictionary of arrays calls, as written by NumPy 1 and 2 on Python 2 and 3."""


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no table of labels needs")
        return ALLOWED[module, name]


def read_cls_labels(path: Path) -> tuple[dict[str, tuple[int, ...]], int]:
    """Read a ``cls_labels.npy``.

    Returns:
        Image name to the numbers of its classes, 0 to K-1; and K.

    Raises:
        DataError: if the file is missing, damaged, would run code, or holds something else.
    """
    if not path.is_file():
        raise DataError(f"there is no file {path}; give the cls_labels.npy of a WSSS code base")
    try:
        with path.open("rb") as file:
            npy = np.lib.format
            version = npy.read_magic(file)
            shape, _, dtype = (npy.read_array_header_1_0 if version[0] == 1 else npy.read_array_header_2_0)(file)
            if dtype != np.dtype(object) or shape != ():
                raise DataError(f"{path} holds an array {shape} of {dtype}, not a dictionary of labels")
            table = _ArrayUnpickler(file, encoding="latin1").load()
    except DataError:
        raise
    except pickle.UnpicklingError as error:
        raise DataError(f"{path} is not read: {error}") from error
    except Exception as error:  # damaged pickles raise whatever their opcodes do, up to MemoryError and RecursionError
        raise DataError(f"{path} is no NumPy file of labels, or not a whole one ({error}); fetch it again") from error
    table = table.item() if isinstance(table, np.ndarray) and table.shape == () else table
    if not isinstance(table, dict):
        raise DataError(f"{path} holds a {type(table).__name__}, not a dictionary of labels")
    labels: dict[str, tuple[int, ...]] = {}
    num_classes = 0
    if not table:
        raise DataError(f"{path} holds no labels")
    for name, vector in table.items():
        try:
            values = np.asarray(vector)
        except ValueError:  # rows of several lengths
            values = np.array(None)
        numbers = values.ndim == 1 and len(values) > 0 and values.dtype.kind in "fiub"
        if not numbers or not np.isin(values, (0, 1)).all():
            raise DataError(f"{path}: the labels of {name!r:.100} are no vector of zeros and ones")
        labels[str(name)] = tuple(np.flatnonzero(values).tolist())
        num_classes = num_classes or len(values)
        if len(values) != num_classes:
            raise DataError(f"{path}: the vector of {name!r:.100} has {len(values)} numbers, others have {num_classes}")
    return labels, num_classes


def cls_labels_to_csv(path: Path, target: Path, class_names: Sequence[str]) -> tuple[int, int]:
    """Write a ``cls_labels.npy`` as the CSV ``image,labels`` that the VOC and folder layouts read.

    Args:
        path: the NumPy file.
        target: the CSV, written all or nothing.
        class_names: the K names, in the order of the vectors.

    Returns:
        How many images were written, and how many had no label and were left out.

    Raises:
        DataError: as :func:`read_cls_labels`, or if the vectors have another length than there are names.
    """
    labels, num_classes = read_cls_labels(path)
    if num_classes != len(class_names):
        raise DataError(f"{path} has vectors of {num_classes} classes, but {len(class_names)} names are given")
    rows = [
        [name, ";".join(class_names[number] for number in numbers)]
        for name, numbers in sorted(labels.items())
        if numbers
    ]
    with replacing(target) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([["image", "labels"], *rows])
    return len(rows), len(labels) - len(rows)

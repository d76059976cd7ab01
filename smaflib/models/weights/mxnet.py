"""Reads MXNet's ``.params`` files without MXNet: the ImageNet weights of ResNet38 exist in no other form.

The format is a list of arrays followed by a list of their names; nothing in it can run code. All numbers are
little-endian. Three versions of the array record are in use; they differ in how the shape is written.

Source: the NDArray list format of MXNet's ``src/ndarray/ndarray.cc``, versions 0 to 2.
"""

from __future__ import annotations

import math
import re
import struct
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from smaflib.errors import ConfigError

LIST_MAGIC = 0x112
MAGIC_V1, MAGIC_V2 = 0xF993FAC8, 0xF993FAC9
TYPES = ("<f4", "<f8", "<f2", "u1", "<i4", "i1", "<i8")
MOST_DIMENSIONS = 32  # NumPy's and more than any network has; a larger number is a damaged file


def is_mxnet_params(path: Path) -> bool:
    """Whether a file begins as a list of NDArrays does."""
    with path.open("rb") as file:
        return file.read(8) == struct.pack("<Q", LIST_MAGIC)


def read_mxnet_params(path: Path) -> dict[str, Tensor]:
    """Read all arrays of a ``.params`` file.

    Returns:
        By the names of the file, such as ``arg:conv1a_weight``.

    Raises:
        ConfigError: if the file is damaged, or holds sparse arrays or a version of the format that is not known.
    """
    reader = _Reader(path)
    magic, _, count = reader.unpack("QQQ", "the file's head")
    if magic != LIST_MAGIC:
        raise ConfigError(f"{path} is no MXNet .params file: it begins with {magic:#x}, not with {LIST_MAGIC:#x}")
    arrays = []
    for number in range(count):
        arrays.append(_read_array(reader, f"array {number + 1} of {count}"))
    (num_names,) = reader.unpack("Q", "the number of names")
    if num_names != count:
        raise ConfigError(f"{path} holds {count} arrays but {num_names} names; fetch it again")
    names = []
    for number in range(count):
        (length,) = reader.unpack("Q", f"name {number + 1}")
        names.append(reader.take(length, f"name {number + 1}").decode("utf-8", errors="replace"))
    return dict(zip(names, arrays, strict=True))


def resnet38_from_mxnet(arrays: dict[str, Tensor]) -> dict[str, Tensor]:
    """Give the arrays of the ImageNet ResNet38 their names in :class:`~smaflib.models.resnet38.ResNet38`.

    ``arg:res3b1_branch2a_weight`` is ``b3_1.conv_branch2a.weight``; the classifier ``linear1000`` is dropped. Names of
    another pattern stay as they are, so that a message can list them.
    """
    state = {}
    for name, array in arrays.items():
        plain = name.split(":", 1)[-1]
        if not plain.startswith("linear1000"):
            state[_resnet38_name(plain)] = array
    return state


_STATISTICS = {"gamma": "weight", "beta": "bias", "moving_mean": "running_mean", "moving_var": "running_var"}


def _resnet38_name(name: str) -> str:
    if match := re.fullmatch(r"conv1a_weight|bn7_(\w+)", name):
        return f"bn7.{_STATISTICS.get(match[1], match[1])}" if match[1] else "conv1a.weight"
    match = re.fullmatch(r"(res|bn)(\d)(?:a|b(\d+))_(branch\w+?)_(weight|gamma|beta|moving_mean|moving_var)", name)
    if not match:
        return name
    kind, stage, place, branch, what = match.groups()
    block = f"b{stage}" + (f"_{place}" if place else "")
    return f"{block}.{'conv' if kind == 'res' else 'bn'}_{branch}.{_STATISTICS.get(what, what)}"


def _read_array(reader: _Reader, what: str) -> Tensor:
    (magic,) = reader.unpack("I", what)
    if magic == MAGIC_V2:
        (storage,) = reader.unpack("i", what)
        if storage != 0:
            raise ConfigError(f"{reader.path}: {what} is sparse (storage type {storage}); only dense arrays are read")
    if magic in (MAGIC_V1, MAGIC_V2):
        (num_dimensions,) = reader.unpack("I", what)
        dimension = "q"
    else:  # the oldest files have no magic: this is the number of dimensions already
        num_dimensions, dimension = magic, "I"
    if num_dimensions > MOST_DIMENSIONS:
        raise ConfigError(f"{reader.path}: {what} has the unknown version or number of dimensions {num_dimensions:#x}")
    shape = reader.unpack(dimension * num_dimensions, what)
    if any(side < 0 for side in shape):
        raise ConfigError(f"{reader.path}: {what} has the impossible shape {shape}; fetch the file again")
    if not shape:  # an array that was never filled ends here
        return torch.empty(0)
    _device_type, _device_id, number = reader.unpack("iii", what)
    if not 0 <= number < len(TYPES):
        raise ConfigError(f"{reader.path}: {what} is of the unknown type {number}")
    dtype = np.dtype(TYPES[number])
    data = reader.take(math.prod(shape) * dtype.itemsize, what)
    return torch.from_numpy(np.frombuffer(data, dtype).reshape(shape).copy())


class _Reader:
    """A file's bytes in order, with a message where they end too early."""

    def __init__(self, path: Path) -> None:
        self.path, self.bytes, self.position = path, memoryview(path.read_bytes()), 0

    def take(self, length: int, what: str) -> bytes:
        if length > len(self.bytes) - self.position:
            raise ConfigError(f"{self.path} ends within {what}; it was not downloaded whole, fetch it again")
        self.position += length
        return bytes(self.bytes[self.position - length : self.position])

    def unpack(self, pattern: str, what: str) -> tuple[int, ...]:
        pattern = "<" + pattern
        return struct.unpack(pattern, self.take(struct.calcsize(pattern), what))

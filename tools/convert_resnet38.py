"""Convert the ImageNet weights of ResNet38 from MXNet's ``.params``, their only published form, to safetensors.

    python -m tools.convert_resnet38 ilsvrc-cls_rna-a1_cls1000_ep-0001.params resnet38.safetensors

The classifier is left out. MXNet is not needed.

Source: the NDArray list format of MXNet's ``src/ndarray/ndarray.cc``, versions 0 to 2; numbers are little-endian.
"""

from __future__ import annotations

import argparse
import math
import re
import struct
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from smaflib.errors import ConfigError
from smaflib.models.resnet38 import ResNet38
from smaflib.models.weights import fill, write_weights

LIST_MAGIC = 0x112
MAGIC_V1, MAGIC_V2 = 0xF993FAC8, 0xF993FAC9
TYPES = ("<f4", "<f8", "<f2", "u1", "<i4", "i1", "<i8")
STATISTICS = {"gamma": "weight", "beta": "bias", "moving_mean": "running_mean", "moving_var": "running_var"}


class Reader:
    """A file's bytes in order."""

    def __init__(self, path: Path) -> None:
        self.path, self.bytes, self.position = path, path.read_bytes(), 0

    def take(self, length: int) -> bytes:
        if not 0 <= length <= len(self.bytes) - self.position:
            raise ConfigError(f"{self.path} is not a complete MXNet .params file; download it again")
        self.position += length
        return self.bytes[self.position - length : self.position]

    def unpack(self, pattern: str) -> tuple[int, ...]:
        return struct.unpack("<" + pattern, self.take(struct.calcsize("<" + pattern)))


def read_mxnet_params(path: Path) -> dict[str, Tensor]:
    """All arrays of a ``.params`` file by their names in it, such as ``arg:conv1a_weight``.

    Raises:
        ConfigError: if the file is damaged, or holds what is not known here, such as sparse arrays.
    """
    reader = Reader(path)
    magic, _, count = reader.unpack("QQQ")
    if magic != LIST_MAGIC:
        raise ConfigError(f"{path} is no MXNet .params file: it begins with {magic:#x}, not with {LIST_MAGIC:#x}")
    arrays = [_read_array(reader) for _ in range(count)]
    (num_names,) = reader.unpack("Q")
    names = [reader.take(*reader.unpack("Q")).decode() for _ in range(num_names)]
    return dict(zip(names, arrays, strict=True))


def _read_array(reader: Reader) -> Tensor:
    (magic,) = reader.unpack("I")
    if magic == MAGIC_V2 and reader.unpack("i") != (0,):
        raise ConfigError(f"{reader.path} holds a sparse array; only dense arrays are read")
    if magic in (MAGIC_V1, MAGIC_V2):
        (num_dimensions,), side = reader.unpack("I"), "q"
    else:  # the oldest files have no magic: this is the number of dimensions
        num_dimensions, side = magic, "I"
    shape = reader.unpack(f"{num_dimensions}{side}") if num_dimensions <= 32 else (-1,)
    if not shape:  # an array that was never filled ends here
        return torch.empty(0)
    _device_type, _device_id, number = reader.unpack("iii")
    if min(shape) < 0 or not 0 <= number < len(TYPES):
        raise ConfigError(f"{reader.path} is damaged, or in an unknown version of MXNet's format")
    dtype = np.dtype(TYPES[number])
    data = reader.take(math.prod(shape) * dtype.itemsize)
    return torch.from_numpy(np.frombuffer(data, dtype).reshape(shape).copy())


def resnet38_state(arrays: dict[str, Tensor]) -> dict[str, Tensor]:
    """Arrays under their names in :class:`~smaflib.models.resnet38.ResNet38`, without the classifier ``linear1000``.

    ``arg:res3b1_branch2a_weight`` is ``b3_1.conv_branch2a.weight``. Other names stay, so that a message can list them.
    """
    plain = {name.partition(":")[2]: array for name, array in arrays.items()}
    return {_translated(name): array for name, array in plain.items() if not name.startswith("linear1000")}


def _translated(name: str) -> str:
    if name == "conv1a_weight":
        return "conv1a.weight"
    kinds = "weight|gamma|beta|moving_mean|moving_var"
    match = re.fullmatch(rf"(?:bn7|(res|bn)(\d)(?:a|b(\d+))_(branch\w+?))_({kinds})", name)
    if not match:
        return name
    kind, stage, place, branch, what = match.groups()
    layer = f"b{stage}{f'_{place}' if place else ''}.{'conv' if kind == 'res' else 'bn'}_{branch}" if stage else "bn7"
    return f"{layer}.{STATISTICS.get(what, what)}"


def convert(params: Path, out: Path) -> None:
    """Write a safetensors file, if the weights fit the network."""
    network = ResNet38()
    fill(network, resnet38_state(read_mxnet_params(params)), source=str(params))
    write_weights(out, network.state_dict())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("params", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    convert(arguments.params, arguments.out)

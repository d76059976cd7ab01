"""MXNet's .params files: the bytes of the format in all three versions, and the names of ResNet38."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from smaflib.errors import ConfigError
from smaflib.models.resnet38 import ResNet38
from tools.convert_resnet38 import read_mxnet_params, resnet38_state

TYPES = {"float32": 0, "float64": 1, "float16": 2, "uint8": 3, "int32": 4, "int8": 5, "int64": 6}


def params_bytes(arrays: dict[str, np.ndarray], version: int) -> bytes:
    """The NDArray list format, written out from its description."""
    parts = [struct.pack("<QQQ", 0x112, 0, len(arrays))]
    for array in arrays.values():
        if version == 2:
            parts.append(struct.pack("<Ii", 0xF993FAC9, 0))
        elif version == 1:
            parts.append(struct.pack("<I", 0xF993FAC8))
        side = "I" if version == 0 else "q"
        parts.append(struct.pack(f"<I{array.ndim}{side}", array.ndim, *array.shape))
        parts.append(struct.pack("<iii", 1, 0, TYPES[array.dtype.name]))
        parts.append(array.astype(array.dtype.newbyteorder("<")).tobytes())
    parts.append(struct.pack("<Q", len(arrays)))
    for name in arrays:
        parts.append(struct.pack("<Q", len(name)) + name.encode())
    return b"".join(parts)


@pytest.mark.parametrize("version", [0, 1, 2])
def test_all_versions_and_types_and_every_cut(tmp_path: Path, version: int) -> None:
    path = tmp_path / "net.params"
    for dtype in TYPES:
        arrays = {"arg:a": np.arange(6).reshape(2, 3).astype(dtype), "aux:b": np.array([7, 99]).astype(dtype)}
        path.write_bytes(params_bytes(arrays, version))
        again = read_mxnet_params(path)
        assert list(again) == ["arg:a", "aux:b"]
        for name, array in arrays.items():
            assert again[name].dtype == getattr(torch, dtype) and np.array_equal(again[name].numpy(), array)
    whole = params_bytes({"arg:a": np.ones((2, 2), dtype=np.float32)}, version)
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(ConfigError, match=r"is not a complete MXNet \.params file; download it again"):
            read_mxnet_params(path)
    damages = [(0, 5, "is no MXNet"), (24, 0xF993FACF, "damaged"), (28, 1, "sparse")]
    for position, value, message in damages[: 1 + version]:
        path.write_bytes(whole[:position] + struct.pack("<I", value) + whole[position + 4 :])
        with pytest.raises(ConfigError, match=message):
            read_mxnet_params(path)


def mxnet_name(name: str) -> str:
    """The name in the ImageNet file of a weight of ResNet38, from the facts in the file's description."""
    statistics = {"weight": "gamma", "bias": "beta", "running_mean": "moving_mean", "running_var": "moving_var"}
    layer, _, what = name.rpartition(".")
    prefix = "aux:" if what.startswith("running") else "arg:"
    if layer == "conv1a":
        return "arg:conv1a_weight"
    if layer == "bn7":
        return f"{prefix}bn7_{statistics[what]}"
    block, part = layer.split(".")
    stage, _, number = block[1:].partition("_")
    place = f"{stage}b{number}" if number else f"{stage}a"
    kind, _, branch = part.partition("_")
    return f"arg:res{place}_{branch}_weight" if kind == "conv" else f"{prefix}bn{place}_{branch}_{statistics[what]}"


def test_names_become_those_of_the_network() -> None:
    with torch.device("meta"):
        names = [name for name in ResNet38().state_dict() if "num_batches_tracked" not in name]
    arrays = {mxnet_name(name): torch.tensor(number) for number, name in enumerate(names)}
    found = resnet38_state(arrays | {"arg:linear1000_weight": torch.ones(1)})
    assert {name: int(value) for name, value in found.items()} == {name: number for number, name in enumerate(names)}

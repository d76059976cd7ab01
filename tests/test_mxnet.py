"""MXNet's .params files: the bytes of the format, all three versions, and the names of ResNet38."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from smaflib.config import ModelConfig
from smaflib.errors import ConfigError, WeightsError
from smaflib.models.backbones import build_backbone
from smaflib.models.resnet38 import ResNet38
from smaflib.models.weights.files import read_weights, weights_format
from smaflib.models.weights.mxnet import read_mxnet_params, resnet38_from_mxnet

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
@pytest.mark.parametrize("dtype", list(TYPES))
def test_all_versions_and_types(tmp_path: Path, version: int, dtype: str) -> None:
    arrays = {"arg:a": np.arange(6).reshape(2, 3).astype(dtype), "aux:b": np.array([7, -1 % 100]).astype(dtype)}
    (tmp_path / "net.params").write_bytes(params_bytes(arrays, version))
    again = read_mxnet_params(tmp_path / "net.params")
    assert list(again) == ["arg:a", "aux:b"]
    for name, array in arrays.items():
        assert again[name].dtype == getattr(torch, dtype) and np.array_equal(again[name].numpy(), array)


@pytest.mark.parametrize("version", [0, 1, 2])
def test_every_cut_is_noticed(tmp_path: Path, version: int) -> None:
    whole = params_bytes({"arg:a": np.ones((2, 2), dtype=np.float32)}, version)
    path = tmp_path / "net.params"
    for length in range(8, len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(ConfigError, match=r"ends within .*fetch it again"):
            read_mxnet_params(path)


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (0, struct.pack("<Q", 5), "is no MXNet .params file"),
        (24, struct.pack("<I", 0xF993FACF), "unknown version"),
        (28, struct.pack("<i", 1), "sparse"),
        (36, struct.pack("<q", -4), "impossible shape"),
        (52, struct.pack("<i", 99), "unknown type 99"),
        (36, struct.pack("<q", 2**60), "ends within array 1 of 1"),  # a claim that no memory could hold
    ],
)
def test_damage_is_named(tmp_path: Path, position: int, value: bytes, message: str) -> None:
    whole = bytearray(params_bytes({"arg:a": np.ones(4, dtype=np.float32)}, version=2))
    whole[position : position + len(value)] = value
    (tmp_path / "net.params").write_bytes(whole)
    with pytest.raises(ConfigError, match=message):
        read_mxnet_params(tmp_path / "net.params")


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


def small_resnet38() -> dict[str, np.ndarray]:
    """An array per name of ResNet38, with one number each: names are the matter here, not shapes."""
    names = [name for name in torch.nn.Module.state_dict(meta_resnet38()) if not name.endswith("num_batches_tracked")]
    arrays = {mxnet_name(name): np.full(1, number, dtype=np.float32) for number, name in enumerate(names)}
    assert "arg:res3b1_branch2a_weight" in arrays and "aux:bn6a_branch2b2_moving_var" in arrays
    assert len(arrays) == len(names)
    return arrays


def meta_resnet38() -> ResNet38:
    with torch.device("meta"):
        return ResNet38()


def test_every_name_of_resnet38_is_translated() -> None:
    arrays = {name: torch.from_numpy(array) for name, array in small_resnet38().items()}
    arrays["arg:linear1000_weight"] = torch.zeros(1)
    state = resnet38_from_mxnet(arrays)
    names = [name for name in meta_resnet38().state_dict() if not name.endswith("num_batches_tracked")]
    assert [int(state[name]) for name in names] == list(range(len(names))) and len(state) == len(names)
    assert resnet38_from_mxnet({"arg:strange": torch.zeros(1)}).keys() == {"strange"}


def test_imagenet_file_loads_into_the_network(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network, path = ResNet38(), tmp_path / "ilsvrc-cls_rna-a1_cls1000_ep-0001.params"
    state = {name: value for name, value in network.state_dict().items() if not name.endswith("num_batches_tracked")}
    arrays = {mxnet_name(name): value.numpy().astype(np.float16) for name, value in state.items()}
    arrays["arg:linear1000_weight"] = np.ones((1000, 1), dtype=np.float16)
    path.write_bytes(params_bytes(arrays, version=2))
    assert weights_format(path) == "mxnet"
    loaded = build_backbone(ModelConfig(backbone="resnet38", weights=str(path))).state_dict()
    assert all(torch.equal(loaded[name], value.half().float()) for name, value in state.items())

    del arrays["aux:bn7_moving_var"]
    path.write_bytes(params_bytes(arrays, version=2))
    with pytest.raises(WeightsError, match="missing: bn7.running_var"):
        build_backbone(ModelConfig(backbone="resnet38", weights=str(path)))


def test_file_of_another_network_lists_its_names(tmp_path: Path) -> None:
    (tmp_path / "other.params").write_bytes(params_bytes({"arg:fc1_weight": np.ones(1, dtype=np.float32)}, version=1))
    assert list(read_weights(tmp_path / "other.params")) == ["fc1_weight"]
    with pytest.raises(WeightsError, match="not known to the network: fc1_weight"):
        build_backbone(ModelConfig(backbone="slim", weights=str(tmp_path / "other.params")))

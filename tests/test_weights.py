"""Weights from files: whole, fitting, and never a pickle."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from smaflib.config import ModelConfig
from smaflib.errors import ConfigError
from smaflib.models.backbones import build_backbone
from smaflib.models.slim import SlimResNet
from smaflib.models.weights import (
    attention_state,
    fill,
    image_level_weights,
    read_metadata,
    read_weights,
    write_weights,
)


def small_net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2))


# --- reading and writing ----------------------------------------------------------------------------------------------


def test_written_weights_read_back_bit_for_bit_with_their_metadata(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "a.safetensors"
    tensors = {
        "half": torch.tensor([0.1, 2.0]).half(),
        "view": torch.arange(6.0).view(2, 3).T,  # not contiguous
        "counter": torch.tensor(3),
        "learns": nn.Parameter(torch.ones(2)),
    }
    write_weights(path, tensors, iteration=3, history=[{"L_cls": 0.5}])
    again = read_weights(path)
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[name], tensors[name]) for name in tensors)
    assert again["half"].dtype == torch.float16
    assert read_metadata(path) == {"iteration": "3", "history": '[{"L_cls": 0.5}]'}
    assert [file.name for file in path.parent.iterdir()] == ["a.safetensors"]


def test_the_same_weights_are_the_same_bytes(tmp_path: Path) -> None:
    tensors, written = {f"layer{i}": torch.arange(4.0) + i for i in range(9)}, set()
    for number in range(5):  # safetensors orders metadata at random, also within a process
        write_weights(tmp_path / str(number), tensors, history=[1, 2], iteration=7, seed=0, kind="teacher", rounds=1)
        written.add((tmp_path / str(number)).read_bytes())
    assert len(written) == 1


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: None, r"there is no weights file .*a\.pth; give a \.safetensors or \.pth file"),
        (lambda path: save_file({"a": torch.ones(9)}, path) or cut(path, 4), "is not a complete safetensors file"),
        (
            lambda path: torch.save({"a.b": torch.ones(99)}, path) or cut(path, 200),
            "is not a complete PyTorch checkpoint",
        ),
        (lambda path: torch.save({"epoch": 3}, path), "holds no state dict"),
        (lambda path: torch.save({"a": {"b.c": torch.ones(1)}, "d": {"b.c": torch.ones(1)}}, path), "holds 2 networks"),
    ],
)
def test_file_without_one_whole_network_is_refused(
    tmp_path: Path, write: Callable[[Path], object], message: str
) -> None:
    write(tmp_path / "a.pth")
    with pytest.raises(ConfigError, match=message):
        read_weights(tmp_path / "a.pth")


def cut(path: Path, num_bytes: int) -> None:
    path.write_bytes(path.read_bytes()[:-num_bytes])


class Malicious:
    """A pickle that would create a file when it is loaded without care."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return Path.touch, (self.target,)


def test_checkpoint_that_would_run_code_is_refused(tmp_path: Path) -> None:
    path, trace = tmp_path / "a.pth", tmp_path / "trace"
    torch.save({"state_dict": {"head.weight": torch.ones(2)}, "args": Malicious(trace)}, path)
    with pytest.raises(ConfigError, match=r"a\.pth is not a complete PyTorch checkpoint .* holds more than weights"):
        read_weights(path)
    assert not trace.exists()


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model": {f"module.{name}": value for name, value in state.items()}, "lr": 0.1},
        lambda state: {"Net": {"model_state": state, "objective_vectors": torch.zeros(2)}, "iter": 7},
    ],
)
def test_checkpoint_of_pytorch_is_unwrapped(
    tmp_path: Path, wrap: Callable[[dict[str, torch.Tensor]], object], legacy: bool
) -> None:
    state = small_net().state_dict()
    torch.save(wrap(state), tmp_path / "a.pth", _use_new_zipfile_serialization=not legacy)
    again = read_weights(tmp_path / "a.pth")
    assert again.keys() == state.keys() and all(torch.equal(again[name], state[name]) for name in state)


# --- checkpoints of the reference -------------------------------------------------------------------------------------


def test_reference_checkpoint_gets_our_names_and_the_background_first() -> None:
    state = {
        "b2.bn_branch2a.weight": torch.ones(1),
        "cov_feat.weight": torch.full((1,), 2.0),
        "bn.running_mean": torch.full((1,), 3.0),
        "fc8.weight": torch.tensor([[1.0], [2.0], [0.0]]).view(3, 1, 1, 1),  # two classes, then the background
    }
    ours = attention_state(state, num_classes=2)
    assert set(ours) == {"backbone.b2.bn_branch2a.weight", "neck.0.weight", "neck.1.running_mean", "head.weight"}
    assert ours["head.weight"].flatten().tolist() == [0, 1, 2]
    plain = attention_state({"fc8.weight": torch.tensor([[1.0], [2.0]])}, num_classes=2)
    assert plain["head.weight"].flatten().tolist() == [1, 2]  # no background: nothing to move
    assert attention_state({"head.weight": torch.ones(1)}, 2) == {"head.weight": torch.ones(1)}


# --- fill -------------------------------------------------------------------------------------------------------------


def test_mismatching_names_are_listed() -> None:
    state = small_net().state_dict()
    with pytest.raises(ConfigError, match="the weights of some file do not fit Sequential: NaN or infinite: 0.bias"):
        fill(small_net(), state | {"0.bias": torch.tensor([0.0, float("nan")])}, source="some file")
    del state["1.bias"]
    with pytest.raises(
        ConfigError, match=r'Missing.* "1\.bias"(.|\n)*Unexpected.* "extra"(.|\n)*mismatch for 0\.weight'
    ):
        fill(small_net(), state | {"extra": torch.ones(1), "0.weight": torch.ones(2, 4, 1, 1)}, source="some file")


# --- for backbones ----------------------------------------------------------------------------------------------------


def test_segmentation_weights_are_refused_unless_allowed(tmp_path: Path) -> None:
    path = tmp_path / "coco.safetensors"
    state = {f"backbone.{name}": value for name, value in SlimResNet().state_dict().items()}
    save_file(state | {"classifier.4.weight": torch.ones(21, 96)}, path)
    config = ModelConfig(backbone="slim", weights=str(path))
    with pytest.raises(ConfigError, match=r"has learned from pixel masks.* set allow_mask_weights=true"):
        build_backbone(config)
    backbone = build_backbone(config.model_copy(update={"allow_mask_weights": True}))
    assert torch.equal(backbone.state_dict()["stem.0.weight"], state["backbone.stem.0.weight"])
    for name in ("aspp.0.weight", "scale.base.layer5.conv2d_list.0.weight", "layer5.conv2d_list.0.bias"):
        save_file({name: torch.ones(1)}, path)
        with pytest.raises(ConfigError, match="holds a segmentation network"):
            image_level_weights(path)
    save_file({"classifier.1.weight": torch.ones(1), "features.0.weight": torch.ones(1)}, path)
    assert len(image_level_weights(path)) == 2

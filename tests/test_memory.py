"""What a network will take is known before it is tried."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from helpers import make_samples, tiny_config
from torch import Tensor, nn

from smaflib.config import AttentionConfig, ModelConfig
from smaflib.errors import ConfigError
from smaflib.maps import write_attention_maps
from smaflib.models import memory
from smaflib.models.memory import forward_bytes, refuse_what_does_not_fit, training_bytes
from smaflib.models.networks import AttentionNetwork
from smaflib.pipeline import check_networks
from smaflib.runtime import CPU, Runtime, cpu_runtime, memory_of

FLOAT = 4
CONV = nn.Conv2d(3, 4, 3, padding=1)
WEIGHTS = (3 * 4 * 9 + 4) * FLOAT
GIVEN, MADE = 2 * 3 * 8 * 8 * FLOAT, 2 * 4 * 8 * 8 * FLOAT


def test_training_keeps_what_the_way_back_needs() -> None:
    network = nn.Sequential(CONV, nn.ReLU())
    # The convolution's input and ReLU's output; weights, their gradients, AdamW's two moments.
    assert training_bytes(network, (2, 8, 8)) == GIVEN + MADE + 4 * WEIGHTS
    frozen = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1).requires_grad_(False), nn.ReLU())
    assert training_bytes(frozen, (2, 8, 8)) == WEIGHTS


def test_a_forward_pass_holds_its_largest_layer() -> None:
    assert forward_bytes(nn.Sequential(CONV, nn.ReLU()), (2, 8, 8)) == 2 * MADE + WEIGHTS
    assert forward_bytes(CONV, (2, 8, 8)) == GIVEN + MADE + WEIGHTS


def test_both_grow_with_the_batch_and_leave_the_network_alone() -> None:
    network = AttentionNetwork(ModelConfig(backbone="slim"), 3, background=True)
    before = [parameter.clone() for parameter in network.parameters()]
    for measure in (training_bytes, forward_bytes):
        fixed = measure(network, (0, 64, 64))
        one, many = (measure(network, (number, 64, 64)) - fixed for number in (1, 10**6))
        assert one > 0 and many == pytest.approx(10**6 * one, rel=0.02)  # statistics of BatchNorm do not grow
    assert all(map(torch.equal, network.parameters(), before))
    assert {parameter.device.type for parameter in network.parameters()} == {"cpu"}
    assert not network.backbone._forward_hooks


def test_refusal_names_setting_need_and_what_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(runtime: Runtime) -> None:
        refuse_what_does_not_fit(forward_bytes, CONV, (2, 8, 8), runtime, "this", "make it smaller")

    monkeypatch.setattr(memory, "memory_of", lambda device: GIVEN + MADE + WEIGHTS)
    refuse(cpu_runtime())  # just fits
    monkeypatch.setattr(memory, "memory_of", lambda device: (GIVEN + MADE + WEIGHTS) // 2)
    with pytest.raises(
        ConfigError, match=r"^this needs about 0.0 GB of memory \(2 images of 8 x 8 .*; make it smaller$"
    ):
        refuse(cpu_runtime())
    refuse(Runtime(CPU, "bf16"))  # takes half
    monkeypatch.setattr(memory, "memory_of", lambda device: None)
    refuse(cpu_runtime())


class OfNumbers(nn.Module):
    """A network that looks at numbers, which shapes alone do not have."""

    def forward(self, images: Tensor) -> Tensor:
        return images * float(images.sum())


def test_a_network_that_needs_numbers_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "memory_of", lambda device: 1)
    refuse_what_does_not_fit(forward_bytes, OfNumbers(), (1, 8, 8), cpu_runtime(), "this", "")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"classifier": {"batch_size": 65_536, "crop_size": 4096}},
            "classifier.batch_size=65536 with classifier.crop_size=4096",
        ),
        ({"self_training": {"batch_size": 65_536, "crop_size": 4096}}, "self_training.batch_size=65536"),
        ({"segmentation": {"batch_size": 65_536, "crop_size": 4096, "enabled": True}}, "segmentation.batch_size=65536"),
    ],
)
def test_a_batch_that_no_machine_holds_is_refused_before_anything_starts(
    settings: dict[str, dict[str, int]], message: str
) -> None:
    with pytest.raises(ConfigError, match=rf"{re.escape(message)}.* needs about [\d,.]+ GB.* but cpu has [\d.]+ GB"):
        check_networks(tiny_config(**settings))


def test_the_image_and_the_scale_that_do_not_fit_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_samples = make_samples(2)
    network = AttentionNetwork(ModelConfig(backbone="slim"), len(tiny_samples.class_names), background=True)
    monkeypatch.setattr(memory, "memory_of", lambda device: 10**5)
    first = tiny_samples.image_ids[0]
    with pytest.raises(ConfigError, match=f"attention of image '{first}' at scale 2 needs .*; leave the scale out"):
        write_attention_maps(network, tiny_samples, tmp_path, AttentionConfig(scales=(1.0, 2.0)), cpu_runtime())
    assert list(tmp_path.iterdir()) == []


def test_memory_of_this_machine() -> None:
    there = memory_of(CPU)
    assert there is not None and 2**30 < there < 2**50
    assert memory_of(torch.device("mps")) is None

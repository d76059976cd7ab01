"""The same numbers as the paper's reference implementation.

``data/parity.npz`` holds inputs and outputs of it (float32, CPU), with the background *last* as the reference has it.
The environment variable ``SMAF_PARITY`` names another file of the same form. ``mac_fused`` may be a window of the maps,
from the upper left: what is done to them is done pixel by pixel.
"""

from __future__ import annotations

import os
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from smaflib.cams import fuse_cams, multi_scale_cams
from smaflib.classifier import saliency_loss
from smaflib.config import AttentionConfig, ClassifierConfig, ModelConfig, SelfTrainingConfig
from smaflib.data.transforms import normalize
from smaflib.models import AttentionNetwork, load_attention_network
from smaflib.models.resnet38 import ResNet38
from smaflib.reactivation import denoise, reactivate
from smaflib.self_training import mac_loss

PARITY = Path(os.environ.get("SMAF_PARITY") or Path(__file__).parent / "data" / "parity.npz")


@pytest.fixture(scope="module")
def reference() -> dict[str, Tensor]:
    return {name: torch.from_numpy(array) for name, array in np.load(PARITY).items() if array.dtype.kind != "U"}


def background_first(maps: Tensor) -> Tensor:  # (B, K+1, h, w), background last -> background first
    return torch.cat([maps[:, -1:], maps[:, :-1]], dim=1)


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> AttentionNetwork:
    """ResNet38 and the paper's head, read from a checkpoint in the reference's form; random by the parity rule."""
    salt = str(np.load(PARITY)["salt"])
    state = {name: parity_weight(salt, name, value) for name, value in ResNet38().state_dict().items()}
    head = {"cov_feat.weight": (128, 4096, 1, 1), "fc8.weight": (21, 128, 1, 1)}
    head |= {f"bn.{name}": (128,) for name in ("weight", "bias", "running_mean", "running_var")}
    state |= {name: parity_weight(salt, name, torch.empty(shape)) for name, shape in head.items()}
    checkpoint = tmp_path_factory.mktemp("reference") / "checkpoint.pth"
    wrapped = {f"module.{name}": value for name, value in state.items()}
    torch.save({"Net": {"model_state": wrapped, "objective_vectors": torch.zeros(2)}, "iter": 20000}, checkpoint)
    config = ModelConfig(backbone="resnet38", head_channels=128)
    return load_attention_network(checkpoint, config, num_classes=20)


def parity_weight(salt: str, name: str, like: Tensor) -> Tensor:
    """The rule by which both sides of the comparison make the same weights."""
    source = torch.Generator().manual_seed(zlib.crc32(f"{salt}:{name}".encode()))
    if name.endswith("num_batches_tracked"):
        return torch.zeros_like(like)
    if name.endswith("running_var") or (like.dim() == 1 and name.endswith("weight")):
        return torch.rand(like.shape, generator=source) * 0.5 + 0.75
    if like.dim() == 1:
        return torch.randn(like.shape, generator=source) * 0.1
    return torch.randn(like.shape, generator=source) * (1 / like[0].numel()) ** 0.5


def test_logits_of_the_network(reference: dict[str, Tensor], network: AttentionNetwork) -> None:
    with torch.no_grad():
        logits = network(normalize(reference["image"].permute(2, 0, 1))[None])
    expected = background_first(reference["logits_scale1"][None])
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
    assert float(expected.std()) > 0.1


def test_multi_scale_attention(reference: dict[str, Tensor], network: AttentionNetwork) -> None:
    image, scales = reference["image"].permute(2, 0, 1), AttentionConfig().scales
    cams, size = multi_scale_cams(network, image, scales), (image.shape[1], image.shape[2])
    fused = fuse_cams(cams, size, AttentionConfig().fusion)
    torch.testing.assert_close(fused[reference["label"].bool()], reference["fused"], rtol=0, atol=1e-4)
    # The test would notice a missing scale.
    short = fuse_cams(cams[:3], size)
    assert float((short[reference["label"].bool()] - reference["fused"]).abs().max()) > 1e-3


@pytest.mark.parametrize(("tau", "weight"), [(0.5, 0.5), (0.4, 0.9)])
def test_saliency_loss_of_eps(reference: dict[str, Tensor], tau: float, weight: float) -> None:
    config = ClassifierConfig(eps_tau=tau, eps_lambda=weight)
    logits = background_first(reference["eps_cam"])
    saliency = reference["eps_sal"][:, 0]
    loss = saliency_loss(logits, saliency, reference["eps_lab"], config)
    assert float(loss) == pytest.approx(float(reference[f"eps_{tau}_{weight}"]), rel=1e-6)
    # The test would notice a background in the wrong place.
    wrong = saliency_loss(reference["eps_cam"], saliency, reference["eps_lab"], config)
    assert float(wrong) != pytest.approx(float(loss), rel=1e-3)


def test_denoised_and_reactivated_target(reference: dict[str, Tensor]) -> None:
    fused = reference["mac_fused"]
    target = reactivate(denoise(fused, reference["eps_lab"]), AttentionConfig().bg_score)
    expected = background_first(reference["mac_target"])[:, :, : fused.shape[2], : fused.shape[3]]
    torch.testing.assert_close(target, expected, rtol=1e-6, atol=1e-6)
    assert float(target[:, 1:].max()) == 1 and 0 < float((target[:, 0] == 1).float().mean()) < 1


def test_loss_of_the_student(reference: dict[str, Tensor]) -> None:
    logits, target = background_first(reference["mac_logits"]), background_first(reference["mac_target"])
    loss = mac_loss(logits, target, SelfTrainingConfig().loss_weight)
    assert float(loss) == pytest.approx(float(reference["mac_loss"]), rel=1e-6)
    wrong = mac_loss(reference["mac_logits"], target, SelfTrainingConfig().loss_weight)
    assert float(wrong) != pytest.approx(float(loss), rel=1e-3)

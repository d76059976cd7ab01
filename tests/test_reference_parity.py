"""The same numbers as the paper's reference implementation.

``data/parity.npz`` holds inputs and outputs of it (float32, CPU), with the background *last* as the reference has it.
The environment variable ``SMAF_PARITY`` names another file of the same form. ``mac_fused`` may be a window of the maps,
from the upper left: what is done to them is done pixel by pixel.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

from smaflib.classifier import saliency_loss
from smaflib.config import AttentionConfig, ClassifierConfig, SelfTrainingConfig
from smaflib.files import load_arrays
from smaflib.reactivation import denoise, reactivate
from smaflib.self_training import mac_loss

PARITY = Path(os.environ.get("SMAF_PARITY") or Path(__file__).parent / "data" / "parity.npz")


@pytest.fixture(scope="module")
def reference() -> dict[str, Tensor]:
    return {name: torch.from_numpy(array) for name, array in load_arrays(PARITY).items() if array.dtype.kind != "U"}


def background_first(maps: Tensor) -> Tensor:  # (B, K+1, h, w), background last -> background first
    return torch.cat([maps[:, -1:], maps[:, :-1]], dim=1)


@pytest.mark.parametrize(("tau", "weight"), [(0.5, 0.5), (0.4, 0.9)])
def test_saliency_loss_of_eps(reference: dict[str, Tensor], tau: float, weight: float) -> None:
    config = ClassifierConfig(eps_tau=tau, eps_lambda=weight)
    logits = background_first(reference["eps_cam"])
    loss = saliency_loss(logits, reference["eps_sal"], reference["eps_lab"], config)
    assert float(loss) == pytest.approx(float(reference[f"eps_{tau}_{weight}"]), rel=1e-6)
    # The test would notice a background in the wrong place.
    wrong = saliency_loss(reference["eps_cam"], reference["eps_sal"], reference["eps_lab"], config)
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

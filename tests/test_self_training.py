"""Stage 4: L_mac, the targets of a crop, and the student's training."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from helpers import make_samples, new_teacher, same_weights, tiny_config, train_student
from torch import Tensor, nn

from smaflib import self_training
from smaflib.maps import write_attention_maps
from smaflib.models import with_background
from smaflib.runtime import Runtime
from smaflib.self_training import mac_loss

CPU = Runtime(seed=0)


def masks_as_maps(num: int = 5) -> list[Tensor]:
    """(K, H, W) per sample of ``make_samples``: the ground truth, as if the teacher knew it."""
    samples = make_samples(num).with_ground_truth()
    return [torch.nn.functional.one_hot(sample.mask.long(), 4).permute(2, 0, 1)[1:].float() for sample in samples]  # type: ignore[union-attr]


# --- L_mac ------------------------------------------------------------------------------------------------------------


def test_mac_loss_by_hand() -> None:
    # The softmax is (1/4, 3/4), the target (0.25, 1): one of two numbers is wrong by 1/4.
    logits = torch.tensor([0.0, math.log(3)]).view(1, 2, 1, 1)
    target = torch.tensor([0.25, 1.0]).view(1, 2, 1, 1)
    assert float(mac_loss(logits, target)) == pytest.approx(100 / 32, rel=1e-5)
    assert float(mac_loss(logits, target, weight=1.0)) == pytest.approx(1 / 32, rel=1e-5)


def test_mac_loss_meets_at_the_targets_size_with_aligned_corners() -> None:
    logits = torch.tensor([[0.0, 0.0], [0.0, 3.0]]).view(1, 2, 1, 2)  # logit of class 1 rises from 0 to 3
    expected = torch.sigmoid(torch.tensor([0.0, 1.0, 2.0, 3.0]))  # not 0, 0.75, 2.25, 3: the corners are aligned
    target = torch.stack([1 - expected, expected]).view(1, 2, 1, 4)
    assert float(mac_loss(logits, target)) == pytest.approx(0, abs=1e-9)


# --- training ---------------------------------------------------------------------------------------------------------


def test_settings_decide_what_a_target_is(monkeypatch: pytest.MonkeyPatch) -> None:
    targets: list[Tensor] = []
    monkeypatch.setattr(
        self_training, "mac_loss", lambda logits, target, *_: targets.append(target) or logits.square().mean()
    )
    bg_score = tiny_config().attention.bg_score
    for settings in ({}, {"reactivate": False}, {"targets": "hard"}):
        config = tiny_config(self_training={"iterations": 1} | settings)
        train_student(new_teacher(config, 3, CPU), make_samples(ground_truth=False), masks_as_maps(), config, CPU)
    divided, as_is, hard = targets
    assert torch.equal(hard, hard.round()) and bool((hard.sum(dim=1) == 1).all())
    assert torch.equal(hard.argmax(dim=1), divided.argmax(dim=1))
    assert float(divided.amax(dim=1).min()) == 1  # the strongest class of every pixel is at 1
    assert as_is[:, 0].unique().tolist() == [pytest.approx(bg_score)]
    assert torch.allclose(as_is / as_is.amax(dim=1, keepdim=True), divided)


@pytest.mark.parametrize("pretraining", ["plain", "eps"])
def test_student_trains_while_the_teacher_stays(pretraining: str, tmp_path: Path) -> None:
    config = tiny_config(classifier={"pretraining": pretraining})
    teacher, samples = new_teacher(config, 3, CPU), make_samples(ground_truth=False)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    path = tmp_path / "student.safetensors"
    student, history = train_student(teacher, samples, masks_as_maps(), config, CPU, path)
    assert student.background and not student.training
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert not same_weights(student, with_background(teacher))
    assert [set(record) for record in history] == [{"iteration", "L_mac"}] * 4
    again, same_history = train_student(teacher, samples, masks_as_maps(), config, CPU, path)
    assert same_weights(again, student) and same_history == history


def test_targets_are_reactivated_crops_at_a_quarter_of_the_side(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Tensor, float]] = []
    monkeypatch.setattr(
        self_training,
        "mac_loss",
        lambda logits, target, weight: seen.append((target, weight)) or mac_loss(logits, target, weight),
    )
    config = tiny_config(
        attention={"bg_score": 0.5},
        # The image is half as large as the crop: at least half of the crop is padding.
        self_training={"iterations": 2, "crop_size": 64, "resize_range": [32, 32], "loss_weight": 7.0},
    )
    train_student(new_teacher(config, 3, CPU), make_samples(), masks_as_maps(), config, CPU)
    for target, weight in seen:
        assert target.shape == (2, 4, 16, 16) and weight == 7.0
        assert bool((target.amax(dim=1) == 1).all())
        outside = (target[:, 0] == 1) & (target[:, 1:] == 0).all(dim=1)  # no attention there: background
        assert float(outside.float().mean()) > 0.5
        inside = target[:, 1:].amax(dim=1) == 1
        assert bool(inside.any()) and bool((target[:, 0][inside] <= 1).all())
        assert float(target[:, 0].min()) == pytest.approx(0.5, abs=0.01)  # 0.5 divided by a peak of 1
    assert len(seen) == 2


def test_a_fresh_head_starts_undecided() -> None:
    config = tiny_config(self_training={"fresh_head": True, "learning_rate": 1e-12, "iterations": 1})
    teacher, samples = new_teacher(config, 3, CPU), make_samples(2)
    student, _ = train_student(teacher, samples, masks_as_maps(2), config, CPU)
    assert float(student.head.weight.detach().abs().max()) < 1e-6 < float(teacher.head.weight.detach().abs().max())


class ColourNetwork(nn.Module):
    """A network that smaflib did not make: a linear function of the pixel, background first, and its attention."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 4, 4, stride=4)

    def forward(self, images: Tensor) -> Tensor:  # (B, 3, H, W) -> (B, 4, H/4, W/4)
        return self.layer(images)

    def attention(self, logits: Tensor) -> Tensor:
        return logits.softmax(dim=1)[:, 1:]


def test_custom_networks_are_taught_and_give_maps(tmp_path: Path) -> None:
    config = tiny_config(self_training={"iterations": 30, "learning_rate": 0.05, "batch_size": 3})
    teacher, samples = ColourNetwork(), make_samples(3)
    student, history = train_student(teacher, samples, masks_as_maps(3), config, CPU, tmp_path / "own.safetensors")
    assert isinstance(student, ColourNetwork) and student is not teacher and not same_weights(student, teacher)
    assert history[-1]["L_mac"] < 0.5 * history[0]["L_mac"]
    maps = write_attention_maps(student, samples, tmp_path / "cams", config.attention, CPU)
    # Red, green and blue rectangles: the student has learned which is which.
    for sample in samples:
        strongest = maps.fused(sample.image_id).amax(dim=(1, 2)) * sample.image_label
        assert int(strongest.argmax()) == int(sample.image_label.argmax())

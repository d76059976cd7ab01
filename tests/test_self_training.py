"""Stage 4: L_mac, the targets of a crop, and the student's training."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from helpers import make_samples, same_weights, tiny_config
from torch import Tensor

from smaflib import self_training
from smaflib.cams import AttentionMaps
from smaflib.classifier import new_teacher
from smaflib.models import with_background
from smaflib.pseudo_masks import pseudo_masks
from smaflib.reactivation import denoise, reactivate, with_background_score
from smaflib.runtime import Runtime, cpu_runtime
from smaflib.self_training import DenoisedMaps, mac_loss, self_train, student_targets

CPU = cpu_runtime(0)


def masks_as_maps(num: int = 5) -> list[Tensor]:
    """(K, H, W) per sample of ``make_samples``: the ground truth, as if the teacher knew it."""
    samples = make_samples(num).with_masks()
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


def test_mac_loss_is_computed_in_float32() -> None:
    logits, target = torch.randn(1, 3, 4, 4), torch.rand(1, 3, 8, 8)
    assert torch.equal(mac_loss(logits.bfloat16(), target), mac_loss(logits.bfloat16().float(), target))


# --- training ---------------------------------------------------------------------------------------------------------


def test_student_learns_what_make_target_says(monkeypatch: pytest.MonkeyPatch) -> None:
    config, samples = tiny_config(self_training={"iterations": 1}), make_samples(ground_truth=False)
    targets: list[Tensor] = []
    monkeypatch.setattr(
        self_training, "mac_loss", lambda logits, target, _: targets.append(target) or logits.square().mean()
    )
    for rule in (reactivate, with_background_score):
        self_train(new_teacher(config, 3, CPU), samples, masks_as_maps(), config, CPU, make_target=rule)
    divided, as_is = targets
    assert float(divided.amax(dim=1).min()) == 1  # every pixel has a winner at 1
    assert as_is[:, 0].unique().tolist() == [pytest.approx(config.attention.resolved_bg_score)]
    assert torch.allclose(as_is / as_is.amax(dim=1, keepdim=True), divided)


@pytest.mark.parametrize("pretraining", ["plain", "eps"])
def test_student_trains_while_the_teacher_stays(pretraining: str, tmp_path: Path) -> None:
    config = tiny_config(classifier={"pretraining": pretraining})
    teacher, samples = new_teacher(config, 3, CPU), make_samples(ground_truth=False)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    path = tmp_path / "student.safetensors"
    student, history = self_train(teacher, samples, masks_as_maps(), config, CPU, path)
    assert student.background and not student.training
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert not same_weights(student, with_background(teacher))
    assert [set(record) for record in history] == [{"iteration", "L_mac"}] * 4
    again, same_history = self_train(teacher, samples, masks_as_maps(), config, CPU, path)
    assert same_weights(again, student) and same_history == history


def test_student_learns_its_targets() -> None:
    config = tiny_config(self_training={"iterations": 30, "learning_rate": 0.01, "batch_size": 3})
    _, history = self_train(new_teacher(config, 3, CPU), make_samples(3), masks_as_maps(3), config, CPU)
    assert history[-1]["L_mac"] < 0.5 * history[0]["L_mac"]


def test_targets_are_reactivated_crops_at_a_quarter_of_the_side(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Tensor, float]] = []

    def spy(logits: Tensor, target: Tensor, weight: float) -> Tensor:
        seen.append((target, weight))
        return mac_loss(logits, target, weight)

    monkeypatch.setattr(self_training, "mac_loss", spy)
    config = tiny_config(
        attention={"bg_score": 0.5},
        # The image is half as large as the crop: at least half of the crop is padding.
        self_training={"iterations": 2, "crop_size": 64, "resize_range": [32, 32], "loss_weight": 7.0},
    )
    self_train(new_teacher(config, 3, CPU), make_samples(), masks_as_maps(), config, CPU)
    for target, weight in seen:
        assert target.shape == (2, 4, 16, 16) and weight == 7.0
        assert bool((target.amax(dim=1) == 1).all())
        outside = (target[:, 0] == 1) & (target[:, 1:] == 0).all(dim=1)  # no attention there: background
        assert float(outside.float().mean()) > 0.5
        inside = target[:, 1:].amax(dim=1) == 1
        assert bool(inside.any()) and bool((target[:, 0][inside] <= 1).all())
        assert float(target[:, 0].min()) == pytest.approx(0.5, abs=0.01)  # 0.5 divided by a peak of 1
    assert len(seen) == 2


def test_image_and_target_are_cut_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the target has class c the image has its colour, whatever the crop and flip."""
    pairs: list[tuple[Tensor, Tensor]] = []
    original = self_training.Batches.__getitem__

    def spy(batches: object, iteration: int) -> dict[str, Tensor]:
        batch = original(batches, iteration)  # type: ignore[arg-type]
        pairs.append((batch["image"], batch["denoised"]))
        return batch

    monkeypatch.setattr(self_training.Batches, "__getitem__", spy)
    config = tiny_config(self_training={"iterations": 6, "batch_size": 4})
    self_train(new_teacher(config, 3, CPU), make_samples(), masks_as_maps(), config, CPU)
    checked = 0
    for images, cleans in pairs:
        for image, denoised in zip(images, cleans, strict=True):
            for number in range(3):
                core = denoised[number] > 0.99
                others = [channel for channel in range(3) if channel != number]
                assert bool((image[number][core] > 1).all()) and bool((image[others][:, core] < -1).all())
                checked += int(core.sum())
    assert checked > 1000


def test_seed_and_precision_of_the_runtime_are_used() -> None:
    config = tiny_config(self_training={"iterations": 2})
    teacher, samples, denoised = new_teacher(config, 3, CPU), make_samples(), masks_as_maps()
    students = [
        self_train(teacher, samples, denoised, config, runtime)[0]
        for runtime in (CPU, CPU, cpu_runtime(1), Runtime(torch.device("cpu"), "bf16"))
    ]
    assert same_weights(students[0], students[1])
    assert not same_weights(students[0], students[2]) and not same_weights(students[0], students[3])


# --- DenoisedMaps
# --------------------------------------------------------------------------------------------------------


@pytest.fixture
def maps(tmp_path: Path) -> AttentionMaps:
    maps = AttentionMaps(tmp_path, (0.5, 1.0))
    for seed, image_id in enumerate(make_samples(3).image_ids):
        torch.manual_seed(seed)
        maps.write(image_id, [torch.rand(3, 2, 3), torch.rand(3, 4, 5)], (32, 40))
    return maps


def test_clean_maps_are_fused_and_denoised_in_the_order_of_the_split(maps: AttentionMaps) -> None:
    samples = make_samples(3).subset([2, 0])
    denoised = DenoisedMaps(maps, samples, rule="max", scales=[1.0])
    assert len(denoised) == 2
    for index, sample in enumerate(samples):
        expected = denoise(maps.fused(sample.image_id, "max", [1.0]), sample.image_label)
        assert torch.equal(denoised[index], expected)
        assert denoised[index].amax(dim=(1, 2)).round().tolist() == sample.image_label.tolist()


def test_clean_maps_can_be_kept_in_half_precision(maps: AttentionMaps) -> None:
    samples = make_samples(3)
    lazy, cached = DenoisedMaps(maps, samples), DenoisedMaps(maps, samples, cached=True)
    first = cached[1]
    torch.testing.assert_close(first, lazy[1], rtol=1e-3, atol=1e-4)
    maps.path("image1").unlink()
    assert torch.equal(cached[1], first) and first.dtype == torch.float32
    with pytest.raises(ValueError, match="no attention maps"):
        lazy[1]


def test_whole_split_can_be_walked_through(maps: AttentionMaps) -> None:
    assert [tuple(denoised.shape) for denoised in DenoisedMaps(maps, make_samples(3))] == [(3, 32, 40)] * 3


# --- targets ----------------------------------------------------------------------------------------------------------


def test_targets_are_the_clean_maps_unless_they_are_refined() -> None:
    denoised = masks_as_maps(2)
    assert student_targets(make_samples(2), denoised, tiny_config()) is denoised


def test_refined_targets_are_the_masks_of_the_crf_seen_as_maps() -> None:
    samples = make_samples(2)
    blurred = [torch.nn.functional.avg_pool2d(maps, 5, 1, 2) for maps in masks_as_maps(2)]  # wrong at the edges
    config = tiny_config(self_training={"refine": "crf"}, pseudo_masks={"num_workers": 1})
    targets = student_targets(samples, blurred, config)
    assert len(targets) == 2
    for index, (_, mask) in enumerate(
        pseudo_masks(samples, blurred, config.attention.bg_score, config.pseudo_masks.crf, num_workers=1)
    ):
        for number in range(3):
            assert torch.equal(targets[index][number], (mask == number + 1).float())


def test_a_fresh_head_starts_undecided() -> None:
    config = tiny_config(self_training={"fresh_head": True, "learning_rate": 1e-12, "iterations": 1})
    teacher, samples = new_teacher(config, 3, CPU), make_samples(2)
    student, _ = self_train(teacher, samples, masks_as_maps(2), config, CPU)
    assert float(student.head.weight.detach().abs().max()) < 1e-6 < float(teacher.head.weight.detach().abs().max())

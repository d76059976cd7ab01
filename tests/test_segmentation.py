"""Stage 6: loss, training, and labelling with scales and flips."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers import (
    CLASSES,
    PixelNetwork,
    generator,
    make_samples,
    same_weights,
    tiny_config,
    train_segmentation,
)
from torch import Tensor

from smaflib import segmentation
from smaflib.config import CrfConfig, SegmentationConfig
from smaflib.evaluation import evaluate
from smaflib.models.networks import AttentionNetwork, SegmentationNetwork
from smaflib.refinement import dense_crf
from smaflib.runtime import Runtime
from smaflib.segmentation import segment, segment_many, segmentation_loss, start_as_student

CPU = Runtime(seed=0)


def true_masks(num: int = 5) -> list[Tensor]:
    return [sample.mask for sample in make_samples(num).with_ground_truth() if sample.mask is not None]


@pytest.mark.parametrize(("channels", "weight", "message"), [(4, float("nan"), "NaN"), (301, 1.0, "301 labels")])
def test_logits_that_no_mask_can_hold_are_an_error(channels: int, weight: float, message: str) -> None:
    network, image = PixelNetwork(torch.full((channels, 3), weight)), torch.zeros(3, 8, 8, dtype=torch.uint8)
    with pytest.raises(ValueError, match=message):
        segment(network, image, SegmentationConfig(test_flip=False))  # type: ignore[arg-type]


# --- the loss ---------------------------------------------------------------------------------------------------------


def test_loss_by_hand_and_void_does_not_count() -> None:
    logits = torch.zeros(1, 2, 1, 3)
    logits[0, 1, 0, 0] = math.log(3)
    mask = torch.tensor([[[1, 0, 255]]], dtype=torch.uint8)
    expected = (-math.log(3 / 4) - math.log(1 / 2)) / 2
    assert float(segmentation_loss(logits, mask)) == pytest.approx(expected, rel=1e-6)


# --- training ---------------------------------------------------------------------------------------------------------


def test_segmenter_learns_three_colours() -> None:
    config = tiny_config(segmentation={"iterations": 60, "learning_rate": 0.01, "batch_size": 3, "skip_channels": 8})
    samples, masks = make_samples(3), true_masks(3)
    network, history = train_segmentation(samples, masks, config, CPU)
    assert [set(record) for record in history] == [{"iteration", "L_seg"}] * 60
    predicted = [segment(network, sample.image, config.segmentation) for sample in samples]
    assert evaluate(predicted, masks, CLASSES).miou > 0.5


def test_outside_of_the_image_is_void(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Tensor, Tensor]] = []

    def spy(logits: Tensor, mask: Tensor) -> Tensor:
        seen.append((logits, mask))
        return segmentation_loss(logits, mask)

    monkeypatch.setattr(segmentation, "segmentation_loss", spy)
    config = tiny_config(segmentation={"iterations": 1, "crop_size": 64, "resize_range": [32, 32]})
    train_segmentation(make_samples(), true_masks(), config, CPU)
    ((logits, mask),) = seen
    assert logits.shape[:2] == (2, 4) and mask.shape == (2, 64, 64) and mask.dtype == torch.uint8
    inside = mask != 255
    assert int(inside.sum()) == 2 * 32 * 26  # 32 x 40 images, the long side brought to 32
    assert set(mask[inside].tolist()) <= {0, 1, 2, 3} and bool((mask[inside] > 0).any())


@pytest.mark.parametrize("frozen", [False, True])
def test_deeplab_starts_with_the_students_logits(frozen: bool) -> None:
    config = tiny_config(model={"freeze_backbone": frozen})
    student = AttentionNetwork(config.model, 3, background=True).eval()
    if frozen:
        student.standardize.running_mean.uniform_(-1, 1)  # type: ignore[union-attr, operator]
    network = SegmentationNetwork(config.model, config.segmentation, 3).eval()
    start_as_student(network, student)
    image = torch.rand(2, 3, 32, 48, generator=generator(0))
    torch.testing.assert_close(network(image), student(image), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("model", "segmentation", "background"),
    [
        ({"head_channels": 8}, {}, True),
        ({}, {"skip_channels": 8}, True),
        ({}, {"architecture": "deeplabv3"}, True),
        ({}, {}, False),
    ],
)
def test_other_heads_take_the_students_features_alone(
    model: dict[str, Any], segmentation: dict[str, Any], background: bool
) -> None:
    config = tiny_config(model=model, segmentation=segmentation)
    student = AttentionNetwork(config.model, 3, background)
    network = SegmentationNetwork(config.model, config.segmentation, 3)
    head = [value.clone() for value in network.aspp.state_dict().values()]
    start_as_student(network, student)
    assert same_weights(network.backbone, student.backbone)
    assert all(torch.equal(one, other) for one, other in zip(head, network.aspp.state_dict().values(), strict=True))


# --- labelling --------------------------------------------------------------------------------------------------------


class Sided(torch.nn.Module):
    """Class 1 on the left half of any image, with a logit of ``strength``."""

    def __init__(self, strength: float) -> None:
        super().__init__()
        self.strength = torch.nn.Parameter(torch.tensor(strength))

    def forward(self, images: Tensor) -> Tensor:
        logits = torch.zeros(len(images), 2, *images.shape[2:])
        logits[:, 1, :, : images.shape[3] // 2] = self.strength
        logits[:, 1, :, images.shape[3] // 2 :] = -self.strength / 2
        return logits


def test_flips_are_undone_before_the_average() -> None:
    image = torch.zeros(3, 4, 8, dtype=torch.uint8)
    config = SegmentationConfig(test_scales=(1.0,), test_flip=False)
    assert segment(Sided(2.0), image, config).tolist() == [[1, 1, 1, 1, 0, 0, 0, 0]] * 4
    both = segment(Sided(2.0), image, config.model_copy(update={"test_flip": True}))
    # Mean of sigmoid(2) = 0.88 and sigmoid(-1) = 0.27 is above a half, on both sides alike.
    assert both.tolist() == [[1] * 8] * 4


def test_probabilities_and_not_logits_are_averaged_over_scales() -> None:
    class Loud(torch.nn.Module):
        """At full size a very sure class 1; at every other size a fairly sure background."""

        def __init__(self) -> None:
            super().__init__()
            self.dummy = torch.nn.Parameter(torch.zeros(()))

        def forward(self, images: Tensor) -> Tensor:
            value = 50.0 if images.shape[2] == 8 else -3.0
            return torch.tensor([0.0, value])[None, :, None, None].expand(len(images), 2, *images.shape[2:])

    image = torch.zeros(3, 8, 8, dtype=torch.uint8)
    for scales, label in (((1.0,), 1), ((0.5, 1.0), 1), ((0.5, 1.0, 1.5), 0)):
        config = SegmentationConfig(test_scales=scales)
        assert bool((segment(Loud(), image, config) == label).all())


@pytest.mark.parametrize("unary", ["scores", "labels"])
def test_crf_refines_the_averaged_probabilities_or_their_labels(unary: Any) -> None:
    image = make_samples(1)[0].image
    matrix = torch.tensor([[0.0, 0.0, 0.0], [3.0, -3.0, 0.001]])  # blue, or rounding would decide where red is green
    network = PixelNetwork(matrix, stride=1)
    network.num_classes = 1
    crf = CrfConfig(iterations=2, unary=unary)
    config = SegmentationConfig(test_scales=(1.0, 1.0), test_flip=True, test_crf=crf)
    pixels = image.float() / 255
    logit = 3 * (pixels[0] - pixels[1]) + 0.001 * pixels[2]
    probabilities = torch.stack([torch.zeros_like(logit), logit]).softmax(dim=0)
    given = probabilities if unary == "scores" else probabilities.argmax(dim=0)
    assert torch.equal(segment(network, image, config), dense_crf(image, given, crf, num_labels=2))


# --- masks of a split -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("crf", [None, CrfConfig(iterations=2), CrfConfig(iterations=2, unary="scores")])
def test_a_split_is_segmented_like_each_image(crf: CrfConfig | None) -> None:
    settings = tiny_config(segmentation={"test_scales": [0.5, 1.0], "test_crf_workers": 1}).segmentation
    settings = settings.model_copy(update={"test_crf": crf})
    network = SegmentationNetwork(tiny_config().model, settings, len(CLASSES))
    samples = make_samples(6)
    for sample, mask in zip(samples, segment_many(network, samples, settings, CPU), strict=True):
        # Several images in a forward pass are sums of another order: a tie may be decided otherwise.
        assert (mask != segment(network, sample.image, settings, CPU)).float().mean() < 0.01

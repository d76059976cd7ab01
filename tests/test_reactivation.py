"""Stage 3: the arithmetic of denoising and reactivation."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

from smaflib.cams import fuse_cams
from smaflib.evaluation import masks_of
from smaflib.reactivation import blend_saliency, denoise, hard_labels, hard_targets, reactivate, with_background_score

SIDES = st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 5))  # K, H, W
MAPS = SIDES.flatmap(lambda shape: hnp.arrays("float32", shape, elements=st.floats(0, 1, width=32)))
MAPS = MAPS.map(torch.from_numpy)
BG_SCORES = st.floats(0.01, 1)


# --- denoise ----------------------------------------------------------------------------------------------------------


def test_denoise_by_hand() -> None:
    fused = torch.tensor([[[0.5, 1.0]], [[0.25, 0.75]]])
    assert denoise(fused, torch.tensor([0, 1])).tolist() == [[[0, 0]], [[0.25, 0.75]]]
    batch = denoise(torch.stack([fused, fused]), torch.tensor([[1, 0], [1, 1]]))
    assert batch[0].tolist() == [[[0.5, 1.0]], [[0, 0]]] and torch.equal(batch[1], fused)


@pytest.mark.parametrize("shape", [(3,), (1, 2)])
def test_label_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"image_label .* does not match the maps \(2, 4, 4\).*background has no"):
        denoise(torch.rand(2, 4, 4), torch.ones(shape))


# --- saliency ---------------------------------------------------------------------------------------------------------


def test_blend_of_saliency_by_hand() -> None:
    # A weak salient pixel rises, a strong one off the saliency falls, one without class stays without.
    denoised = torch.tensor([[[0.4, 0.8, 0.0]], [[0.2, 0.0, 0.0]]])
    saliency = torch.tensor([[1.0, 0.0, 1.0]])
    expected = torch.tensor([[[0.75 * 0.4 + 0.25, 0.6, 0.0]], [[0.75 * 0.2 + 0.25 * 0.5, 0.0, 0.0]]])
    torch.testing.assert_close(blend_saliency(denoised, saliency, 0.25), expected)
    assert torch.equal(blend_saliency(denoised, saliency, 0), denoised)


# --- reactivate -------------------------------------------------------------------------------------------------------


def test_reactivate_by_hand() -> None:
    # Three pixels: a sure class, a class below the background, two classes that compete.
    denoised = torch.tensor([[[0.8, 0.1, 0.4]], [[0.0, 0.0, 0.5]]])
    expected = torch.tensor([[[0.25, 1.0, 0.4]], [[1.0, 0.5, 0.8]], [[0.0, 0.0, 1.0]]])
    torch.testing.assert_close(reactivate(denoised, bg_score=0.2), expected)
    torch.testing.assert_close(reactivate(torch.stack([denoised, denoised]), 0.2)[1], expected)


def test_image_without_classes_is_background_and_never_nan() -> None:
    target = reactivate(torch.zeros(2, 3, 3), bg_score=0.2)
    assert bool((target[0] == 1).all()) and not target[1:].any()


@settings(max_examples=20)
@given(maps=MAPS, bg_score=BG_SCORES)
def test_the_strongest_class_is_exactly_1_and_stays_the_strongest(maps: Tensor, bg_score: float) -> None:
    scores, target = with_background_score(maps, bg_score), reactivate(maps, bg_score)
    assert target.shape == (len(maps) + 1, *maps.shape[1:])
    assert bool((target.amax(dim=0) == 1).all()) and float(target.min()) >= 0
    assert torch.equal(target.argmax(dim=0)[unique_winner(scores)], scores.argmax(dim=0)[unique_winner(scores)])
    assert bool((target.gather(0, scores.argmax(dim=0)[None]) == 1).all())


def unique_winner(scores: Tensor) -> Tensor:
    """Pixels whose strongest score is ahead by more than a rounding of the division."""
    best = scores.topk(2, dim=0).values
    return best[1] < best[0] * (1 - 1e-6)


@pytest.mark.parametrize("bg_score", [0.0, 1.5, float("nan")])
def test_background_score_without_sense_is_refused(bg_score: float) -> None:
    with pytest.raises(ValueError, match=r"bg_score must be in \(0, 1\]"):
        reactivate(torch.rand(1, 2, 2), bg_score)


# --- hard targets -----------------------------------------------------------------------------------------------------


def test_hard_targets_by_hand() -> None:
    denoised = torch.tensor([[[0.75, 0.25, 0.375]], [[0.5, 0.125, 0.375]]])  # two classes, one row of three pixels
    expected = [[[0.0, 1.0, 1.0]], [[1.0, 0.0, 0.0]], [[0.0, 0.0, 0.0]]]  # the last pixel: the first of equals
    assert hard_targets(denoised, bg_score=0.375).tolist() == expected
    assert torch.equal(hard_targets(denoised[None], bg_score=0.375)[0], torch.tensor(expected))


# --- what no mask can hold --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_scores_that_are_not_finite_give_no_mask(bad: float) -> None:
    cam = torch.tensor([[[0.5, bad]], [[0.25, 0.125]]])
    with pytest.raises(ValueError, match="the scores hold NaN or infinity"):
        hard_labels(cam, bg_score=0.25)
    with pytest.raises(ValueError, match="the scores hold NaN or infinity"):
        hard_labels(denoise(fuse_cams([cam], (1, 2)), torch.tensor([1.0, 0.0])), bg_score=0.25)
    with pytest.raises(ValueError, match="the scores hold NaN or infinity"):
        list(masks_of([cam], bg_score=0.25))


def test_a_mask_has_room_for_254_classes() -> None:
    maps = torch.zeros(254, 1, 1)
    maps[253] = 1
    assert hard_labels(maps, bg_score=0.25).tolist() == [[254]]
    for make in (lambda maps: hard_labels(maps, 0.25), lambda maps: next(masks_of([maps], 0.25))):
        with pytest.raises(ValueError, match="30[01] labels do not fit into a mask of 8 bits"):
            make(torch.rand(300, 1, 1))

"""The dense CRF: the same as pydensecrf's, and what it is for."""

from __future__ import annotations

import numpy as np
import pydensecrf.densecrf as densecrf
import pytest
import torch
from helpers import generator
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from smaflib.config import CrfConfig
from smaflib.refinement import dense_crf
from smaflib.refinement.unary import hard_unary

PARAMS = CrfConfig(iterations=5, bilateral_sxy=20, bilateral_srgb=8, bilateral_compat=6)


def square() -> tuple[Tensor, Tensor]:
    """A dark square on a light ground, (3, 24, 30), and its mask."""
    mask = torch.zeros(24, 30, dtype=torch.uint8)
    mask[6:18, 8:22] = 1
    image = torch.where(mask.bool(), 40, 200).to(torch.uint8).expand(3, -1, -1)
    return image, mask


def noisy(mask: Tensor, share: float = 0.2) -> Tensor:
    wrong = torch.rand(mask.shape, generator=generator(0)) < share
    return torch.where(wrong, 1 - mask, mask)


def with_pydensecrf(image: Tensor, unary: np.ndarray, params: CrfConfig) -> np.ndarray:
    height, width = image.shape[-2:]
    crf = densecrf.DenseCRF2D(width, height, len(unary))
    crf.setUnaryEnergy(np.ascontiguousarray(unary.reshape(len(unary), -1), dtype=np.float32))
    crf.addPairwiseGaussian(sxy=params.gaussian_sxy, compat=params.gaussian_compat)
    crf.addPairwiseBilateral(
        sxy=params.bilateral_sxy,
        srgb=params.bilateral_srgb,
        rgbim=np.ascontiguousarray(image.permute(1, 2, 0).numpy()),
        compat=params.bilateral_compat,
    )
    return np.array(crf.inference(params.iterations)).argmax(axis=0).reshape(height, width)


@pytest.mark.parametrize("params", [PARAMS, CrfConfig(iterations=3, gt_prob=0.9)])
def test_hard_labels_agree_with_a_direct_call(params: CrfConfig) -> None:
    image = torch.randint(100, 130, (3, 16, 20), dtype=torch.uint8, generator=generator(1))
    labels = torch.randint(0, 3, (16, 20), dtype=torch.uint8, generator=generator(2))
    # The unary by its definition: -log of gt_prob for the label, the rest shared among the others.
    hard = np.eye(3)[labels.numpy()].transpose(2, 0, 1)
    unary = -np.log(np.where(hard == 1, params.gt_prob, (1 - params.gt_prob) / 2))
    expected = with_pydensecrf(image, unary, params)
    refined = dense_crf(image, labels, params, num_labels=3)
    assert refined.dtype == torch.uint8 and refined.shape == (16, 20)
    assert np.array_equal(refined.numpy(), expected)
    assert not torch.equal(refined, labels)


@settings(max_examples=40, deadline=None)
@given(
    num_labels=st.integers(2, 81),
    num_present=st.integers(1, 4),
    size=st.tuples(st.integers(1, 18), st.integers(1, 18)),
    gt_prob=st.sampled_from([0.3, 0.7, 0.95]),
    seed=st.integers(0, 1000),
)
def test_merging_the_absent_labels_is_exact(
    num_labels: int, num_present: int, size: tuple[int, int], gt_prob: float, seed: int
) -> None:
    params = CrfConfig(gt_prob=gt_prob, bilateral_sxy=5, bilateral_srgb=20)
    image = torch.randint(60, 120, (3, *size), dtype=torch.uint8, generator=generator(seed))
    chosen = torch.randperm(num_labels, generator=generator(seed))[:num_present].to(torch.uint8)
    labels = chosen[torch.randint(0, len(chosen), size, generator=generator(seed))]
    hard = np.eye(num_labels)[labels.numpy()].transpose(2, 0, 1)
    unary = -np.log(np.where(hard == 1, gt_prob, (1 - gt_prob) / (num_labels - 1)))
    merged = hard_unary(labels, num_labels, params)
    assert len(merged.labels) <= num_present + 1 and int(merged.counts.sum()) == num_labels
    assert np.array_equal(dense_crf(image, labels, params, num_labels).numpy(), with_pydensecrf(image, unary, params))


def test_merged_channel_by_hand() -> None:
    # Labels 0 and 2 of five occur: 1, 3 and 4 share a channel in the place of label 1.
    unary = hard_unary(torch.tensor([[0, 2]]), 5, CrfConfig(gt_prob=0.6))
    assert unary.labels.tolist() == [0, 1, 2] and unary.counts.tolist() == [1, 3, 1]
    expected = torch.tensor([[0.6, 0.1], [0.3, 0.3], [0.1, 0.6]])  # probabilities, (channel, pixel)
    torch.testing.assert_close((-unary.energies).exp()[:, 0], expected)
    # A channel of three labels is no likelier than each of them.
    assert unary.winners(torch.tensor([[[0.3, 0.2]], [[0.5, 0.8]], [[0.2, 0.0]]])).tolist() == [[0, 1]]


def test_soft_scores_agree_with_a_direct_call() -> None:
    image = torch.randint(100, 130, (3, 16, 20), dtype=torch.uint8, generator=generator(1))
    probabilities = torch.randn(4, 16, 20, generator=generator(3)).softmax(dim=0)
    expected = with_pydensecrf(image, -np.log(probabilities.numpy()), PARAMS)
    assert np.array_equal(dense_crf(image, probabilities, PARAMS).numpy(), expected)


@pytest.mark.parametrize("soft", [False, True])
def test_noisy_square_becomes_the_square(soft: bool) -> None:
    image, mask = square()
    labels = noisy(mask)
    assert not torch.equal(labels, mask)
    if soft:
        scores = torch.stack([1 - labels.float(), labels.float()]) * 0.4 + 0.3
        assert torch.equal(dense_crf(image, scores, PARAMS), mask)
    else:
        assert torch.equal(dense_crf(image, labels, PARAMS, num_labels=2), mask)


def test_certain_scores_are_not_infinitely_certain() -> None:
    image, mask = square()
    scores = torch.stack([1 - mask.float(), mask.float()])  # probabilities of exactly 0 have no logarithm
    assert torch.equal(dense_crf(image, scores, PARAMS), mask)


def test_no_iterations_change_nothing() -> None:
    image, mask = square()
    labels = noisy(mask)
    assert torch.equal(dense_crf(image, labels, PARAMS.model_copy(update={"iterations": 0}), num_labels=2), labels)


def test_inputs_stay_as_they_are_and_need_not_be_contiguous() -> None:
    image, mask = square()
    labels = noisy(mask)
    copies = image.clone(), labels.clone()
    expected = dense_crf(image.contiguous(), labels, PARAMS, num_labels=2)
    strided = labels.T.contiguous().T
    assert torch.equal(dense_crf(image, strided, PARAMS, num_labels=2), expected)
    assert torch.equal(image, copies[0]) and torch.equal(labels, copies[1])


def test_labels_that_do_not_occur_are_possible() -> None:
    image, mask = square()
    assert torch.equal(dense_crf(image, mask, PARAMS, num_labels=21), mask)


def test_what_does_not_fit_is_refused() -> None:
    image, mask = square()
    with pytest.raises(ValueError, match=r"scores \(L, H, W\) of its size, got \(3, 24, 30\) and \(24, 29\)"):
        dense_crf(image, mask[:, :-1], PARAMS, num_labels=2)
    with pytest.raises(ValueError, match="the original uint8 colours, got an image of torch.float32"):
        dense_crf(image.float(), mask, PARAMS, num_labels=2)
    with pytest.raises(ValueError, match="at least 2 labels, got 0; pass num_labels with hard labels"):
        dense_crf(image, mask, PARAMS)
    with pytest.raises(ValueError, match="at least 2 labels, got 1"):
        dense_crf(image, torch.ones(1, 24, 30), PARAMS)


def test_void_is_refused() -> None:
    image, mask = square()
    mask[0, 0] = 255
    with pytest.raises(ValueError, match="label 255 is not below num_labels=2; void has no unary"):
        dense_crf(image, mask, PARAMS, num_labels=2)


def test_choosing_among_present_labels_equals_a_call_with_these_alone() -> None:
    image, mask = square()
    labels = noisy(mask) * 7  # labels 0 and 7 of 21
    present = CrfConfig(labels="present")
    refined = dense_crf(image, labels, present, num_labels=21)
    assert torch.equal(refined, dense_crf(image, labels // 7, CrfConfig(), num_labels=2) * 7)
    everywhere = torch.full_like(labels, 0)
    assert torch.equal(dense_crf(image, everywhere, present, num_labels=21), everywhere)

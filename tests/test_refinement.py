"""Refinement: both back-ends of the dense CRF, what they are for, and pixel-adaptive refinement.

Everything but the comparisons with pydensecrf runs, and passes, where that is not installed.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator

import pytest
import torch
from helpers import generator
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from smaflib.config import CRF_PRESETS, CrfConfig, ParConfig
from smaflib.errors import ConfigError
from smaflib.refinement import choose_backend, crf, dense_crf, parallel, pixel_adaptive_refinement, refine, refine_many
from smaflib.refinement.par import affinity
from smaflib.refinement.unary import hard_unary, soft_unary

needs_pydensecrf = pytest.mark.skipif(not crf.HAS_PYDENSECRF, reason="pydensecrf is not installed")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA GPU here")
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


@needs_pydensecrf
@settings(max_examples=15, deadline=None)
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
    hard = labels == torch.arange(num_labels)[:, None, None]
    unary = -torch.where(hard, gt_prob, (1 - gt_prob) / (num_labels - 1)).log()
    scores = torch.zeros(num_labels, *size)
    scores[chosen.long()] = torch.rand(len(chosen), *size, generator=generator(seed))

    def unmerged(energies: Tensor) -> Tensor:
        return crf.pydensecrf_mean_field(image, energies, torch.ones(num_labels), params).argmax(dim=0).to(torch.uint8)

    assert torch.equal(dense_crf(image, scores, params), unmerged(-scores.clamp(min=1e-5).log()))
    assert torch.equal(dense_crf(image, labels, params, num_labels), unmerged(unary))
    merged = hard_unary(labels, num_labels, params)
    assert len(merged.labels) <= num_present + 1 and int(merged.counts.sum()) == num_labels


def test_what_does_not_fit_is_refused() -> None:
    image, mask = square()
    with pytest.raises(ValueError, match="label 255 is not below num_labels=2; void has no unary"):
        dense_crf(image, mask.masked_fill(mask == 1, 255), PARAMS, num_labels=2)
    for bad, num in ((-0.1, 2), (float("nan"), 2), (float("inf"), 2), (0.5, 256)):
        with pytest.raises(ValueError, match="needs finite scores of 0 or more, of 255 labels at most"):
            dense_crf(image, torch.full((num, 24, 30), bad), PARAMS)
    with pytest.raises(ValueError, match="label 300 is not below"):  # would be 44 in a mask
        dense_crf(image, mask.long() * 300, PARAMS, num_labels=301)
    with pytest.raises(ValueError, match="NaN"):
        refine(image, torch.full((2, 24, 30), float("nan")), ParConfig(iterations=1), 2)
    with pytest.raises(ValueError, match=r"of the size of \(24, 29\), got torch.uint8 \(3, 24, 30\)"):
        dense_crf(image, mask[:, :-1], PARAMS, num_labels=2)
    with pytest.raises(ValueError, match="needs a uint8 image .* got torch.float32"):
        dense_crf(image.float(), mask, PARAMS, num_labels=2)
    with pytest.raises(ValueError, match="label 1 is not below num_labels=None"):
        dense_crf(image, mask, PARAMS)


def test_choosing_among_present_labels_equals_a_call_with_these_alone() -> None:
    image, mask = square()
    labels = noisy(mask) * 7  # labels 0 and 7 of 21
    present = CrfConfig(labels="present")
    refined = dense_crf(image, labels, present, num_labels=21)
    assert torch.equal(refined, dense_crf(image, labels // 7, CrfConfig(), num_labels=2) * 7)
    everywhere = torch.full_like(labels, 0)
    assert torch.equal(dense_crf(image, everywhere, present, num_labels=21), everywhere)


# --- the back-ends ------------------------------------------------------------------------------------------------

PICTURES = ("noise", "constant", "black and white", "gradient")


def drawn_image(kind: str, size: tuple[int, int], seed: int) -> Tensor:
    if kind == "constant":
        return torch.full((3, *size), seed % 256, dtype=torch.uint8)
    noise = torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=generator(seed))
    if kind == "black and white":
        return (noise > 128).to(torch.uint8) * 255
    if kind == "gradient":
        return (torch.linspace(0, 200, size[1]).expand(3, *size) + noise % 8).to(torch.uint8)
    return noise


@needs_pydensecrf
@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from(PICTURES),
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    num_labels=st.sampled_from([2, 3, 21, 81]),
    params=st.sampled_from(
        [*(CrfConfig.model_validate(name) for name in CRF_PRESETS)]
        + [CrfConfig(bilateral_srgb=0.5), CrfConfig(gaussian_sxy=0.1, bilateral_sxy=1000), CrfConfig(gt_prob=0.3)]
    ),
    soft=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_torch_gives_the_masks_of_pydensecrf(
    kind: str, size: tuple[int, int], num_labels: int, params: CrfConfig, soft: bool, seed: int
) -> None:
    image = drawn_image(kind, size, seed)
    if soft:
        given = torch.randn(num_labels, *size, generator=generator(seed)).softmax(dim=0)
    else:
        given = torch.randint(0, num_labels, size, generator=generator(seed), dtype=torch.uint8)
    ours = dense_crf(image, given, params, num_labels, "torch")
    theirs = dense_crf(image, given, params, num_labels, "pydensecrf")
    # Up to 1600 pixels: one may differ where two labels are equally probable but for the last bits of a sum.
    assert int((ours != theirs).sum()) <= (1 if ours.numel() > 200 else 0)


def test_auto_takes_torch_on_a_gpu_and_pydensecrf_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr(crf, "HAS_PYDENSECRF", True)
    assert choose_backend("auto", cpu) == ("pydensecrf", cpu) and choose_backend("auto", gpu) == ("torch", gpu)
    assert choose_backend("torch", cpu) == ("torch", cpu) and choose_backend("pydensecrf", gpu) == ("pydensecrf", cpu)
    apple = torch.device("mps")
    assert choose_backend("auto", apple) == ("pydensecrf", cpu) and choose_backend("torch", apple) == ("torch", apple)
    monkeypatch.setattr(crf, "HAS_PYDENSECRF", False)
    assert choose_backend("auto", cpu) == choose_backend("auto", apple) == ("torch", cpu)
    with pytest.raises(ConfigError, match="pydensecrf is not installed: .* set backend=torch"):
        choose_backend("pydensecrf", cpu)
    monkeypatch.setitem(sys.modules, "pydensecrf", None)
    image, mask = square()
    assert torch.equal(dense_crf(image, noisy(mask), PARAMS, 2), mask)


@needs_gpu
def test_gpu_gives_the_masks_of_the_cpu() -> None:
    images = [drawn_image("gradient", (60, 80), seed) for seed in range(3)]
    labels = [torch.randint(0, 5, (60, 80), generator=generator(s), dtype=torch.uint8) for s in range(3)]
    on_gpu = list(refine_many(zip(images, labels, strict=True), PARAMS, 21, device=torch.device("cuda")))
    on_cpu = [dense_crf(image, label, PARAMS, 21, "torch") for image, label in zip(images, labels, strict=True)]
    different = sum(int((one != other).sum()) for one, other in zip(on_gpu, on_cpu, strict=True))
    assert different <= 1 and all(mask.device.type == "cpu" for mask in on_gpu)


# --- scores and presets -------------------------------------------------------------------------------------------


def test_soft_unary_by_hand() -> None:
    # Labels 0 and 3 of four have scores; 1 and 2 have none and share a channel.
    scores = torch.tensor([0.2, 0.0, 0.0, 0.5])[:, None, None] * torch.tensor([[1.0, 0.5]])
    unary = soft_unary(scores, CrfConfig(sharpness=2))
    assert unary.labels.tolist() == [0, 1, 3] and unary.counts.tolist() == [1, 2, 1]
    expected = torch.tensor([[0.2**2, 0.1**2], [2 * 1e-5**2, 2 * 1e-5**2], [0.5**2, 0.25**2]])
    torch.testing.assert_close((-unary.energies).exp()[:, 0], expected)
    present = soft_unary(scores, CrfConfig(labels="present"))
    assert present.labels.tolist() == [0, 3]


# --- pixel-adaptive refinement ------------------------------------------------------------------------------------


def test_par_does_not_cross_an_edge() -> None:
    image, mask = square()
    scores = torch.stack([1 - mask.float(), mask.float()])
    blurred = torch.nn.functional.avg_pool2d(scores[None], 5, stride=1, padding=2, count_include_pad=False)[0]
    refined = pixel_adaptive_refinement(image, blurred, ParConfig(dilations=(1, 2, 4)))
    assert torch.equal(refined.argmax(dim=0).to(torch.uint8), mask)
    # The step at the border is steeper than in what came in, and it is still a mean of that.
    assert float(refined[1, 12, 8] - refined[1, 12, 7]) > 2.5 * float(blurred[1, 12, 8] - blurred[1, 12, 7])
    assert float(refined.min()) >= 0 and float(refined.max()) <= 1
    torch.testing.assert_close(refined.sum(dim=0), torch.ones(24, 30))


def test_par_affinity_by_hand() -> None:
    # One row, one ring of distance 1; rows above and below repeat it. Seen from the middle of 0, 0, 90:
    # three neighbours are 90 steps off, five are equal to it.
    image = torch.tensor([[[0, 0, 90]]], dtype=torch.uint8).expand(3, 1, 3)
    params = ParConfig(dilations=(1,), position_weight=0)
    weights = affinity(image, params)[:, 0, 1]
    deviation = torch.tensor([0.0, 0, 90, 0, 90, 0, 0, 90]).std()
    unlike = math.exp(-((90 / float(deviation) / 0.3) ** 2))
    expected = torch.tensor([1, 1, unlike, 1, unlike, 1, 1, unlike]) / (5 + 3 * unlike)
    torch.testing.assert_close(weights, expected)
    with_position = affinity(image, ParConfig(dilations=(1,), position_weight=0.5))
    torch.testing.assert_close(with_position.sum(dim=0), torch.ones(1, 3))
    flat, scores = torch.full((3, 5, 6), 7, dtype=torch.uint8), torch.full((2, 5, 6), 0.25)
    torch.testing.assert_close(pixel_adaptive_refinement(flat, scores, ParConfig()), scores)


# --- many images --------------------------------------------------------------------------------------------------


def many_jobs(num: int, soft: bool = False) -> Iterator[tuple[Tensor, Tensor]]:
    for index in range(num):
        image = drawn_image("gradient", (20, 24), index)
        labels = torch.randint(0, 3, (20, 24), generator=generator(index), dtype=torch.uint8)
        scores = (
            torch.zeros(9, 20, 24).scatter_(0, labels.long()[None], 0.6) + (torch.arange(9) < 3)[:, None, None] * 0.2
        )
        yield image, scores if soft else labels


def darken(image: Tensor, scores: Tensor) -> Tensor:
    """A custom refinement: the last label where the image is dark."""
    assert scores.shape == (9, 20, 24) and scores.dtype == torch.float32
    return scores * torch.where(image[0] < 100, torch.arange(9.0)[:, None, None] == 2, 1)


DARKEN = f"{__name__}:darken"


@pytest.mark.parametrize("params", [PARAMS, CrfConfig.model_validate("irn"), ParConfig(dilations=(1, 2)), DARKEN])
def test_processes_give_what_one_gives(params: CrfConfig | ParConfig | str) -> None:
    soft = not isinstance(params, CrfConfig)
    alone = list(refine_many(many_jobs(9, soft), params, 9))
    together = list(refine_many(many_jobs(9, soft), params, 9, num_workers=2))
    assert all(torch.equal(one, other) for one, other in zip(alone, together, strict=True))
    assert len({mask.numpy().tobytes() for mask in alone}) == 9
    if isinstance(params, str):
        image, scores = next(many_jobs(1, soft))
        assert torch.equal(alone[0], darken(image, scores).argmax(dim=0).to(torch.uint8))


def end_process(image: Tensor, scores: Tensor) -> Tensor:
    """What lack of memory does to a worker process."""
    os._exit(1)


def test_a_killed_worker_is_an_error() -> None:
    killing = f"{__name__}:end_process"
    with pytest.raises(RuntimeError, match="terminated abruptly"):
        list(refine_many(many_jobs(9, soft=True), killing, 9, num_workers=2))


def test_jobs_are_taken_as_there_is_room() -> None:
    taken = []

    def jobs() -> Iterator[tuple[Tensor, Tensor]]:
        for index, job in enumerate(many_jobs(60)):
            taken.append(index)
            yield job

    masks = refine_many(jobs(), PARAMS, 3, num_workers=2)
    next(masks)
    masks.close()  # type: ignore[attr-defined]
    assert len(taken) <= max(2 * parallel.IMAGES_PER_PROCESS, parallel.FEW_IMAGES) + 1

"""The background threshold chosen without ground truth."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from smaflib.reactivation import hard_labels
from smaflib.thresholds import CANDIDATES, MAX_IMAGES, agreement, choose_bg_score, separation


def two_levels(low: float, high: float, share: float = 0.3) -> torch.Tensor:
    """A class map (1, 10, 10) of two scores."""
    maps = torch.full((1, 100), low)
    maps[:, : int(100 * share)] = high
    return maps.view(1, 10, 10)


def test_separation_by_hand() -> None:
    # Scores 0.2 (70 pixels) and 0.6 (30): a threshold between them explains all variance, one outside nothing.
    values = dict(zip(CANDIDATES, separation(two_levels(0.2, 0.6)).tolist(), strict=True))
    assert values[0.15] == values[0.65] == 0
    assert values[0.25] == values[0.55] == pytest.approx(1)
    # 0.1, 0.3, 0.7, one pixel each: variance 0.56/9. Above 0.5 is one pixel, the gap 0.7 - 0.2; above 0.2 are two,
    # the gap 0.5 - 0.1.
    values = dict(zip(CANDIDATES, separation(torch.tensor([0.1, 0.3, 0.7]).view(1, 1, 3)).tolist(), strict=True))
    assert values[0.5] == pytest.approx(2 / 9 * 0.25 / (0.56 / 9), rel=1e-5)
    assert values[0.2] == pytest.approx(2 / 9 * 0.16 / (0.56 / 9), rel=1e-5)


@given(low=st.sampled_from(CANDIDATES[:-4]), gap=st.sampled_from([0.2, 0.3]))
def test_choice_lies_between_the_groups(low: float, gap: float) -> None:
    chosen = choose_bg_score([two_levels(low - 0.02, low + gap), torch.zeros(1, 3, 3)])
    assert low - 0.02 <= chosen < low + gap


def test_saliency_maps_decide_where_there_are_some() -> None:
    soft = torch.linspace(0, 1, 100).view(1, 10, 10)
    for share in (0.3, 0.6, 0.8):
        salient = (soft[0] > 1 - share).float()
        assert choose_bg_score([soft, soft], [salient, salient]) == pytest.approx(1 - share)
    nothing = torch.zeros(10, 10)
    assert choose_bg_score([soft, soft * 0], [(soft[0] > 0.4).float(), nothing]) == pytest.approx(0.4)  # one is empty
    assert choose_bg_score([soft], [nothing]) in CANDIDATES


@given(st.integers(0, 1000))
def test_agreement_is_that_of_masks(seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    maps, saliency = torch.rand(3, 6, 7, generator=random), torch.rand(6, 7, generator=random)
    both, either = agreement(maps, saliency)
    for index, score in enumerate(CANDIDATES):
        mask, salient = hard_labels(maps, score) > 0, saliency > 0.5
        assert both[index] == (mask & salient).sum() and either[index] == (mask | salient).sum()


def test_large_splits_are_read_evenly() -> None:
    class Noted(list[torch.Tensor]):
        asked: list[int] = []

        def __getitem__(self, index: int) -> torch.Tensor:  # type: ignore[override]
            self.asked.append(index)
            return super().__getitem__(index)

    items = Noted([two_levels(0.2, 0.6)] * (2 * MAX_IMAGES + 1))
    choose_bg_score(items)
    assert items.asked == list(range(0, 2 * MAX_IMAGES + 1, 3))

"""Confidence in a mask, from quantities without ground truth, by hand."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from smaflib.apps.confidence import Signs, judge, signs

unit = st.floats(0, 1)


def test_signs_worked_out_by_hand():
    maps = torch.tensor([[[0.9, 0.6, 0.4, 0.1]], [[0.0, 0.0, 0.0, 0.8]]])
    # At 0.5: 1 1 0 2. At 0.35: 1 1 1 2; at 0.65: 1 0 0 2.
    small = torch.tensor([[[0.9, 0.9, 0.9, 0.1]], [[0.0, 0.0, 0.0, 0.8]]])  # 1 1 1 2
    large = torch.tensor([[[0.9, 0.2, 0.1, 0.1]], [[0.0, 0.0, 0.0, 0.2]]])  # 1 0 0 0
    mask = torch.tensor([[3, 3, 3, 0]], dtype=torch.uint8)  # the CRF has grown the first and erased the second
    first, second = signs(maps, [small, large], 0.5, mask, [3, 7], [2.5, 0.5])
    assert first == pytest.approx(Signs(share=3 / 4, scales=(2 / 3 + 1 / 2) / 2, threshold=1 / 3, crf=2 / 3, peak=2.5))
    assert second == pytest.approx(Signs(share=0, scales=(1 + 0) / 2, threshold=1, crf=0, peak=0.5))


def test_photo_without_a_class_has_no_signs():
    assert signs(torch.zeros(0, 2, 2), [torch.zeros(0, 2, 2)], 0.5, torch.zeros(2, 2, dtype=torch.uint8), [], []) == []


def test_words():
    assert judge("dog", Signs(0, 1, 1, 1, 3), 1) == (0.0, "'dog' has no pixel")
    assert judge("dog", Signs(1, 0.75, 0.9, 0.9, 3), 1) == (0.75, "covers 100 % of the photo")
    doubts = (
        "covers less than 0.5 % of the photo; the scales disagree; the class is hardly recognised; "
        "changes with the threshold; the CRF changes much"
    )
    assert judge("dog", Signs(0.002, 0.125, 0.1, 0.1, 1), 3) == (pytest.approx(1 / 6), doubts)
    assert judge("dog", Signs(0.2, 1, 1, 1, 1), 1) == (pytest.approx(5 / 6), "")


@given(st.builds(Signs, unit, unit, unit, unit, st.floats(0, 1e6)), st.floats(1e-6, 1e6))
def test_confidence_is_in_the_unit_interval(sign, usual_peak):
    assert 0 <= judge("dog", sign, usual_peak)[0] <= 1

"""How far to trust a mask, from quantities that need no ground truth; ``benchmarks/confidence.py`` validates them."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean
from typing import NamedTuple

from torch import Tensor

from smaflib.reactivation import hard_labels

STEP = 0.3  # how far the background threshold is moved, as a share of it


class Signs(NamedTuple):
    """What tells how good the mask of a class in a photo is; all but the last in [0, 1]."""

    share: float  # of the photo
    scales: float  # mean IoU of a single scale's mask with that of all, before the CRF
    threshold: float  # IoU of the masks at a lower and a higher background threshold, before the CRF
    crf: float  # IoU of the mask before and after the CRF
    peak: float  # the highest attention of the teacher, summed over the scales, not normalised


def signs(
    maps: Tensor,
    scales: Sequence[Tensor],
    bg_score: float,
    mask: Tensor,
    values: Sequence[int],
    peaks: Sequence[float],
) -> list[Signs]:
    """Signs of the P classes that a photo shows.

    Args:
        maps: (P, H, W) in [0, 1], fused.
        scales: the same of each single scale.
        bg_score: background threshold of the mask.
        mask: uint8 (H, W), after the CRF.
        values: of the P classes in the mask.
        peaks: of the P classes.
    """
    if not values:
        return []
    before, low, high = (hard_labels(maps, bg_score * factor) for factor in (1, 1 - STEP, 1 + STEP))
    single = [hard_labels(each, bg_score) for each in scales]
    return [
        Signs(
            float((mask == value).float().mean()),
            mean(iou(each == number, before == number) for each in single),
            iou(low == number, high == number),
            iou(mask == value, before == number),
            peak,
        )
        for number, (value, peak) in enumerate(zip(values, peaks, strict=True), start=1)
    ]


def iou(one: Tensor, other: Tensor) -> float:
    """Of two masks, bool (H, W); 0 if both are empty."""
    return int((one & other).sum()) / max(1, int((one | other).sum()))


def judge(name: str, sign: Signs, usual_peak: float) -> tuple[float, str]:
    """Confidence in the mask of a class, in [0, 1], and in plain words what to check, which may be nothing.

    The confidence is the mean of two numbers: the agreement of the scales, which counts twice, and the peak p beside
    the usual one m of this folder, p / (p + m). Of what was tried on the ``choose`` folds of the benchmark, it ranked
    masks best.
    """
    if not sign.share:
        return 0.0, f"'{name}' has no pixel"
    strength = sign.peak / (sign.peak + usual_peak)
    doubts = {
        f"covers {100 * sign.share:.0f} % of the photo": sign.share > 0.7,
        "covers less than 0.5 % of the photo": sign.share < 0.005,
        "the scales disagree": sign.scales < 0.5,
        "the class is hardly recognised": strength < 0.35,
        "changes with the threshold": sign.threshold < 0.25,
        "the CRF changes much": sign.crf < 0.6,
    }
    return (2 * sign.scales + strength) / 3, "; ".join(words for words, holds in doubts.items() if holds)

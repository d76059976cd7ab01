"""Choose the background score without any ground truth.

The field tunes it on masks. That is a leak: with image labels alone it cannot be done. Here the attention maps alone
decide, by Otsu's criterion. ``benchmarks/bg_score.py`` compares it with other criteria, and all of them with the oracle
threshold, the score that is best on the ground truth.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

CANDIDATES: tuple[float, ...] = tuple(round(0.05 * step, 2) for step in range(2, 15))
"""Background scores among which the choice is made: 0.1 to 0.7."""


MAX_IMAGES = 1000
"""As many images are read, evenly over the split; the choice does not move with more."""


def choose_bg_score(denoised: Sequence[Tensor]) -> float:
    """The background score that separates foreground from background best, mean over the images.

    Args:
        denoised: per image (K, H, W) in [0, 1], fused and denoised; at least one; may be lazy. At most
            :data:`MAX_IMAGES` are read, evenly over the split.

    Returns:
        One of :data:`CANDIDATES`.

    Raises:
        ValueError: if there is no image.
    """
    if not len(denoised):
        raise ValueError("a background score can only be chosen from at least one image")
    values = [separation(denoised[index]) for index in range(0, len(denoised), -(-len(denoised) // MAX_IMAGES))]
    means = torch.tensor(values, dtype=torch.float64).mean(dim=0)
    return CANDIDATES[int(means.argmax())]


def separation(denoised: Tensor) -> list[float]:
    """How well each candidate separates the scores of an image's pixels into two groups.

    Args:
        denoised: (K, H, W) in [0, 1].

    Returns:
        Per candidate, in [0, 1]: the variance between the pixels above and those not above it, as a share of all
        variance of the strongest class's scores; 0 where one of the groups is empty.

    Source: Otsu, "A threshold selection method from gray-level histograms", 1979.
    """
    scores = denoised.amax(dim=0).flatten().double()
    variance = float(scores.var(correction=0))
    values = []
    for threshold in CANDIDATES:
        above = scores > threshold
        share = float(above.double().mean())
        if variance == 0 or share in (0, 1):
            values.append(0.0)
            continue
        gap = float(scores[above].mean() - scores[~above].mean())
        values.append(share * (1 - share) * gap**2 / variance)
    return values

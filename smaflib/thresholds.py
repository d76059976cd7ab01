"""Choose the background score without any ground truth.

The field tunes it on masks. That is a leak: with image labels alone it cannot be done. Here saliency maps decide where
the teacher has learned from them, else the attention maps alone, by Otsu's criterion. ``benchmarks/bg_score.py``
compares both with other criteria, and all with the oracle threshold, the score that is best on the ground truth.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

CANDIDATES: tuple[float, ...] = tuple(round(0.05 * step, 2) for step in range(2, 15))
"""Background scores among which the choice is made: 0.1 to 0.7."""


MAX_IMAGES = 1000
"""As many images are read, evenly over the split; the choice does not move with more."""


def choose_bg_score(denoised: Sequence[Tensor], saliency: Sequence[Tensor] | None = None) -> float:
    """The background score whose foreground agrees best with the saliency maps, or without them separates best.

    Args:
        denoised: per image (K, H, W) in [0, 1], fused and denoised; at least one; may be lazy. At most
            :data:`MAX_IMAGES` are read, evenly over the split.
        saliency: per image (H, W) in [0, 1]; may be lazy. Agreement is :func:`agreement`, over all pixels together;
            separation is :func:`separation`, the mean over the images.

    Returns:
        One of :data:`CANDIDATES`.

    Raises:
        ValueError: if there is no image.

    Example:
        >>> maps = torch.tensor([[[0.75, 0.25]]])
        >>> 0.25 <= choose_bg_score([maps], saliency=[torch.tensor([[1.0, 0.0]])]) < 0.75
        True
    """
    if not len(denoised):
        raise ValueError("a background score can only be chosen from at least one image")
    chosen = range(0, len(denoised), -(-len(denoised) // MAX_IMAGES))
    if saliency is None:
        values = torch.tensor([separation(denoised[index]) for index in chosen], dtype=torch.float64).mean(dim=0)
    else:
        both, either = torch.stack([agreement(denoised[index], saliency[index]) for index in chosen]).sum(dim=0)
        values = both / either.clamp(min=1)
    return CANDIDATES[int(values.argmax())]


def agreement(denoised: Tensor, saliency: Tensor) -> Tensor:
    """How well the foreground of each candidate covers the salient pixels.

    Args:
        denoised: (K, H, W) in [0, 1].
        saliency: (H, W) in [0, 1]; above 0.5 a pixel is salient.

    Returns:
        float64 (2, candidates): pixels that are both, and pixels that are either; their ratio is the IoU.
    """
    rising = torch.tensor(CANDIDATES)
    exceeded = torch.searchsorted(rising, denoised.amax(dim=0).contiguous())  # how many are strictly below the score
    salient = saliency > 0.5
    above = [exceeded[salient], exceeded[~salient]]  # a pixel is foreground of the first so many candidates
    hits, alarms = (torch.bincount(part, minlength=len(rising) + 1).flip(0).cumsum(0).flip(0)[1:] for part in above)
    return torch.stack([hits, salient.sum() + alarms]).double()


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

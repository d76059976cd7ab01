"""Choose the background threshold (``bg_score``) without ground truth.

Tuning it on masks, as is common, uses pixel labels. Here saliency maps decide if the teacher learned from them, else
Otsu's criterion on the attention maps. ``benchmarks/bg_score.py`` compares both with other criteria and the oracle, the
best threshold on the ground truth.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

CANDIDATES: tuple[float, ...] = tuple(round(0.05 * step, 2) for step in range(2, 15))
"""0.1 to 0.7."""

MAX_IMAGES = 1000
"""Images used, evenly spaced over the split; more do not change the choice."""


def choose_bg_score(denoised: Sequence[Tensor], saliency: Sequence[Tensor] | None = None) -> float:
    """The threshold with the best :func:`agreement` with saliency maps or, without any, the best :func:`separation`.

    Args:
        denoised: per image (K, H, W) in [0, 1], fused and denoised; may be lazy.
        saliency: per image (H, W) in [0, 1]; may be lazy. Agreement is counted over all pixels, separation is the mean
            over the images.

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
        raise ValueError("a background threshold can only be chosen from at least one image")
    chosen = range(0, len(denoised), -(-len(denoised) // MAX_IMAGES))
    if saliency is None:
        values = torch.tensor([separation(denoised[index]) for index in chosen], dtype=torch.float64).mean(dim=0)
    else:
        both, either = torch.stack([agreement(denoised[index], saliency[index]) for index in chosen]).sum(dim=0)
        values = both / either.clamp(min=1)
    return CANDIDATES[int(values.argmax())]


def agreement(denoised: Tensor, saliency: Tensor) -> Tensor:
    """Overlap of the foreground at each candidate with the salient pixels.

    Args:
        denoised: (K, H, W) in [0, 1].
        saliency: (H, W) in [0, 1]; above 0.5 a pixel is salient.

    Returns:
        float64 (2, candidates): intersection and union in pixels.
    """
    rising = torch.tensor(CANDIDATES)
    exceeded = torch.searchsorted(rising, denoised.amax(dim=0).contiguous())  # number of candidates below the score
    salient = saliency > 0.5
    above = [exceeded[salient], exceeded[~salient]]  # a pixel is foreground at the first so many candidates
    hits, alarms = (torch.bincount(part, minlength=len(rising) + 1).flip(0).cumsum(0).flip(0)[1:] for part in above)
    return torch.stack([hits, salient.sum() + alarms]).double()


def separation(denoised: Tensor) -> list[float]:
    """Otsu's criterion for the pixel scores of one image.

    Args:
        denoised: (K, H, W) in [0, 1].

    Returns:
        Per candidate the between-class variance of the best scores as a share of their variance, in [0, 1]; 0 if all
        pixels are on one side.

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

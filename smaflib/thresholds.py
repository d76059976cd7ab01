"""Choose the background threshold (``bg_score``) without ground truth.

Tuning it on masks, as is common, uses pixel labels. Here saliency maps decide if the teacher learned from them, else
Otsu's criterion on the attention maps. ``benchmarks/bg_score.py`` compares both with other criteria and the oracle, the
best threshold on the ground truth.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

CANDIDATES: tuple[float, ...] = tuple(round(0.05 * step, 2) for step in range(2, 15))  #: 0.1 to 0.7.

MAX_IMAGES = 1000  # that are used, evenly spaced over the split; more do not change the choice


def choose_bg_score(denoised: Sequence[Tensor], saliency: Sequence[Tensor] | None = None) -> float:
    """The one of :data:`CANDIDATES` with the best :func:`agreement` with saliency maps, or the best :func:`separation`.

    Args:
        denoised: per image (K, H, W) in [0, 1], fused and denoised; may be lazy.
        saliency: per image (H, W) in [0, 1]; may be lazy. Agreement is counted over all pixels, separation is the mean
            over the images.

    Example:
        >>> maps = torch.tensor([[[0.75, 0.25]]])
        >>> 0.25 <= choose_bg_score([maps], saliency=[torch.tensor([[1.0, 0.0]])]) < 0.75
        True
    """
    chosen = range(0, len(denoised), -(-len(denoised) // MAX_IMAGES))
    if saliency is None:
        values = torch.stack([separation(denoised[index]) for index in chosen]).mean(dim=0)
    else:
        both, either = torch.stack([agreement(denoised[index], saliency[index]) for index in chosen]).sum(dim=0)
        values = both / either.clamp(min=1)
    return CANDIDATES[int(values.argmax())]


def agreement(denoised: Tensor, saliency: Tensor) -> Tensor:
    """Intersection and union, in pixels, of the foreground at each candidate with the salient pixels.

    From maps (K, H, W) and saliency (H, W), in [0, 1], above 0.5 salient, to float64 (2, candidates).
    """
    foreground = denoised.amax(dim=0) > torch.tensor(CANDIDATES)[:, None, None]  # (candidates, H, W)
    salient = saliency > 0.5
    return torch.stack([(foreground & salient).sum(dim=(1, 2)), (foreground | salient).sum(dim=(1, 2))]).double()


def separation(denoised: Tensor) -> Tensor:
    """Otsu's criterion for the pixel scores of one image: maps (K, H, W) in [0, 1] to float64 (candidates,).

    The between-class variance of the best scores as a share of their variance, in [0, 1]; 0 if all are on one side.

    Source: Otsu, "A threshold selection method from gray-level histograms", 1979.
    """
    scores = denoised.amax(dim=0).flatten().double()
    above = scores > torch.tensor(CANDIDATES, dtype=torch.float64)[:, None]
    share, mean_above = above.double().mean(dim=1), (above * scores).mean(dim=1)
    between = (mean_above - share * scores.mean()).square() / (share * (1 - share))
    return (between / scores.var(correction=0)).nan_to_num(nan=0, posinf=0)  # divided by 0 if all are on one side

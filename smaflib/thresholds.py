"""Choose the background score without any ground truth.

The field tunes it on masks, which is a leak: who has only image labels cannot. Here the attention maps alone decide, by
Otsu's criterion. ``benchmarks/bg_score.py`` compares it with others, and all of them with the best score at the oracle
threshold.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from smaflib.config import Config

CANDIDATES: tuple[float, ...] = tuple(round(0.05 * step, 2) for step in range(2, 15))
"""Background scores among which the choice is made: 0.1 to 0.7."""


MAX_IMAGES = 1000
"""As many images, evenly over the split, are looked at; the choice does not move with more."""


def resolve_bg_score(config: Config, denoised: Sequence[Tensor]) -> Config:
    """The same settings with a number for ``attention.bg_score``, chosen if it is ``auto``.

    Args:
        config: of the run.
        denoised: the teacher's maps, per image (K, H, W) in [0, 1], fused and denoised; may be lazy.
    """
    if config.attention.bg_score != "auto":
        return config
    chosen = choose_bg_score(evenly(denoised))
    return config.model_copy(update={"attention": config.attention.model_copy(update={"bg_score": chosen})})


def mask_bg_score(config: Config, denoised: Sequence[Tensor]) -> float:
    """The background score of the pseudo masks: what ``pseudo_masks.bg_score`` says, or else ``attention.bg_score``.

    Args:
        config: of the run.
        denoised: the student's maps, per image (K, H, W), from which ``auto`` chooses.
    """
    wanted = config.pseudo_masks.bg_score
    wanted = config.attention.bg_score if wanted is None else wanted
    return choose_bg_score(evenly(denoised)) if wanted == "auto" else wanted


def evenly(items: Sequence[Tensor]) -> Iterable[Tensor]:
    """At most :data:`MAX_IMAGES` of them, taken evenly."""
    return (items[index] for index in range(0, len(items), -(-len(items) // MAX_IMAGES)))


def choose_bg_score(denoised: Iterable[Tensor]) -> float:
    """The background score that separates foreground from background best, mean over the images.

    Args:
        denoised: per image (K, H, W) in [0, 1], fused and denoised; at least one.

    Returns:
        One of :data:`CANDIDATES`.

    Raises:
        ValueError: if there is no image.
    """
    values = [separation(maps) for maps in denoised]
    if not values:
        raise ValueError("a background score can only be chosen from at least one image")
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

"""Pixel-adaptive refinement: each pixel's scores become a mean of its neighbours', by likeness of colour.

A dense CRF lets every pixel hear every other. Here a pixel hears rings of eight neighbours only, again and again. That
keeps soft scores soft, needs no lattice, and is made of shifts and sums: cheap on a GPU.

Source: Ru, Zhan, Yu and Du, "Learning affinity from attention: end-to-end weakly supervised semantic segmentation with
transformers", CVPR 2022, section 3.3; constants of its published code.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from smaflib.config import ParConfig

SMALLEST_DEVIATION = 1e-8
"""Of a neighbourhood of one colour: no division by zero."""

DIRECTIONS = tuple((dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1) if (dy, dx) != (0, 0))
"""The eight neighbours, in reading order."""


def pixel_adaptive_refinement(image: Tensor, scores: Tensor, params: ParConfig) -> Tensor:
    """Smooth scores along likeness of colour.

    Args:
        image: uint8 (3, H, W), or (B, 3, H, W) for images of one size.
        scores: float (L, H, W), or (B, L, H, W).
        params: rings of neighbours, bandwidth, iterations.

    Returns:
        float32 of the shape of ``scores``: each value a weighted mean of the scores, so within their range.

    Raises:
        ValueError: if the sizes differ.

    Example:
        >>> image, scores = torch.zeros(3, 8, 8, dtype=torch.uint8), torch.zeros(1, 8, 8)
        >>> scores[0, 4, 4] = 1  # on one colour a lonely score is shared with the neighbours
        >>> params = ParConfig(iterations=1, dilations=(1,), position_weight=0)
        >>> pixel_adaptive_refinement(image, scores, params)[0, 4].round(decimals=3).tolist()
        [0.0, 0.0, 0.0, 0.125, 0.0, 0.125, 0.0, 0.0]
    """
    if (*image.shape[:-3], *image.shape[-2:]) != (*scores.shape[:-3], *scores.shape[-2:]) or scores.dim() not in (3, 4):
        raise ValueError(
            f"scores must be (L, H, W) of the image's size {tuple(image.shape[-2:])}, got {tuple(scores.shape)}; or "
            "(B, L, H, W) for images (B, 3, H, W)"
        )
    weights = affinity(image.to(scores.device), params).unsqueeze(-3)  # (P, 1, H, W) or (P, B, 1, H, W)
    refined = scores.float()
    for _ in range(params.iterations):
        refined = sum(
            (weights[index] * shifted for index, shifted in enumerate(_neighbors(refined, params.dilations))),
            start=torch.zeros_like(refined),
        )
    return refined


def affinity(image: Tensor, params: ParConfig) -> Tensor:
    """How much each pixel takes from each of its ``P = 8 * len(dilations)`` neighbours.

    Args:
        image: uint8 (3, H, W) or (B, 3, H, W).
        params: rings of neighbours and bandwidths.

    Returns:
        float32 (P, H, W) or (P, B, H, W), summing to 1 over the neighbours, ordered by ring, then as in
        :data:`DIRECTIONS`.
    """
    colors = image.float()
    around = torch.stack(list(_neighbors(colors, params.dilations)))  # (P, ..., 3, H, W)
    # The spread of the neighbourhood sets what counts as alike: in a flat sky a small step is already a border.
    deviation = around.std(dim=0)
    likeness = -((around - colors).abs() / (deviation + SMALLEST_DEVIATION) / params.bandwidth).square().mean(dim=-3)
    distance = torch.tensor(
        [ring * (dy**2 + dx**2) ** 0.5 for ring in params.dilations for dy, dx in DIRECTIONS], device=image.device
    )
    nearness = -(distance / (distance.std() + SMALLEST_DEVIATION) / params.bandwidth).square()
    by_position = torch.softmax(nearness, dim=0).view(-1, *[1] * (likeness.dim() - 1))
    weights = torch.softmax(likeness, dim=0) + params.position_weight * by_position
    return weights / (1 + params.position_weight)


def _neighbors(maps: Tensor, dilations: tuple[int, ...]) -> list[Tensor]:
    """Each neighbour's value at every pixel, outside the nearest pixel's: P times (..., C, H, W)."""
    height, width = maps.shape[-2:]
    found = []
    for ring in dilations:
        padded = functional.pad(maps, (ring,) * 4, mode="replicate")
        for dy, dx in DIRECTIONS:
            top, left = ring + dy * ring, ring + dx * ring
            found.append(padded[..., top : top + height, left : left + width])
    return found

"""Pixel-adaptive refinement: each pixel's scores become a mean of its neighbours' scores, weighted by colour.

In a dense CRF every pixel exchanges messages with every other. Here a pixel sees only rings of eight neighbours, but
many times. Soft scores stay soft, no lattice is needed, and the operations are shifts and sums: cheap on a GPU.

Source: Ru, Zhan, Yu and Du, "Learning affinity from attention: end-to-end weakly supervised semantic segmentation with
transformers", CVPR 2022, section 3.3; constants of its published code.
"""

import torch
from torch import Tensor
from torch.nn import functional

from smaflib.config import ParConfig

SMALLEST_DEVIATION = 1e-8  # avoids division by zero where a neighbourhood has one colour

DIRECTIONS = tuple((dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1) if (dy, dx) != (0, 0))
"""The eight neighbours, in reading order."""


def pixel_adaptive_refinement(image: Tensor, scores: Tensor, params: ParConfig) -> Tensor:
    """Smooth scores, float (L, H, W), within regions of similar colour of an image, uint8 (3, H, W).

    Each value, float32, becomes a weighted mean of the scores, so it is within their range.

    Example:
        >>> image, scores = torch.zeros(3, 8, 8, dtype=torch.uint8), torch.zeros(1, 8, 8)
        >>> scores[0, 4, 4] = 1  # in an image of one colour a single score is shared with its neighbours
        >>> params = ParConfig(iterations=1, dilations=(1,), position_weight=0)
        >>> pixel_adaptive_refinement(image, scores, params)[0, 4].round(decimals=3).tolist()
        [0.0, 0.0, 0.0, 0.125, 0.0, 0.125, 0.0, 0.0]
    """
    weights = affinity(image, params)
    present = scores.flatten(1).any(dim=1)  # other channels stay 0: most of COCO's 81
    refined = scores[present].float()
    for _ in range(params.iterations):
        total = torch.zeros_like(refined)
        for weight, shifted in zip(weights, _neighbors(refined, params.dilations), strict=True):
            total += weight * shifted
        refined = total
    whole = torch.zeros_like(scores, dtype=torch.float32)
    whole[present] = refined
    return whole


def affinity(image: Tensor, params: ParConfig) -> Tensor:
    """The weights of a pixel's P neighbours, by ring, then as in :data:`DIRECTIONS`: float32 (P, H, W), sums of 1."""
    colors = image.float()
    around = torch.stack(_neighbors(colors, params.dilations))  # (P, 3, H, W)
    # Similarity is relative to the neighbourhood's spread: in a flat sky a small step is already a border.
    deviation = around.std(dim=0) + SMALLEST_DEVIATION
    similarity = -((around - colors).abs() / deviation / params.bandwidth).square().mean(dim=1)
    distance = torch.tensor(
        [ring * (dy**2 + dx**2) ** 0.5 for ring in params.dilations for dy, dx in DIRECTIONS], device=image.device
    )
    proximity = -(distance / (distance.std() + SMALLEST_DEVIATION) / params.bandwidth).square()
    weights = similarity.softmax(dim=0) + params.position_weight * proximity.softmax(dim=0)[:, None, None]
    return weights / (1 + params.position_weight)


def _neighbors(maps: Tensor, dilations: tuple[int, ...]) -> list[Tensor]:
    """Each neighbour's value at every pixel, (C, H, W) per neighbour; outside the image the nearest pixel's value."""
    height, width = maps.shape[-2:]
    found = []
    for ring in dilations:
        padded = functional.pad(maps, (ring,) * 4, mode="replicate")
        for dy, dx in DIRECTIONS:
            top, left = ring + dy * ring, ring + dx * ring
            found.append(padded[:, top : top + height, left : left + width])
    return found

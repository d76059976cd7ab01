"""Pixel correlation: a class's score spreads to the parts of the image that look alike to the network.

The idea of SEAM's pixel correlation module (Wang et al., "Self-supervised Equivariant Attention Mechanism for Weakly
Supervised Semantic Segmentation", CVPR 2020), on features as they are: nothing is trained for it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def affinity(features: Sequence[Tensor], size: tuple[int, int], exponent: float) -> Tensor:
    """How alike any two cells of a grid are: (B, hw, hw), rows of sum 1, or 0 for a cell that is like none.

    Args:
        features: (B, C_i, h_i, w_i) each; brought to the grid, centred, and of equal weight.
        size: (h, w) of the grid.
        exponent: of the cosine of two cells, negative ones count as 0; a higher one spreads less.
    """
    parts = [F.interpolate(each.float(), size=size, mode="area") for each in features]
    centred = [each - each.mean(dim=(2, 3), keepdim=True) for each in parts]
    cells = F.normalize(torch.cat([F.normalize(each) for each in centred], dim=1)).flatten(2)  # (B, C, hw)
    similar = (cells.transpose(1, 2) @ cells).clamp(min=0) ** exponent
    return similar / similar.sum(dim=2, keepdim=True).clamp(min=1e-12)


def correlate(
    maps: Sequence[Tensor], size: tuple[int, int], features: Sequence[Tensor], exponent: float
) -> list[Tensor]:
    """Bring the maps of every scale to one grid of ``size`` (h, w) and spread them by :func:`affinity`.

    Per scale (B, K, h_s, w_s) to (B, K, h, w); non-negative maps stay so, no value exceeds the map's maximum.

    Example:
        >>> maps, looks = torch.tensor([[[[1.0, 0.0, 0.0, 0.0]]]]), torch.tensor([[[[5.0, 5.0, -5.0, -5.0]]]])
        >>> correlate([maps], (1, 4), [looks], exponent=3)[0].tolist()
        [[[[0.5, 0.5, 0.0, 0.0]]]]
    """
    weights = affinity(features, size, exponent)
    resized = [F.interpolate(each, size=size, mode="bilinear") for each in maps]
    return [(each.flatten(2) @ weights.transpose(1, 2)).view_as(each) for each in resized]

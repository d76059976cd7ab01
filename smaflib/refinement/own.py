"""Refinements of somebody's own, by the name in a config."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from smaflib.plugins import REFINEMENT, calling, checked_maps, load


class Refinement(Protocol):
    """A refinement of somebody's own. Worker processes call it, so it must be importable there by its name.

    Args:
        image: uint8 (3, H, W), the original colours.
        scores: float32 (K+1, H, W), in [0, 1], background first: the background's score, then the denoised maps.

    Returns:
        float (K+1, H, W), non-negative and finite; the strongest label of each pixel becomes the mask.
    """

    def __call__(self, image: Tensor, scores: Tensor, /) -> Tensor: ...


def own_refinement(image: Tensor, scores: Tensor, name: str) -> Tensor:
    """Refine scores by a :class:`Refinement`; arguments and result as there, the result as float32.

    Raises:
        PluginError: if there is none of that name, or it does not do what it must.
    """
    refine: Refinement = load(REFINEMENT, name)
    what = f"the refinement {name}"
    with calling(what), torch.no_grad():
        return checked_maps(what, refine(image, scores), tuple(scores.shape), "(K+1, H, W)")

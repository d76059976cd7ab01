"""Class-aware attention-based affinity, CAA (Lin et al., "CLIP is Also an Efficient Segmenter", CVPR 2023).

Attention between patches carries a class's score to similar patches, but only from a box around where the map is high.
"""

import torch
from scipy import ndimage
from torch import Tensor

AFFINITY_BLOCKS = 8  # the affinity is the mean attention of so many last blocks of a transformer
SINKHORN_STEPS = 3  # of dividing columns, then rows, by their sums


def transition(affinity: Tensor) -> Tensor:
    """Two steps of a symmetric random walk over patches: (hw, hw) to (hw, hw)."""
    for _ in range(SINKHORN_STEPS):
        affinity = affinity / affinity.sum(dim=0, keepdim=True)
        affinity = affinity / affinity.sum(dim=1, keepdim=True)
    walk = (affinity + affinity.T) / 2
    return walk @ walk


def boxes(cam: Tensor, threshold: float) -> Tensor:
    """Boxes around the parts of a map, (h, w) in [0, 1], above a share of its maximum, in steps of 1/255; bool (h, w).

    As in the original, a box ends one cell before the last row and column of the map.
    """
    levels = (255 * cam).to(torch.uint8).cpu()
    labels, _ = ndimage.label(levels.numpy() > int(threshold * int(levels.max())), structure=[[1] * 3] * 3)
    inside = torch.zeros(cam.shape, dtype=torch.bool)
    height, width = cam.shape
    for rows, columns in ndimage.find_objects(labels):
        inside[rows.start : min(rows.stop, height - 1), columns.start : min(columns.stop, width - 1)] = True
    return inside.to(cam.device)


def refine_by_affinity(maps: Tensor, affinity: Tensor, threshold: float = 0.4) -> Tensor:
    """Spread each class's map over patches that attend to each other: (K, h, w), non-negative, on a scale of its own.

    Args:
        maps: (K, h, w) in [0, 1]; a map of zeros stays zero.
        affinity: (hw, hw), non-negative: attention of each patch to each other.
        threshold: share of a map's maximum from which its boxes are made; 0.4 for VOC, 0.7 for COCO in the paper.

    Example:
        >>> maps = torch.tensor([[[0.0, 1.0, 0.0], [0.0, 0.0, 0.0]]])
        >>> refine_by_affinity(maps, torch.full((6, 6), 1 / 6)).round(decimals=3).tolist()
        [[[0.167, 0.167, 0.167], [0.167, 0.167, 0.167]]]
    """
    shown = maps.amax(dim=(1, 2)) > 0
    refined = torch.zeros_like(maps)
    if shown.any():
        spread = transition(affinity)
        for number in shown.nonzero()[:, 0].tolist():
            from_boxes = spread * boxes(maps[number], threshold).flatten()
            refined[number] = (from_boxes @ maps[number].flatten()).view(maps.shape[1:])
    return refined

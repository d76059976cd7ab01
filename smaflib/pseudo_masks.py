"""Stage 5: from fused maps to the masks that a segmentation network can learn from."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from smaflib.config import CrfConfig, PseudoMaskConfig
from smaflib.data.masks import save_mask
from smaflib.data.sample import Samples
from smaflib.processes import missing_files
from smaflib.reactivation import hard_labels, with_background_score
from smaflib.refinement import refine, refine_many
from smaflib.runtime import CPU, progress


def pseudo_mask(
    image: Tensor,
    denoised: Tensor,
    bg_score: float,
    config: PseudoMaskConfig = PseudoMaskConfig(),
) -> Tensor:
    """Label each pixel with its strongest class, or as background where no class exceeds ``bg_score``; then refine.

    Args:
        image: uint8 (3, H, W).
        denoised: (K, H, W) in [0, 1].
        bg_score: background threshold.
        config: the refinement; ``refine: none`` gives :func:`~smaflib.reactivation.hard_labels`.

    Returns:
        uint8 (H, W), 0 is background.

    Source: hard labels into the CRF, over all K+1 labels, as in the reference code.

    Example:
        >>> image, denoised = torch.zeros(3, 1, 2, dtype=torch.uint8), torch.tensor([[[0.5, 0.125]]])
        >>> pseudo_mask(image, denoised, 0.25, PseudoMaskConfig(refine="none")).tolist()
        [[1, 0]]
    """
    if config.refinement is None:
        mask = hard_labels(denoised, bg_score)
    else:
        unary = _unary(denoised, bg_score, config)
        mask = refine(image, unary, config.refinement, len(denoised) + 1, config.backend)
    return without_specks(mask, config.min_part)


def without_specks(mask: Tensor, min_part: float) -> Tensor:
    """Give connected parts smaller than a share of the image the label of the nearest pixel of a larger part.

    From uint8 (H, W) to the same. Not in the paper.

    Example:
        >>> without_specks(torch.tensor([[0, 0, 0, 1], [0, 2, 0, 1]], dtype=torch.uint8), min_part=0.2).tolist()
        [[0, 0, 0, 1], [0, 0, 0, 1]]
    """
    labels, small = mask.numpy(), np.zeros(mask.shape, dtype=bool)
    for label in np.unique(labels) if min_part else ():
        parts = ndimage.label(labels == label)[0]
        sizes = np.bincount(parts.ravel())
        small |= (parts > 0) & (sizes[parts] < min_part * labels.size)
    if not small.any() or small.all():
        return mask
    nearest = ndimage.distance_transform_edt(small, return_distances=False, return_indices=True)
    return torch.from_numpy(labels[tuple(nearest)])


def pseudo_masks(
    samples: Samples,
    denoised: Sequence[Tensor],
    bg_score: float | Sequence[float],
    config: PseudoMaskConfig = PseudoMaskConfig(),
    indices: Sequence[int] | None = None,
    *,
    device: torch.device = CPU,
    desc: str = "pseudo masks",
) -> Iterator[Tensor]:
    """:func:`pseudo_mask` of all samples or some, in order, on all cores or on the GPU; ``denoised`` may be lazy.

    ``bg_score`` is one threshold, or that of each sample.
    """
    indices = range(len(samples)) if indices is None else indices
    score_of = [bg_score] * len(samples) if isinstance(bg_score, float | int) else bg_score
    masks: Iterator[Tensor]
    if config.refinement is None:
        masks = (hard_labels(denoised[index], score_of[index]) for index in indices)
    else:
        jobs = ((samples[index].image, _unary(denoised[index], score_of[index], config)) for index in indices)
        num_labels, workers = len(samples.class_names) + 1, config.num_workers
        masks = refine_many(jobs, config.refinement, num_labels, workers, config.backend, device)
    yield from (without_specks(mask, config.min_part) for mask in progress(masks, len(indices), desc))


def write_pseudo_masks(
    samples: Samples,
    denoised: Sequence[Tensor],
    folder: Path,
    bg_score: float | Sequence[float],
    config: PseudoMaskConfig = PseudoMaskConfig(),
    *,
    device: torch.device = CPU,
) -> None:
    """Write :func:`pseudo_masks` as palette PNGs, ``<image_id>.png``; existing files are skipped.

    Several processes (:mod:`smaflib.processes`) share the images.
    """
    image_ids = samples.image_ids
    missing = missing_files(folder, image_ids)
    masks = pseudo_masks(samples, denoised, bg_score, config, missing, device=device)
    for index, mask in zip(missing, masks, strict=True):
        save_mask(folder / f"{image_ids[index]}.png", samples.at_full_size(index, mask))


def _unary(denoised: Tensor, bg_score: float, config: PseudoMaskConfig) -> Tensor:
    """What the refinement starts from: hard labels (H, W), or scores (K+1, H, W)."""
    if isinstance(config.refinement, CrfConfig) and config.refinement.unary == "labels":
        return hard_labels(denoised, bg_score)
    return with_background_score(denoised, bg_score)

"""Stage 5: from fused maps to the masks that a segmentation network can learn from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from smaflib.config import CrfConfig, PseudoMaskConfig
from smaflib.data.masks import save_mask
from smaflib.data.sample import Samples
from smaflib.plugins import of_image
from smaflib.processes import barrier, missing_files
from smaflib.reactivation import hard_labels, with_background_score
from smaflib.refinement import refine, refine_many
from smaflib.runtime import CPU, progress


def pseudo_mask(
    image: Tensor,
    denoised: Tensor,
    bg_score: float,
    config: PseudoMaskConfig = PseudoMaskConfig(),
    *,
    device: torch.device = CPU,
) -> Tensor:
    """Label each pixel with its strongest class, or as background where no class reaches ``bg_score``; then refine.

    Args:
        image: uint8 (3, H, W).
        denoised: (K, H, W) in [0, 1], fused and denoised.
        bg_score: the background's score.
        config: the refinement and its back-end; ``refine: none`` gives :func:`~smaflib.reactivation.hard_labels`.
        device: where torch refines.

    Returns:
        uint8 (H, W), 0 is background.

    Source: hard labels into the CRF, over all K+1 labels, as in the reference code.

    Example:
        >>> image, denoised = torch.zeros(3, 1, 2, dtype=torch.uint8), torch.tensor([[[0.5, 0.125]]])
        >>> pseudo_mask(image, denoised, 0.25, PseudoMaskConfig(refine="none")).tolist()
        [[1, 0]]
    """
    if config.refinement is None:
        return hard_labels(denoised, bg_score)
    unary = _unary(denoised, bg_score, config)
    return refine([image], [unary], config.refinement, len(denoised) + 1, config.backend, device)[0]


def pseudo_masks(
    samples: Samples,
    denoised: Sequence[Tensor],
    bg_score: float,
    config: PseudoMaskConfig = PseudoMaskConfig(),
    *,
    device: torch.device = CPU,
    desc: str = "",
) -> Iterator[Tensor]:
    """:func:`pseudo_mask` of a split, in its order, on all cores or on the GPU.

    Args:
        samples: the split.
        denoised: per sample (K, H, W) in [0, 1]; may be lazy.
        bg_score: the background's score.
        config: the refinement, its back-end and its processes.
        device: where torch refines.
        desc: name on the progress bar.

    Yields:
        uint8 (H, W) per sample.

    Raises:
        PluginError: if a refinement of somebody's own does not do what it must; the masks before are whole.
    """
    masks: Iterator[Tensor]
    if config.refinement is None:
        masks = (hard_labels(denoised[index], bg_score) for index in range(len(samples)))
    else:
        jobs = ((samples[index].image, _unary(denoised[index], bg_score, config)) for index in range(len(samples)))
        num_labels, workers = len(samples.class_names) + 1, config.num_workers
        masks = refine_many(jobs, config.refinement, num_labels, workers, config.backend, device)
    yield from progress(_naming_images(masks, samples.image_ids), total=len(samples), desc=desc)


def _naming_images(masks: Iterator[Tensor], image_ids: Sequence[str]) -> Iterator[Tensor]:
    """The masks; an error of somebody's own refinement says at which image."""
    for image_id in image_ids:
        with of_image(image_id):
            mask = next(masks)
        yield mask


def write_pseudo_masks(
    samples: Samples,
    denoised: Sequence[Tensor],
    folder: Path,
    bg_score: float,
    config: PseudoMaskConfig = PseudoMaskConfig(),
    *,
    device: torch.device = CPU,
) -> None:
    """Write a palette PNG per image, ``<image_id>.png``; images that have theirs already are skipped.

    Of several processes (:mod:`smaflib.processes`) each makes its part.

    Arguments as of :func:`pseudo_masks`.
    """
    names = [f"{image_id}.png" for image_id in samples.image_ids]
    missing = missing_files(folder, names)
    # torch's Subset is lazy, as the maps are: those of a data set do not fit into memory.
    some: Any = torch.utils.data.Subset(denoised, missing)  # type: ignore[arg-type]
    masks = pseudo_masks(samples.subset(missing), some, bg_score, config, device=device, desc="pseudo masks")
    for index, mask in zip(missing, masks, strict=True):
        save_mask(folder / names[index], mask)
    barrier()


def _unary(denoised: Tensor, bg_score: float, config: PseudoMaskConfig) -> Tensor:
    """What the refinement starts from: hard labels (H, W), or scores (K+1, H, W)."""
    if isinstance(config.refinement, CrfConfig) and config.refinement.unary == "labels":
        return hard_labels(denoised, bg_score)
    return with_background_score(denoised, bg_score)

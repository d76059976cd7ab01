"""Stage 5: from fused maps to the masks that a segmentation network can learn from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from smaflib.config import CrfBackend, CrfConfig, ParConfig, PseudoMaskConfig
from smaflib.data.masks import save_mask
from smaflib.data.sample import Samples
from smaflib.reactivation import hard_labels, with_background_score
from smaflib.refinement import refine, refine_many
from smaflib.refinement.parallel import CPU
from smaflib.runtime import num_cores, progress


def pseudo_mask(
    image: Tensor,
    denoised: Tensor,
    bg_score: float,
    refinement: CrfConfig | ParConfig | None,
    backend: CrfBackend = "auto",
    device: torch.device = CPU,
) -> Tensor:
    """Label each pixel with its strongest class, or as background where no class reaches ``bg_score``; then refine.

    Args:
        image: uint8 (3, H, W).
        denoised: (K, H, W) in [0, 1], fused and denoised.
        bg_score: the background's score.
        refinement: settings of the dense CRF or of pixel-adaptive refinement; None: neither.
        backend: of the dense CRF.
        device: where torch refines.

    Returns:
        uint8 (H, W), 0 is background.

    Source: hard labels into the CRF, over all K+1 labels, as in the reference code.
    """
    if refinement is None:
        return hard_labels(denoised, bg_score)
    return refine([image], [_wishes(denoised, bg_score, refinement)], refinement, len(denoised) + 1, backend, device)[0]


def _wishes(denoised: Tensor, bg_score: float, refinement: CrfConfig | ParConfig) -> Tensor:
    """What the refinement starts from: hard labels (H, W), or scores (K+1, H, W)."""
    if isinstance(refinement, CrfConfig) and refinement.unary == "labels":
        return hard_labels(denoised, bg_score)
    return with_background_score(denoised, bg_score)


def pseudo_masks(
    samples: Samples,
    denoised: Sequence[Tensor],
    bg_score: float,
    refinement: CrfConfig | ParConfig | None,
    num_workers: int = 1,
    desc: str = "",
    backend: CrfBackend = "auto",
    device: torch.device = CPU,
) -> Iterator[tuple[str, Tensor]]:
    """Masks of a split, in its order, as (image_id, uint8 (H, W)).

    Args:
        samples: the split.
        denoised: per sample (K, H, W).
        bg_score: the background's score.
        refinement: settings of the dense CRF or of pixel-adaptive refinement; None: neither.
        num_workers: processes on the CPU; 0: one per core.
        desc: name on the progress bar.
        backend: of the dense CRF.
        device: where torch refines.
    """
    masks: Iterator[Tensor]
    if refinement is None:
        masks = (hard_labels(denoised[index], bg_score) for index in range(len(samples)))
    else:
        jobs = ((samples[index].image, _wishes(denoised[index], bg_score, refinement)) for index in range(len(samples)))
        workers = (num_workers or num_cores()) if len(samples) >= 8 else 1
        masks = refine_many(jobs, refinement, len(samples.class_names) + 1, workers, backend, device)
    yield from zip(samples.image_ids, progress(masks, total=len(samples), desc=desc), strict=True)


def write_pseudo_masks(
    samples: Samples,
    denoised: Sequence[Tensor],
    folder: Path,
    bg_score: float,
    config: PseudoMaskConfig,
    device: torch.device = CPU,
) -> None:
    """Write a palette PNG per image; images that have theirs already are skipped.

    Args:
        samples: the split.
        denoised: per sample (K, H, W).
        folder: takes ``<image_id>.png``.
        bg_score: the background's score.
        config: refinement, its back-end and its processes.
        device: where torch refines.
    """
    missing = [i for i, image_id in enumerate(samples.image_ids) if not (folder / f"{image_id}.png").is_file()]
    chosen = _Chosen(denoised, missing)
    masks = pseudo_masks(
        samples.subset(missing),
        chosen,
        bg_score,
        config.refinement,
        config.num_workers,
        "pseudo masks",
        config.backend,
        device,
    )
    for image_id, mask in masks:
        save_mask(folder / f"{image_id}.png", mask)


class _Chosen(Sequence[Tensor]):
    """Some items of a lazy sequence, still lazy: the maps of a data set do not fit into memory."""

    def __init__(self, items: Sequence[Tensor], indices: Sequence[int]) -> None:
        self.items, self.indices = items, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Tensor:  # type: ignore[override]
        return self.items[self.indices[index]]

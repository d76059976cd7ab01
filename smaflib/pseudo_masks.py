"""Stage 5: from fused maps to the masks that a segmentation network can learn from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from torch import Tensor

from smaflib.config import CrfConfig, PseudoMaskConfig
from smaflib.data.masks import save_mask
from smaflib.data.sample import Samples
from smaflib.reactivation import hard_labels
from smaflib.refinement import dense_crf, dense_crf_many
from smaflib.runtime import num_cores, progress


def pseudo_mask(image: Tensor, clean: Tensor, bg_score: float, crf: CrfConfig | None) -> Tensor:
    """Label each pixel with its strongest class, or as background where no class reaches ``bg_score``; then refine.

    Args:
        image: uint8 (3, H, W).
        clean: (K, H, W) in [0, 1], fused and denoised.
        bg_score: the background's score.
        crf: the dense CRF's settings; None: no refinement.

    Returns:
        uint8 (H, W), 0 is background.

    Source: hard labels into the CRF, over all K+1 labels, as in the reference code.
    """
    labels = hard_labels(clean, bg_score)
    return labels if crf is None else dense_crf(image, labels, crf, num_labels=len(clean) + 1)


def pseudo_masks(
    samples: Samples,
    clean: Sequence[Tensor],
    bg_score: float,
    crf: CrfConfig | None,
    num_workers: int = 1,
    desc: str = "",
) -> Iterator[tuple[str, Tensor]]:
    """Masks of a split, in its order, as (image_id, uint8 (H, W)).

    Args:
        samples: the split.
        clean: per sample (K, H, W).
        bg_score: the background's score.
        crf: the dense CRF's settings; None: no refinement.
        num_workers: processes; 0: one per core.
        desc: name on the progress bar.
    """
    masks: Iterator[Tensor]
    if crf is None:
        masks = (hard_labels(clean[index], bg_score) for index in range(len(samples)))
    else:
        jobs = ((samples[index].image, hard_labels(clean[index], bg_score)) for index in range(len(samples)))
        workers = (num_workers or num_cores()) if len(samples) >= 8 else 1
        masks = dense_crf_many(jobs, crf, len(samples.class_names) + 1, workers)
    yield from zip(samples.image_ids, progress(masks, total=len(samples), desc=desc), strict=True)


def write_pseudo_masks(
    samples: Samples, clean: Sequence[Tensor], folder: Path, bg_score: float, config: PseudoMaskConfig
) -> None:
    """Write a palette PNG per image; images that have theirs already are skipped.

    Args:
        samples: the split.
        clean: per sample (K, H, W).
        folder: takes ``<image_id>.png``.
        bg_score: the background's score.
        config: refinement and its processes.
    """
    missing = [i for i, image_id in enumerate(samples.image_ids) if not (folder / f"{image_id}.png").is_file()]
    crf = config.crf if config.refine == "crf" else None
    rest = samples.subset(missing)
    for image_id, mask in pseudo_masks(
        rest, _Chosen(clean, missing), bg_score, crf, config.num_workers, "pseudo masks"
    ):
        save_mask(folder / f"{image_id}.png", mask)


class _Chosen(Sequence[Tensor]):
    """Some items of a lazy sequence, still lazy: the maps of a data set do not fit into memory."""

    def __init__(self, items: Sequence[Tensor], indices: Sequence[int]) -> None:
        self.items, self.indices = items, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Tensor:  # type: ignore[override]
        return self.items[self.indices[index]]

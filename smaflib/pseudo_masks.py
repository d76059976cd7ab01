"""Stage 5: from fused maps to the masks that a segmentation network can learn from."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from smaflib.config import CrfConfig, PseudoMaskConfig
from smaflib.data.masks import save_mask
from smaflib.data.sample import Samples
from smaflib.reactivation import with_background_score
from smaflib.refinement import dense_crf
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
    labels = with_background_score(clean, bg_score).argmax(dim=0).to(torch.uint8)
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
        num_workers: processes; 0: one per core. pydensecrf holds Python's lock, so threads would not help.
        desc: name on the progress bar.
    """
    jobs = ((samples[i].image, clean[i]) for i in range(len(samples)))
    workers = num_workers or num_cores()
    if crf is None or workers == 1 or len(samples) < 8:
        masks: Iterator[Tensor] = (pseudo_mask(*job, bg_score, crf) for job in jobs)
        yield from zip(samples.image_ids, progress(masks, total=len(samples), desc=desc), strict=True)
        return
    # forkserver: forking a process whose torch threads are running can deadlock.
    context = multiprocessing.get_context(
        "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    )
    with ProcessPoolExecutor(workers, mp_context=context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        # Arrays travel through the pipe by value; tensors would each need a file handle and room in /dev/shm.
        arrays = ((image.numpy(), maps.numpy(), bg_score, crf) for image, maps in jobs)
        masks = _in_order(pool, arrays, ahead=4 * workers)
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


def _in_order(pool: ProcessPoolExecutor, jobs: Iterator[tuple], ahead: int) -> Iterator[Tensor]:  # type: ignore[type-arg]
    """Results in the jobs' order, with a bounded number of jobs under way: a data set does not fit into memory."""
    waiting = []
    for job in jobs:
        waiting.append(pool.submit(_pseudo_mask_array, *job))
        if len(waiting) >= ahead:
            yield torch.from_numpy(waiting.pop(0).result())
    for future in waiting:
        yield torch.from_numpy(future.result())


def _pseudo_mask_array(image: np.ndarray, clean: np.ndarray, bg_score: float, crf: CrfConfig) -> np.ndarray:
    return pseudo_mask(torch.from_numpy(image), torch.from_numpy(clean), bg_score, crf).numpy()


class _Chosen(Sequence[Tensor]):
    """Some items of a lazy sequence, still lazy: the maps of a data set do not fit into memory."""

    def __init__(self, items: Sequence[Tensor], indices: Sequence[int]) -> None:
        self.items, self.indices = items, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Tensor:  # type: ignore[override]
        return self.items[self.indices[index]]

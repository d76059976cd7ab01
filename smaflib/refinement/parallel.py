"""Refinement of many images: on all cores, or on a GPU while the next images are decoded."""

from __future__ import annotations

import functools
import itertools
import multiprocessing
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from smaflib.config import CrfBackend, CrfConfig, CustomRefinement, ParConfig
from smaflib.plugins import load_custom
from smaflib.processes import end_with_parent
from smaflib.refinement.crf import choose_backend, dense_crf_batch
from smaflib.refinement.par import pixel_adaptive_refinement
from smaflib.runtime import CPU, num_cores

IMAGES_PER_PROCESS = 4
"""Images queued per worker process, so that memory does not grow with the data set."""

FEW_IMAGES = 8
"""Fewer images are refined in this process. Worker processes take 1.4 s to start."""

GPU_BATCH = 8
"""Images that a GPU refines at once."""

Job: TypeAlias = tuple[Tensor, Tensor]
"""An image, uint8 (3, H, W), and its hard labels (H, W) or scores (L, H, W)."""

RefineBatch: TypeAlias = Callable[[Sequence[Tensor], Sequence[Tensor]], list[Tensor]]

Params: TypeAlias = CrfConfig | ParConfig | CustomRefinement
"""Which refinement, and its settings. A custom one is a callable of an image, uint8 (3, H, W), and scores, float32
(K+1, H, W) in [0, 1], background first, and returns refined scores of that shape. Worker processes import it."""


def refine(
    images: Sequence[Tensor],
    scores_or_labels: Sequence[Tensor],
    params: Params,
    num_labels: int,
    backend: CrfBackend = "auto",
    device: torch.device = CPU,
) -> list[Tensor]:
    """Refine a few images, computing on ``device``; ``backend`` is that of the dense CRF.

    Args:
        images: uint8 (3, H, W) each.
        scores_or_labels: per image scores (num_labels, H, W); for the dense CRF also hard labels, integer (H, W).
        params: which refinement, and its settings.
        num_labels: K+1.

    Returns:
        uint8 (H, W) each, on the CPU.
    """
    if isinstance(params, CrfConfig):
        masks = dense_crf_batch(images, scores_or_labels, params, num_labels, backend, device)
        return [mask.cpu() for mask in masks]
    jobs = [(image.to(device), scores.to(device)) for image, scores in zip(images, scores_or_labels, strict=True)]
    if isinstance(params, ParConfig):
        refined = [_adapted_to_pixels(image, scores, params) for image, scores in jobs]
    else:
        custom = load_custom(params.name)
        with torch.no_grad():
            refined = [custom(image, scores) for image, scores in jobs]
    return [scores.max(dim=0).indices.to(torch.uint8).cpu() for scores in refined]


def _adapted_to_pixels(image: Tensor, scores: Tensor, params: ParConfig) -> Tensor:
    """Pixel-adaptive refinement of the channels that are not zero everywhere: few of COCO's 81."""
    present = scores.flatten(1).any(dim=1)
    refined = torch.zeros_like(scores, dtype=torch.float32)
    refined[present] = pixel_adaptive_refinement(image, scores[present], params)
    return refined


def refine_many(
    jobs: Iterable[Job],
    params: Params,
    num_labels: int,
    num_workers: int = 1,
    backend: CrfBackend = "auto",
    device: torch.device = CPU,
) -> Iterator[Tensor]:
    """:func:`refine` of a whole data set, in its order and in bounded memory: jobs are taken as there is room.

    On the CPU ``num_workers`` processes compute; 0: one per core; 1, or fewer than :data:`FEW_IMAGES` jobs: this one.
    For a GPU a thread takes the next jobs.
    """
    if isinstance(params, CrfConfig):
        backend, device = choose_backend(backend, device)
    elif isinstance(params, CustomRefinement):
        load_custom(params.name)  # workers get this process's import path, which then leads to it
    refine_batch = functools.partial(refine, params=params, num_labels=num_labels, backend=backend, device=device)
    num_workers, rest = num_workers or num_cores(), iter(jobs)
    first = list(itertools.islice(rest, FEW_IMAGES))
    few, jobs = len(first) < FEW_IMAGES, itertools.chain(first, rest)
    del first  # or their scores would stay in memory
    if device.type != "cpu":
        yield from _on_gpu(jobs, refine_batch)
    elif num_workers == 1 or few:
        for image, given in jobs:
            yield from refine_batch([image], [given])
    else:
        yield from _on_all_cores(jobs, refine_batch, num_workers)


def _on_gpu(jobs: Iterator[Job], refine_batch: RefineBatch) -> Iterator[Tensor]:
    def take() -> list[Job]:
        return list(itertools.islice(jobs, GPU_BATCH))

    with ThreadPoolExecutor(1) as reader:
        coming = reader.submit(take)
        while batch := coming.result():
            coming = reader.submit(take)
            images, given = zip(*batch, strict=True)
            yield from refine_batch(images, given)


def _on_all_cores(jobs: Iterable[Job], refine_batch: RefineBatch, num_workers: int) -> Iterator[Tensor]:
    # pydensecrf holds Python's lock, so threads would not help.
    pool = ProcessPoolExecutor(num_workers, _process_context(), _start_worker)
    waiting: deque[Future[np.ndarray]] = deque()
    try:
        for image, given in jobs:
            # Tensors would each need a file handle and shared memory; arrays are sent by value.
            waiting.append(pool.submit(_refine_arrays, image.numpy(), given.numpy(), refine_batch))
            if len(waiting) >= IMAGES_PER_PROCESS * num_workers:
                yield torch.from_numpy(waiting.popleft().result())
        while waiting:
            yield torch.from_numpy(waiting.popleft().result())
    except BrokenProcessPool as error:
        raise RuntimeError(
            "a process that refined masks was killed, usually because memory is short; lower pseudo_masks.num_workers "
            "or segmentation.test_crf_workers"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _refine_arrays(image: np.ndarray, given: np.ndarray, refine_batch: RefineBatch) -> np.ndarray:
    return refine_batch([torch.from_numpy(image)], [torch.from_numpy(given)])[0].numpy()


def _process_context() -> multiprocessing.context.BaseContext:
    """Workers are forked from a server that has imported this module, so that later calls start them at once."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "pydensecrf.densecrf"])
    return context


def _start_worker() -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Jupyter interrupts the whole process group of a cell
    end_with_parent()

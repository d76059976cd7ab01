"""Refinement of many images: on all cores, or on one GPU while the next images are decoded.

pydensecrf holds Python's lock, so threads would not help. A worker process imports this package's refinement, not the
rest, and outlives the call by a minute: a notebook that refines several sets of masks starts its workers once.
"""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from smaflib.config import CrfBackend, CrfConfig, OwnRefinement, ParConfig
from smaflib.refinement.crf import choose_backend, dense_crf_batch
from smaflib.refinement.own import own_refinement
from smaflib.refinement.par import pixel_adaptive_refinement
from smaflib.runtime import CPU, ahead, num_cores

AHEAD = 4
"""Images under way per process: enough that none waits, few enough that memory does not grow with the data set."""

FEW_IMAGES = 8
"""Fewer stay in this process. Workers take 1.4 s to start; on photos of 500 pixels two pay from 12 on, many from 6."""

IDLE_SECONDS = 60.0
"""How long workers wait for another call. They hold half a gigabyte each, so they do not stay for ever."""

GPU_BATCH = 8
"""Images that a GPU refines together, so that its kernels are large enough to fill it."""

GPU_PIXELS = 8 * 512 * 512
"""Of images that pixel-adaptive refinement takes together: about 1.5 kB of memory each."""

Job = tuple[Tensor, Tensor]
"""An image, uint8 (3, H, W), and its hard labels (H, W) or scores (L, H, W)."""

Params: TypeAlias = CrfConfig | ParConfig | OwnRefinement
"""Which refinement, and its settings."""


def refine(
    images: Sequence[Tensor],
    scores_or_labels: Sequence[Tensor],
    params: Params,
    num_labels: int,
    backend: CrfBackend = "auto",
    device: torch.device = CPU,
) -> list[Tensor]:
    """Refine a few images: together, by somebody's own refinement one by one.

    Args:
        images: uint8 (3, H, W) each.
        scores_or_labels: per image hard labels, integer (H, W), or scores (num_labels, H, W); scores alone for
            all but the dense CRF.
        params: which refinement, and its settings.
        num_labels: K+1.
        backend: of the dense CRF.
        device: where torch computes.

    Returns:
        uint8 (H, W) each, on the CPU.
    """
    if isinstance(params, CrfConfig):
        masks = dense_crf_batch(images, scores_or_labels, params, num_labels, backend, device)
    elif isinstance(params, ParConfig):
        masks = _adapt_to_pixels(images, scores_or_labels, params, device)
    else:
        refined = (
            own_refinement(image.to(device), scores.to(device), params.name)
            for image, scores in zip(images, scores_or_labels, strict=True)
        )
        masks = [scores.max(dim=0).indices.to(torch.uint8) for scores in refined]
    return [mask.cpu() for mask in masks]


def _adapt_to_pixels(
    images: Sequence[Tensor], scores: Sequence[Tensor], params: ParConfig, device: torch.device
) -> list[Tensor]:
    """Pixel-adaptive refinement, images of one size together: uint8 (H, W) each, on the device."""
    by_size: dict[torch.Size, list[int]] = {}
    for index, image in enumerate(images):
        by_size.setdefault(image.shape, []).append(index)
    masks: dict[int, Tensor] = {}
    for size, indices in by_size.items():
        together = max(1, GPU_PIXELS // (size[-2] * size[-1]))
        for first in range(0, len(indices), together):
            part = indices[first : first + together]
            batch = torch.stack([scores[index] for index in part])  # (B, L, H, W)
            # A label without any score gets none from its neighbours: of COCO's 81 few have to be smoothed.
            shown = batch.flatten(2).any(dim=2).any(dim=0)
            shown[0] = True  # what is best where no label has a score
            labels = shown.nonzero()[:, 0]
            pictures = torch.stack([images[index] for index in part]).to(device)
            refined = pixel_adaptive_refinement(pictures, batch[:, labels].to(device), params)
            found = labels.to(torch.uint8).to(device)[refined.max(dim=1).indices]
            masks |= dict(zip(part, found, strict=True))
    return [masks[index] for index in range(len(images))]


def refine_many(
    jobs: Iterable[Job],
    params: Params,
    num_labels: int,
    num_workers: int = 1,
    backend: CrfBackend = "auto",
    device: torch.device = CPU,
) -> Iterator[Tensor]:
    """Refine a whole data set in bounded memory.

    Args:
        jobs: taken when there is room, by a thread if the device is a GPU.
        params: as for :func:`refine`.
        num_labels: K+1.
        num_workers: processes on the CPU; 0: one per core; 1: this one, nothing is started, nor is it for fewer jobs
            than :data:`FEW_IMAGES`. A GPU needs none.
        backend: as for :func:`refine`.
        device: as for :func:`refine`.

    Yields:
        uint8 (H, W) per job, in the order of the jobs.
    """
    if isinstance(params, CrfConfig):
        backend, device = choose_backend(backend, device)
    if device.type != "cpu":
        for batch in _decoded_ahead(jobs):
            # Of several images together an error of somebody's own refinement could not tell the one.
            for jobs_together in [[job] for job in batch] if isinstance(params, OwnRefinement) else [batch]:
                images, unaries = zip(*jobs_together, strict=True)
                yield from refine(images, unaries, params, num_labels, backend, device)
        return
    num_workers, rest = num_workers or num_cores(), iter(jobs)
    first = list(itertools.islice(rest, FEW_IMAGES if num_workers > 1 else 0))
    jobs = itertools.chain(first, rest)
    if len(first) < FEW_IMAGES:
        for image, given in jobs:
            yield from refine([image], [given], params, num_labels, backend)
    else:
        del first  # or their scores would stay in memory
        yield from _on_all_cores(jobs, params, num_labels, num_workers, backend)


def _decoded_ahead(jobs: Iterable[Job]) -> Iterator[list[Job]]:
    """Batches, of which a thread prepares the next one while the GPU works on this one."""
    rest = iter(jobs)

    def take(_: int) -> list[Job]:
        return list(itertools.islice(rest, GPU_BATCH))

    with contextlib.closing(ahead(take, itertools.count(), workers=1, room=1)) as batches:
        yield from itertools.takewhile(bool, batches)


def _on_all_cores(
    jobs: Iterable[Job], params: Params, num_labels: int, num_workers: int, backend: CrfBackend
) -> Iterator[Tensor]:
    # Workers that were started for another refinement do not know where to look for somebody's own.
    key = (num_workers, params.name if isinstance(params, OwnRefinement) else "")
    pool, waiting, broken = _take_pool(key), deque[Future[np.ndarray]](), False
    try:
        for image, given in jobs:
            # Arrays travel through the pipe by value; tensors would each need a file handle and room in /dev/shm.
            packed = _Packed.of(given)
            waiting.append(pool.submit(_refine_packed, image.numpy(), packed, params, num_labels, backend))
            if len(waiting) >= AHEAD * num_workers:
                yield torch.from_numpy(waiting.popleft().result())
        while waiting:
            yield torch.from_numpy(waiting.popleft().result())
    except BrokenProcessPool as error:  # a worker was killed, by lack of memory as a rule
        broken = True
        raise RuntimeError(
            "a process that refined masks was killed, which happens where memory is short; take fewer with "
            "pseudo_masks.num_workers or segmentation.test_crf_workers"
        ) from error
    finally:
        for future in waiting:  # whose results nobody takes any more
            future.cancel()
        if not broken:
            _keep_pool(key, pool)


PoolKey: TypeAlias = tuple[int, str]
"""Number of workers, and the name of somebody's own refinement or ``""``."""

_idle: dict[PoolKey, tuple[ProcessPoolExecutor, threading.Timer]] = {}
"""Pools that no call is using. One step takes a pool out, so that no two calls get it."""


def _take_pool(key: PoolKey) -> ProcessPoolExecutor:
    if kept := _idle.pop(key, None):
        kept[1].cancel()
        return kept[0]
    # Forking a process whose torch threads are running can deadlock.
    return ProcessPoolExecutor(key[0], multiprocessing.get_context("spawn"), _start_worker)


def _keep_pool(key: PoolKey, pool: ProcessPoolExecutor) -> None:
    _end_idle_pool(key)  # if another call at the same time had one of its own
    timer = threading.Timer(IDLE_SECONDS, _end_idle_pool, [key])
    timer.daemon = True  # the program does not wait for it
    _idle[key] = pool, timer  # before the timer runs: one that finds no pool would leave its workers for ever
    timer.start()


def _end_idle_pool(key: PoolKey) -> None:
    if kept := _idle.pop(key, None):
        kept[1].cancel()
        kept[0].shutdown(wait=False)


def _start_worker() -> None:
    torch.set_num_threads(1)
    # Jupyter interrupts a cell's whole process group. The next cell can still use the workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A worker whose parent is killed would wait for its next image for ever.
    threading.Thread(target=_leave_with_parent, daemon=True).start()


def _leave_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


@dataclass(frozen=True)
class _Packed:
    """Labels as they are; of scores only the channels that are not zero everywhere: few of COCO's 81."""

    values: np.ndarray
    channels: np.ndarray | None
    num_channels: int = 0

    @classmethod
    def of(cls, given: Tensor) -> _Packed:
        if given.dim() == 2:
            return cls(given.numpy(), None)
        channels = given.flatten(1).any(dim=1).nonzero()[:, 0]
        return cls(given[channels].numpy(), channels.numpy(), len(given))

    def unpack(self) -> Tensor:
        if self.channels is None:
            return torch.from_numpy(self.values)
        whole = torch.zeros(self.num_channels, *self.values.shape[1:])
        whole[self.channels] = torch.from_numpy(self.values)
        return whole


def _refine_packed(
    image: np.ndarray, packed: _Packed, params: Params, num_labels: int, backend: CrfBackend
) -> np.ndarray:
    return refine([torch.from_numpy(image)], [packed.unpack()], params, num_labels, backend)[0].numpy()

"""Dense CRF of many images on all cores.

pydensecrf holds Python's lock, so threads would not help. A worker process imports this package's refinement and
nothing else, and lives as long as the program: a notebook that refines several sets of masks starts its workers once.
"""

from __future__ import annotations

import functools
import multiprocessing
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor

import numpy as np
import torch
from torch import Tensor

from smaflib.config import CrfConfig
from smaflib.refinement.crf import dense_crf

AHEAD = 4
"""Images under way per process: enough that none waits, few enough that memory does not grow with the data set."""


def dense_crf_many(
    jobs: Iterable[tuple[Tensor, Tensor]], params: CrfConfig, num_labels: int, num_workers: int = 1
) -> Iterator[Tensor]:
    """Refine the hard labels of many images.

    Args:
        jobs: pairs of image, uint8 (3, H, W), and labels, integer (H, W) in [0, num_labels); taken when there is room.
        params: as for :func:`~smaflib.refinement.crf.dense_crf`.
        num_labels: K+1.
        num_workers: processes; 1: this one, nothing is started.

    Yields:
        uint8 (H, W) per job, in the order of the jobs.
    """
    if num_workers == 1:
        yield from (dense_crf(image, labels, params, num_labels) for image, labels in jobs)
        return
    pool, waiting = _pool(num_workers), deque[Future[np.ndarray]]()
    try:
        for image, labels in jobs:
            # Arrays travel through the pipe by value; tensors would each need a file handle and room in /dev/shm.
            waiting.append(pool.submit(_refine, image.numpy(), labels.numpy(), params, num_labels))
            if len(waiting) >= AHEAD * num_workers:
                yield torch.from_numpy(waiting.popleft().result())
        while waiting:
            yield torch.from_numpy(waiting.popleft().result())
    finally:  # who stops asking wants nothing more to be computed
        for future in waiting:
            future.cancel()


@functools.cache
def _pool(num_workers: int) -> ProcessPoolExecutor:
    # forkserver: forking a process whose torch threads are running can deadlock.
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    return ProcessPoolExecutor(num_workers, mp_context=context, initializer=torch.set_num_threads, initargs=(1,))


def _refine(image: np.ndarray, labels: np.ndarray, params: CrfConfig, num_labels: int) -> np.ndarray:
    return dense_crf(torch.from_numpy(image), torch.from_numpy(labels), params, num_labels).numpy()

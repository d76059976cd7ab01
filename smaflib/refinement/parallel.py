"""Refinement of many images, on all cores or on a GPU."""

import functools
import itertools
import multiprocessing
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from smaflib.config import CrfBackend, CrfConfig, ParConfig
from smaflib.data.masks import strongest
from smaflib.plugins import load_custom
from smaflib.processes import end_with_parent
from smaflib.refinement.crf import choose_backend, dense_crf
from smaflib.refinement.par import pixel_adaptive_refinement
from smaflib.runtime import CPU, num_cores

IMAGES_PER_PROCESS = 2  # queued for each, so that memory does not grow with the data set
FEW_IMAGES = 8  # fewer are refined in this process: worker processes take 1.4 s to start

Job: TypeAlias = tuple[Tensor, Tensor]  # an image, uint8 (3, H, W), and its hard labels (H, W) or scores (L, H, W)
Params: TypeAlias = CrfConfig | ParConfig | str
"""The settings of a refinement, or the name of a custom one: a callable of an image, uint8 (3, H, W), and scores,
float32 (K+1, H, W) in [0, 1], background first, that returns refined scores. Worker processes import it."""


def refine(
    image: Tensor,
    scores_or_labels: Tensor,
    params: Params,
    num_labels: int,
    backend: CrfBackend = "auto",
    device: torch.device = CPU,
) -> Tensor:
    """Refine the mask of an image, uint8 (3, H, W), to uint8 (H, W) on the CPU.

    All refinements take scores (num_labels, H, W), the dense CRF also hard labels, integer (H, W). ``backend`` is that
    of the dense CRF; ``device`` is where torch computes.
    """
    if isinstance(params, CrfConfig):
        return dense_crf(image, scores_or_labels, params, num_labels, backend, device).cpu()
    image, scores = image.to(device), scores_or_labels.to(device)
    if isinstance(params, ParConfig):
        refined = pixel_adaptive_refinement(image, scores, params)
    else:
        with torch.no_grad():
            refined = load_custom(params)(image, scores)
    return strongest(refined)[1].to(torch.uint8).cpu()


def refine_many(
    jobs: Iterable[Job],
    params: Params,
    num_labels: int,
    num_workers: int = 1,
    backend: CrfBackend = "auto",
    device: torch.device = CPU,
) -> Iterator[Tensor]:
    """:func:`refine` of a whole data set, in its order and in bounded memory: jobs are taken as there is room.

    On the CPU ``num_workers`` processes compute; 0: one per core; 1, or fewer than ``FEW_IMAGES`` jobs: this one.
    """
    if isinstance(params, CrfConfig):
        backend, device = choose_backend(backend, device)
    elif isinstance(params, str):
        load_custom(params)  # workers get this process's import path, which then leads to it
    refine_one = functools.partial(refine, params=params, num_labels=num_labels, backend=backend, device=device)
    num_workers, rest = num_workers or num_cores(), iter(jobs)
    first = list(itertools.islice(rest, FEW_IMAGES))
    few, jobs = len(first) < FEW_IMAGES, itertools.chain(first, rest)
    del first  # or their scores would stay in memory
    if device.type != "cpu" or num_workers == 1 or few:
        yield from itertools.starmap(refine_one, jobs)
    else:
        yield from _on_all_cores(jobs, refine_one, num_workers)


def _on_all_cores(jobs: Iterable[Job], refine_one: Callable[..., Tensor], num_workers: int) -> Iterator[Tensor]:
    # pydensecrf holds Python's lock, so threads would not help.
    # Workers are forked from a server that has imported this module, so that later calls start them at once.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "pydensecrf.densecrf"])
    pool = ProcessPoolExecutor(num_workers, context, _start_worker)
    waiting: deque[Future[np.ndarray]] = deque()
    try:
        for image, given in jobs:
            # Tensors would each need a file handle and shared memory; arrays are sent by value.
            waiting.append(pool.submit(_refine_arrays, image.numpy(), given.numpy(), refine_one))
            if len(waiting) >= IMAGES_PER_PROCESS * num_workers:
                yield torch.from_numpy(waiting.popleft().result())
        while waiting:
            yield torch.from_numpy(waiting.popleft().result())
    finally:
        pool.shutdown(cancel_futures=True)


def _refine_arrays(image: np.ndarray, given: np.ndarray, refine_one: Callable[..., Tensor]) -> np.ndarray:
    return refine_one(torch.from_numpy(image), torch.from_numpy(given)).numpy()


def _start_worker() -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Jupyter interrupts the whole process group of a cell
    end_with_parent()

"""Images as a network sees them: at several scales and normalised, decoded by loader workers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from smaflib.data.sample import Sample
from smaflib.data.transforms import normalize, resize_to_each, scaled_size
from smaflib.runtime import Runtime, num_cores, progress

BATCH_SIZE = 4
"""Images of one size in a forward pass."""

SMALL_IMAGE = 128 * 128
"""Pixels up to which a forward pass of several images on a CPU takes less time than one of each."""

MOST_WORKERS = 8
"""Loader processes beside a GPU; each keeps an image's views in memory."""


def views_of(image: Tensor, scales: Sequence[float]) -> list[Tensor]:
    """An image, uint8 (3, H, W), at each scale: bicubic, normalised, float32 (3, H_s, W_s)."""
    sizes = [scaled_size(image.shape[-2:], scale) for scale in scales]
    return [normalize(resized) for resized in resize_to_each(image, sizes)]


@dataclass(frozen=True)
class ViewBatch:
    """Images of one size at several scales.

    Attributes:
        indices: numbers of the samples.
        images: uint8 (3, H, W) each.
        views: per scale float32 (B, 3, H_s, W_s), normalised, on the device.
    """

    indices: list[int]
    images: list[Tensor]
    views: list[Tensor]

    @property
    def size(self) -> tuple[int, int]:  # (H, W)
        return self.images[0].shape[-2], self.images[0].shape[-1]


def load_views(
    samples: Sequence[Sample],
    scales: Sequence[float],
    runtime: Runtime,
    indices: Sequence[int] | None = None,
    desc: str = "",
    num_workers: int | None = None,
) -> Iterator[ViewBatch]:
    """Load images at every scale, neighbours of one size together.

    Args:
        runtime: its device receives the views. On a CPU large images come one by one: together they would be slower.
        indices: of the samples to load, in this order; None: all.
        desc: name on the progress bar; empty: no bar.
        num_workers: loader processes; None: one per core beside a GPU, none on a CPU, whose cores compute.
    """
    on_cpu, order = runtime.device.type == "cpu", range(len(samples)) if indices is None else indices
    if num_workers is None:
        num_workers = 0 if on_cpu else min(num_cores(), MOST_WORKERS, len(order) // BATCH_SIZE)
    loader: DataLoader[_Loaded] = DataLoader(
        _ViewsDataset(samples, scales),
        batch_size=None,
        sampler=order,
        num_workers=num_workers,
        generator=torch.Generator(),  # else the loader would draw from the global generator
        pin_memory=runtime.device.type == "cuda",
    )
    waiting: list[_Loaded] = []
    for index, image, views in progress(loader, total=len(order), desc=desc) if desc else loader:
        most = BATCH_SIZE * SMALL_IMAGE // image[0].numel() if on_cpu else BATCH_SIZE
        if waiting and (len(waiting) >= min(most, BATCH_SIZE) or image.shape != waiting[0].image.shape):
            yield _together(waiting, runtime.device)
            waiting = []
        waiting.append(_Loaded(index, image, views))
    if waiting:
        yield _together(waiting, runtime.device)


class _Loaded(NamedTuple):
    number: int
    image: Tensor
    views: list[Tensor]


class _ViewsDataset(Dataset[_Loaded]):
    def __init__(self, samples: Sequence[Sample], scales: Sequence[float]) -> None:
        self.samples, self.scales = samples, scales

    def __getitem__(self, index: int) -> _Loaded:
        image = self.samples[index].image
        return _Loaded(index, image, views_of(image, self.scales))


def _together(loaded: list[_Loaded], device: torch.device) -> ViewBatch:
    indices, images, views = zip(*loaded, strict=True)
    of_scale = zip(*views, strict=True)
    stacked = [torch.stack([view.to(device, non_blocking=True) for view in same]) for same in of_scale]
    return ViewBatch(list(indices), list(images), stacked)

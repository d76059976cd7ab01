"""Images as a network sees them: at several scales and normalised, decoded by loader workers."""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torchvision.transforms.v2.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import InterpolationMode

from smaflib.data.sample import Sample
from smaflib.data.transforms import normalize, scaled_size
from smaflib.runtime import Runtime, num_cores, progress

BATCH_SIZE = 4  # images of one size in a forward pass

SMALL_IMAGE = 128 * 128  # pixels up to which a forward pass of several images on a CPU is faster than one of each

MAX_WORKERS = 8  # loader processes beside a GPU; each keeps an image's views in memory


def views_of(image: Tensor, scales: Sequence[float], patch: int = 1) -> list[Tensor]:
    """An image, uint8 (3, H, W), at each scale: PIL's bicubic, normalised, float32 (3, H_s, W_s).

    The sides are rounded up to multiples of ``patch``.
    """
    picture = F.to_pil_image(image)
    sizes = [[-side // patch * -patch for side in scaled_size(image.shape[-2:], scale)] for scale in scales]
    return [normalize(F.pil_to_tensor(F.resize(picture, size, InterpolationMode.BICUBIC))) for size in sizes]


@dataclass(frozen=True)
class ViewBatch:
    """Images of one size at several scales."""

    indices: list[int]  # of the samples
    images: list[Tensor]  # uint8 (3, H, W) each
    views: list[Tensor]  # per scale float32 (B, 3, H_s, W_s), normalised, on the device

    @property
    def size(self) -> tuple[int, int]:  # (H, W)
        return self.images[0].shape[-2], self.images[0].shape[-1]


def load_views(
    samples: Sequence[Sample],
    scales: Sequence[float],
    runtime: Runtime,  # its device receives the views
    indices: Sequence[int] | None = None,  # of the samples to load, in this order; None: all
    desc: str = "",  # name on the progress bar; empty: no bar
    patch: int = 1,  # the views' sides are multiples of it
) -> Iterator[ViewBatch]:
    """Load images at every scale, neighbours of one size together; on a CPU large ones one by one, which is faster."""
    on_cpu, order = runtime.device.type == "cpu", range(len(samples)) if indices is None else indices
    loader: DataLoader[tuple[int, Tensor, list[Tensor]]] = DataLoader(
        _Views(samples, scales, patch),
        batch_size=None,
        sampler=order,
        num_workers=0 if on_cpu else min(num_cores(), MAX_WORKERS, len(order) // BATCH_SIZE),  # a CPU's cores compute
        generator=torch.Generator(),  # else the loader would draw from the global generator
        pin_memory=runtime.device.type == "cuda",
    )
    loaded = progress(loader, total=len(order), desc=desc) if desc else loader
    for shape, neighbours in itertools.groupby(loaded, key=lambda item: item[1].shape):
        most = BATCH_SIZE * SMALL_IMAGE // math.prod(shape[1:]) if on_cpu else BATCH_SIZE
        while batch := list(itertools.islice(neighbours, min(max(most, 1), BATCH_SIZE))):
            numbers, images, views = zip(*batch, strict=True)
            of_scale = zip(*views, strict=True)
            stacked = [torch.stack([view.to(runtime.device, non_blocking=True) for view in same]) for same in of_scale]
            yield ViewBatch(list(numbers), list(images), stacked)


class _Views(Dataset[tuple[int, Tensor, list[Tensor]]]):
    def __init__(self, samples: Sequence[Sample], scales: Sequence[float], patch: int) -> None:
        self.samples, self.scales, self.patch = samples, scales, patch

    def __getitem__(self, index: int) -> tuple[int, Tensor, list[Tensor]]:
        image = self.samples[index].image
        return index, image, views_of(image, self.scales, self.patch)

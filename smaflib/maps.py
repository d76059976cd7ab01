"""Attention maps of whole splits: stored once per image and scale, fused and denoised when they are read.

Stage 2 writes them (:func:`write_attention_maps`); every later stage reads :class:`DenoisedMaps`.
"""

from __future__ import annotations

import sys
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smaflib.cams import fuse_cams, multi_scale_cams
from smaflib.config import AttentionConfig, FusionRule
from smaflib.data.sample import Samples
from smaflib.data.transforms import scaled_size
from smaflib.errors import DataError
from smaflib.files import load_arrays, save_arrays
from smaflib.models.memory import forward_bytes, refuse_what_does_not_fit
from smaflib.reactivation import blend_saliency, denoise
from smaflib.runtime import Runtime, progress, release_freed_memory


def fuse_and_denoise(
    cams: Sequence[Tensor],
    size: tuple[int, int],
    image_label: Tensor,
    rule: FusionRule = "sum",
    scales: Sequence[float] | None = None,
    weights: Sequence[float] | None = None,
) -> Tensor:
    """:func:`~smaflib.cams.fuse_cams`, then :func:`~smaflib.reactivation.denoise`, at the cost of the labelled classes.

    Each class is fused by itself, so those that denoising erases need not be fused at all: of eighty, one or two are.

    Args:
        cams: per scale (K, h_s, w_s), non-negative, flips already undone.
        size: (H, W) of the original image, in pixels.
        image_label: (K,) in {0, 1}.
        rule: how the scales are joined.
        scales: the scale of each map; only ``size_adaptive`` needs them.
        weights: factor of each map.

    Returns:
        (K, H, W) in [0, 1]; absent classes are zero.
    """
    classes = image_label.nonzero()[:, 0]
    whole = torch.zeros(len(image_label), *size)
    if len(classes):
        whole[classes] = fuse_cams([cam[classes] for cam in cams], size, rule, scales, weights)
    return denoise(whole, image_label)


@dataclass(frozen=True)
class AttentionMaps:
    """A folder of class attention maps, one file per image: written once, fused when read.

    Fusing again is cheaper than reading fused maps, and leaves the fusion rule open.
    """

    folder: Path
    scales: tuple[float, ...]

    def path(self, image_id: str) -> Path:
        return self.folder / f"{image_id}.npz"

    def write(self, image_id: str, cams: Sequence[Tensor], size: tuple[int, int]) -> None:
        """Keep one image's maps in half precision."""
        arrays = {f"scale_{scale:g}": cam.half().numpy() for scale, cam in zip(self.scales, cams, strict=True)}
        save_arrays(self.path(image_id), size=np.array(size), **arrays)

    def read(self, image_id: str, scales: Sequence[float] | None = None) -> tuple[list[Tensor], tuple[int, int]]:
        """One image's maps, per scale (K, h_s, w_s), of all scales or some, and its (H, W).

        Raises:
            DataError: if the file is missing or damaged.
        """
        path = self.path(image_id)
        names = [f"scale_{scale:g}" for scale in (self.scales if scales is None else scales)]
        try:
            arrays = load_arrays(path, ["size", *names])
            height, width = arrays["size"].tolist()
            return [torch.from_numpy(arrays[name]).float() for name in names], (height, width)
        except FileNotFoundError:
            raise DataError(
                f"there are no attention maps {path}; notebook 03 (teacher) or 05 (student) makes them"
            ) from None
        except (OSError, ValueError, KeyError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
            raise DataError(
                f"{path} is not a complete file of attention maps ({error}); delete it and run again"
            ) from error

    def fused(
        self,
        image_id: str,
        rule: FusionRule = "sum",
        scales: Sequence[float] | None = None,
        image_label: Tensor | None = None,
    ) -> Tensor:
        """(K, H, W) in [0, 1], of all scales or some; denoised where there is an ``image_label``, (K,) in {0, 1}."""
        chosen = self.scales if scales is None else scales
        cams, size = self.read(image_id, chosen)
        if image_label is None:
            return fuse_cams(cams, size, rule, chosen)
        return fuse_and_denoise(cams, size, image_label, rule, chosen)


SMALL_IMAGE = 128 * 128
"""Pixels up to which a forward pass of several images on a CPU takes less time than one of each."""


def write_attention_maps(
    network: nn.Module,
    samples: Samples,
    folder: Path,
    config: AttentionConfig,
    runtime: Runtime,
    batch_size: int = 4,
) -> AttentionMaps:
    """Attention maps of a whole split; images that have theirs already are skipped.

    Args:
        network: teacher, student or any module with ``attention``.
        samples: the split.
        folder: takes one ``.npz`` per image.
        config: scales and flip.
        runtime: device and precision.
        batch_size: images of one size in a forward pass. Photos on a CPU are taken one by one: together they would be
            slower and need more memory.

    Raises:
        ConfigError: if a scale of an image needs more memory than the device has.
    """
    maps = AttentionMaps(folder, config.scales)
    runtime.place(network)
    most_pixels = batch_size * SMALL_IMAGE if runtime.device.type == "cpu" else sys.maxsize
    missing = [index for index, image_id in enumerate(samples.image_ids) if not maps.path(image_id).is_file()]
    bar = progress(
        _same_size_batches(samples, missing, batch_size, most_pixels), total=None, desc=f"attention of {samples.split}"
    )
    largest = 0  # pixels of the largest image that is known to fit
    for batch in bar:
        image_id, image = batch[0]
        if image[0].numel() * len(batch) > largest:
            largest = image[0].numel() * len(batch)
            _check_memory(network, image_id, (len(batch), *image.shape[1:]), config, runtime)
        images = torch.stack([image for _, image in batch])
        cams = multi_scale_cams(network, images, config.scales, config.flip, runtime)
        for row, (image_id, image) in enumerate(batch):
            height, width = image.shape[-2:]
            maps.write(image_id, [cam[row] for cam in cams], (height, width))
    release_freed_memory()
    return maps


def _check_memory(
    network: nn.Module, image_id: str, shape: tuple[int, int, int], config: AttentionConfig, runtime: Runtime
) -> None:
    """Refuse the largest scale of a batch (B, H, W) that does not fit the device's memory."""
    scale = max(config.scales)
    views, (height, width) = shape[0] * (2 if config.flip else 1), scaled_size(shape[1:], scale)
    what, cure = f"attention of image {image_id!r} at scale {scale:g}", "leave the scale out of attention.scales"
    refuse_what_does_not_fit(forward_bytes, network.eval(), (views, height, width), runtime, what, cure)


def _same_size_batches(
    samples: Samples, indices: Sequence[int], most: int, most_pixels: int
) -> Iterator[list[tuple[str, Tensor]]]:
    """Neighbours of equal size, up to ``most`` together, or fewer if they have more pixels; one at least."""
    batch: list[tuple[str, Tensor]] = []
    for index in indices:
        sample = samples[index]
        pixels = sample.image[0].numel()
        full = len(batch) == most or (len(batch) + 1) * pixels > most_pixels
        if batch and (full or batch[0][1].shape != sample.image.shape):
            yield batch
            batch = []
        batch.append((sample.image_id, sample.image))
    if batch:
        yield batch


class DenoisedMaps(Sequence[Tensor]):
    """Fused and denoised maps of a split, (K, H, W) in [0, 1] per image, read when asked for.

    Args:
        maps: a network's attention maps.
        samples: the split, for order and image labels.
        rule: of the fusion.
        scales: which scales take part; None: all. One scale gives the control of the paper's claim.
        cached: keep what was read, in half precision; of maps that are zero all over nothing is kept.
        denoised: False leaves the maps of absent classes in, to show what denoising does.
        saliency_weight: above 0, the samples' saliency maps take part with that share
            (:func:`~smaflib.reactivation.blend_saliency`).
    """

    def __init__(
        self,
        maps: AttentionMaps,
        samples: Samples,
        rule: FusionRule = "sum",
        scales: Sequence[float] | None = None,
        cached: bool = False,
        denoised: bool = True,
        saliency_weight: float = 0.0,
    ) -> None:
        self.maps, self.rule, self.scales, self.cached, self.denoised = maps, rule, scales, cached, denoised
        self.image_ids, self.image_labels = samples.image_ids, samples.image_labels
        self.saliency, self.saliency_weight = SaliencyMaps(samples), saliency_weight
        self._cache: dict[int, _NonZero] = {}

    def __len__(self) -> int:
        return len(self.image_ids)

    def __getitem__(self, index: int) -> Tensor:  # type: ignore[override]
        if index in self._cache:
            return self._cache[index].whole()
        label = self.image_labels[index] if self.denoised else None
        maps = self.maps.fused(self.image_ids[index], self.rule, self.scales, label)
        if self.saliency_weight:
            maps = blend_saliency(maps, self.saliency[index], self.saliency_weight)
        if not self.cached:
            return maps
        self._cache[index] = _NonZero.of(maps)
        return self._cache[index].whole()


@dataclass(frozen=True)
class _NonZero:
    """The maps of an image that are not zero all over: of denoised ones few, and all 900 of a small VOC fit memory."""

    num_classes: int
    classes: Tensor  # (P,), their numbers
    maps: Tensor  # float16 (P, H, W)

    @classmethod
    def of(cls, maps: Tensor) -> _NonZero:
        halves = maps.half()
        classes = halves.flatten(1).any(dim=1).nonzero()[:, 0]
        return cls(len(maps), classes, halves[classes])

    def whole(self) -> Tensor:
        maps = torch.zeros(self.num_classes, *self.maps.shape[1:])
        maps[self.classes] = self.maps.float()
        return maps


class MaskMaps(Sequence[Tensor]):
    """Masks, uint8 (H, W) each, as class maps (K, H, W) of 0 and 1: targets of a student."""

    def __init__(self, masks: Sequence[Tensor], num_classes: int) -> None:
        self.masks, self.num_classes = masks, num_classes

    def __len__(self) -> int:
        return len(self.masks)

    def __getitem__(self, index: int) -> Tensor:  # type: ignore[override]
        return F.one_hot(self.masks[index].long(), self.num_classes + 1).permute(2, 0, 1)[1:].float()


class SaliencyMaps(Sequence[Tensor]):
    """The saliency maps of a split that has them, float32 (H, W) in [0, 1] each, read when asked for."""

    def __init__(self, samples: Samples) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Tensor:  # type: ignore[override]
        saliency = self.samples[index].saliency
        if saliency is None:
            raise DataError(f"there is no saliency map of {self.samples.files[index].image_id}; set data.saliency")
        return saliency

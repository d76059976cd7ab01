"""Attention maps of whole splits: stored once per image and scale, fused and denoised when they are read.

Stage 2 writes them (:func:`write_attention_maps`); every later stage reads :class:`DenoisedMaps`.
"""

from __future__ import annotations

import sys
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smaflib.cams import Fusion, fuse_cams, scaled_inputs, start_cams, with_mirror_images
from smaflib.config import AttentionConfig, FusionRule
from smaflib.data.sample import Sample, Samples, same_size
from smaflib.distributed.ranks import missing_here, wait_for_all
from smaflib.errors import DataError
from smaflib.files import load_arrays, save_arrays
from smaflib.plugins import of_image
from smaflib.reactivation import blend_saliency
from smaflib.runtime import Runtime, progress, release_freed_memory


def fuse_and_denoise(
    cams: Sequence[Tensor],
    size: tuple[int, int],
    image_label: Tensor,
    rule: FusionRule | Fusion = "sum",
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
        scales: the scale of each map; as of :func:`~smaflib.cams.fuse_cams`.
        weights: factor of each map.

    Returns:
        (K, H, W) in [0, 1]; absent classes are zero.
    """
    classes = image_label.nonzero()[:, 0]
    return PresentMaps(len(image_label), classes, fuse_present(cams, size, classes, rule, scales, weights)).whole()


def fuse_present(
    cams: Sequence[Tensor],
    size: tuple[int, int],
    classes: Tensor,
    rule: FusionRule | Fusion = "sum",
    scales: Sequence[float] | None = None,
    weights: Sequence[float] | None = None,
) -> Tensor:
    """:func:`~smaflib.cams.fuse_cams` of some classes, by their numbers (P,): (P, H, W) in [0, 1]; P may be 0."""
    if len(classes) == 0:
        return torch.zeros(0, *size)
    return fuse_cams([cam[classes] for cam in cams], size, rule, scales, weights)


@dataclass(frozen=True)
class PresentMaps:
    """Denoised maps of an image without those of absent classes, which are zero: one or two of VOC's twenty.

    Attributes:
        num_classes: K.
        classes: (P,) numbers, 0 to K-1, rising.
        maps: (P, H, W) in [0, 1].
    """

    num_classes: int
    classes: Tensor
    maps: Tensor

    def whole(self) -> Tensor:
        """(K, H, W), float32."""
        whole = torch.zeros(self.num_classes, *self.maps.shape[1:])
        whole[self.classes] = self.maps.float()
        return whole

    def strongest(self) -> tuple[Tensor, Tensor]:
        """Per pixel the highest score, (H, W), and its class, int64 (H, W), as ``whole().max(dim=0)`` gives them.

        Where no class has a score above 0, the class is any.
        """
        if len(self.classes) == 0:
            size = self.maps.shape[1:]
            return torch.zeros(size), torch.zeros(size, dtype=torch.int64)
        score, winner = self.maps.float().max(dim=0)
        return score, self.classes[winner]


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

    def fused(self, image_id: str, rule: FusionRule | Fusion = "sum", scales: Sequence[float] | None = None) -> Tensor:
        """(K, H, W) in [0, 1], of all scales or some."""
        chosen = self.scales if scales is None else scales
        cams, size = self.read(image_id, chosen)
        with of_image(image_id):
            return fuse_cams(cams, size, rule, chosen)


SMALL_IMAGE = 128 * 128
"""Pixels up to which a forward pass of several images on a CPU takes less time than one of each."""


def write_attention_maps(
    network: nn.Module,
    samples: Samples,
    folder: Path,
    config: AttentionConfig,
    runtime: Runtime,
    batch_size: int = 4,
    host_threads: int | None = None,
) -> AttentionMaps:
    """Attention maps of a whole split; images that have theirs already are skipped.

    Of several processes (:mod:`smaflib.processes`) each makes its part.

    Args:
        network: teacher, student, a source of maps (:func:`~smaflib.models.sources.source_of`) or any module with
            ``attention``.
        samples: the split.
        folder: takes one ``.npz`` per image.
        config: scales and flip.
        runtime: device and precision.
        batch_size: images of one size in a forward pass. Photos on a CPU are taken one by one: together they would be
            slower and need more memory.
        host_threads: that decode and resize the next images while a GPU computes; as many write the last ones. None:
            as of :meth:`~smaflib.runtime.Runtime.host_threads`.

    Raises:
        PluginError: if a source of somebody's own does not give maps; those of the images before are kept.
    """
    maps = AttentionMaps(folder, config.scales)
    runtime.place(network)
    names = [f"{image_id}.npz" for image_id in samples.image_ids]
    missing = missing_here(folder, names)

    # A GPU makes mirror images itself, and half as much has to be copied there.
    mirrored = config.flip and not runtime.computes_behind

    def prepare(batch: Batch) -> tuple[Batch, list[Tensor]]:
        inputs = scaled_inputs(batch.images, config.scales)
        return batch, [runtime.pinned(with_mirror_images(scaled) if mirrored else scaled) for scaled in inputs]

    def start(batch_and_inputs: tuple[Batch, list[Tensor]]) -> tuple[Batch, Callable[[], list[Tensor]]]:
        batch, inputs = batch_and_inputs
        with of_image(*batch.image_ids):
            return batch, start_cams(network, inputs, config.flip, runtime, mirrored)

    def write(started: tuple[Batch, Callable[[], list[Tensor]]]) -> int:
        batch, cams = started[0], started[1]()
        for row, image_id in enumerate(batch.image_ids):
            maps.write(image_id, [cam[row] for cam in cams], (batch.images.shape[-2], batch.images.shape[-1]))
        return len(batch.image_ids)

    # Writers of their own: they wait for the disk, and what is to be decoded would wait behind them.
    with runtime.host_threads(host_threads) as readers, runtime.host_threads(host_threads) as writers:
        decoded = readers.ahead(samples.__getitem__, missing)
        prepared = readers.ahead(prepare, _batches(decoded, batch_size, runtime))
        written = (image for count in writers.ahead(write, map(start, prepared)) for image in range(count))
        for _ in progress(written, total=len(missing), desc=f"attention of {samples.split}"):
            pass
    wait_for_all()
    release_freed_memory()
    return maps


@dataclass(frozen=True)
class Batch:
    """Images of one size: uint8 (B, 3, H, W), and their names."""

    image_ids: list[str]
    images: Tensor


def _batches(decoded: Iterable[Sample], batch_size: int, runtime: Runtime) -> Iterator[Batch]:
    """Neighbours of one size."""
    most_pixels = sys.maxsize if runtime.computes_behind else batch_size * SMALL_IMAGE
    for neighbours in same_size(decoded, lambda sample: sample.image, batch_size, most_pixels):
        images = torch.stack([sample.image for sample in neighbours])
        yield Batch([sample.image_id for sample in neighbours], images)


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
        rule: FusionRule | Fusion = "sum",
        scales: Sequence[float] | None = None,
        cached: bool = False,
        denoised: bool = True,
        saliency_weight: float = 0.0,
    ) -> None:
        self.maps, self.rule, self.scales, self.cached, self.denoised = maps, rule, scales, cached, denoised
        self.image_ids, self.image_labels = samples.image_ids, samples.image_labels
        self.saliency, self.saliency_weight = SaliencyMaps(samples), saliency_weight
        self._cache: dict[int, PresentMaps] = {}

    def __len__(self) -> int:
        return len(self.image_ids)

    def __getitem__(self, index: int) -> Tensor:  # type: ignore[override]
        return self.present(index).whole()

    def present(self, index: int) -> PresentMaps:
        """An image's maps without those that are zero; without denoising these are the maps of all classes."""
        if index in self._cache:
            return self._cache[index]
        label = self.image_labels[index] if self.denoised else torch.ones_like(self.image_labels[index])
        classes = label.nonzero()[:, 0]
        cams, size = self.maps.read(self.image_ids[index], self.scales)
        # Some rules need to know which scales these are.
        with of_image(self.image_ids[index]):
            maps = fuse_present(cams, size, classes, self.rule, self.scales or self.maps.scales)
        if self.saliency_weight and len(classes):
            maps = blend_saliency(maps, self.saliency[index], self.saliency_weight)
        if not self.cached:
            return PresentMaps(len(label), classes, maps)
        # In half precision; a network may leave a class of the label without any score.
        halves = maps.half()
        found = halves.flatten(1).any(dim=1)
        self._cache[index] = PresentMaps(len(label), classes[found], halves[found])
        return self._cache[index]


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

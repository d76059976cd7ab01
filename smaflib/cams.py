"""Stage 2: class attention maps of one image at several scales, and their fusion into one.

A network looks for objects of the size it was trained on. Shown larger, small objects come into its reach; shown
smaller, large ones do. So the maps of different scales are wrong in different places, and their fusion is better than
each (section 3.2 of the paper).
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from smaflib.config import AttentionConfig, FusionRule
from smaflib.data.sample import Samples
from smaflib.data.transforms import normalize, resize_image
from smaflib.errors import DataError
from smaflib.files import load_arrays, save_arrays
from smaflib.models.networks import AttentionNetwork
from smaflib.runtime import Runtime, device_of, progress

FUSION_RULES: tuple[FusionRule, ...] = get_args(FusionRule)

PEAK_EPSILON = 0.5e-5
"""Added to a peak before dividing by it: half the reference's 1e-5, which it adds to sums over two flips, not means."""


@torch.no_grad()
def multi_scale_cams(
    network: AttentionNetwork,
    image: Tensor,
    scales: Sequence[float],
    flip: bool = True,
    runtime: Runtime | None = None,
) -> list[Tensor]:
    """Class attention maps of an image at several scales.

    Args:
        network: teacher or student; put in eval mode.
        image: uint8 (3, H, W), or (B, 3, H, W) for images of one size.
        scales: factors of the image's size, resized bicubically.
        flip: also look at the mirror image, and average.
        runtime: precision; None: float32. The device is the network's.

    Returns:
        Per scale (K, h_s, w_s), or (B, K, h_s, w_s): non-negative float32 on the CPU, at the network's stride.

    Source: the reference code's multi-scale inference; section 3.2 of the paper.
    """
    network.eval()
    images = image if image.dim() == 4 else image[None]
    height, width = images.shape[-2:]
    cams = []
    for scale in scales:
        size = (max(1, round(height * scale)), max(1, round(width * scale)))
        inputs = normalize(torch.stack([resize_image(picture, size) for picture in images])).to(device_of(network))
        with runtime.autocast() if runtime else torch.autocast("cpu", enabled=False):
            maps = network.attention(network(torch.cat([inputs, inputs.flip(-1)]) if flip else inputs).float())
        if flip:
            plain, mirrored = maps.chunk(2)
            maps = (plain + mirrored.flip(-1)) / 2
        cams.append(maps.cpu() if image.dim() == 4 else maps[0].cpu())
    return cams


def fuse_cams(
    cams: Sequence[Tensor],
    size: tuple[int, int],
    rule: FusionRule = "sum",
    scales: Sequence[float] | None = None,
    weights: Sequence[float] | None = None,
) -> Tensor:
    """Fuse one image's class attention maps over scales and bring each class to a peak of 1.

    ``sum`` is the reference's rule: add the maps as they are. ``mean`` brings every scale to a peak of 1 first, so that
    none outweighs the others. ``max`` keeps the strongest response. ``size_adaptive`` weighs the scales by the
    object's size (:func:`size_adaptive_weights`).

    Args:
        cams: per scale (K, h_s, w_s), non-negative, flips already undone.
        size: (H, W) of the original image, in pixels.
        rule: how the scales are joined.
        scales: the scale of each map; only ``size_adaptive`` needs them.
        weights: factor of each map, not negative, on top of what the rule does; None: all alike, as in the paper.

    Returns:
        (K, H, W) in [0, 1]; an all-zero class stays zero.

    Raises:
        ValueError: if ``cams`` is empty, the maps disagree on K, ``size_adaptive`` does not get its scales, or the
            weights do not fit.

    Source: section 3.2 of the paper; the reference code's sum over scales and flips.
    """
    if not cams or len({len(cam) for cam in cams}) != 1:
        raise ValueError(f"fuse_cams needs maps of one set of classes, got {[tuple(cam.shape) for cam in cams]}")
    if rule == "size_adaptive" and len(scales or ()) != len(cams):
        raise ValueError(f"the size_adaptive rule needs the scale of each of the {len(cams)} maps, got {scales}")
    upsampled = torch.stack([_upsample(cam, size) for cam in cams])  # (S, K, H, W)
    if rule == "mean":
        upsampled = _peak_at_one(upsampled)
    if weights is not None:
        upsampled = upsampled * _checked_weights(weights, len(cams))[:, None, None, None]
    if rule == "sum":
        fused = upsampled.sum(dim=0)
    elif rule == "max":
        fused = upsampled.amax(dim=0)
    elif rule == "mean":
        fused = upsampled.mean(dim=0)
    elif rule == "size_adaptive":
        # The sum of all scales is a good enough guess of the extent to choose among them.
        extent = (_peak_at_one(upsampled.sum(dim=0)) > 0.5).float().mean(dim=(1, 2)).sqrt()  # (K,)
        of_size = size_adaptive_weights(extent, torch.tensor(list(scales or ())))  # (S, K)
        fused = (of_size[..., None, None] * upsampled).sum(dim=0)
    else:
        raise ValueError(f"there is no fusion rule {rule!r}; there are {', '.join(FUSION_RULES)}")
    return _peak_at_one(fused)


def _checked_weights(weights: Sequence[float], num_maps: int) -> Tensor:
    if len(weights) != num_maps or min(weights) < 0 or not any(weights):
        raise ValueError(
            f"weights must be {num_maps} numbers of which none is negative and one is above 0, got {list(weights)}"
        )
    return torch.tensor(list(weights), dtype=torch.float32)


def _peak_at_one(maps: Tensor) -> Tensor:  # (..., H, W) -> (..., H, W)
    return maps / (maps.amax(dim=(-2, -1), keepdim=True) + PEAK_EPSILON)


def _upsample(cam: Tensor, size: tuple[int, int]) -> Tensor:  # (K, h, w) -> (K, H, W)
    return F.interpolate(cam[None].float(), size=size, mode="bilinear", align_corners=False)[0]


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
        classes: Tensor | None = None,
    ) -> Tensor:
        """(K, H, W) in [0, 1], of all scales or some, of all classes or those of the numbers in ``classes``."""
        chosen = self.scales if scales is None else scales
        cams, size = self.read(image_id, chosen)
        return fuse_cams([cam if classes is None else cam[classes] for cam in cams], size, rule, chosen)


def write_attention_maps(
    network: AttentionNetwork,
    samples: Samples,
    folder: Path,
    config: AttentionConfig,
    runtime: Runtime,
    batch_size: int = 4,
) -> AttentionMaps:
    """Attention maps of a whole split; images that have theirs already are skipped.

    Args:
        network: teacher or student.
        samples: the split.
        folder: takes one ``.npz`` per image.
        config: scales and flip.
        runtime: device and precision.
        batch_size: images of one size that are looked at together.
    """
    maps = AttentionMaps(folder, config.scales)
    runtime.place(network)
    missing = [index for index, image_id in enumerate(samples.image_ids) if not maps.path(image_id).is_file()]
    bar = progress(_same_size_batches(samples, missing, batch_size), total=None, desc=f"attention of {samples.split}")
    for batch in bar:
        images = torch.stack([image for _, image in batch])
        cams = multi_scale_cams(network, images, config.scales, config.flip, runtime)
        for row, (image_id, image) in enumerate(batch):
            height, width = image.shape[-2:]
            maps.write(image_id, [cam[row] for cam in cams], (height, width))
    return maps


def _same_size_batches(samples: Samples, indices: Sequence[int], most: int) -> Iterator[list[tuple[str, Tensor]]]:
    """Neighbours of equal size, up to ``most`` together."""
    batch: list[tuple[str, Tensor]] = []
    for index in indices:
        sample = samples[index]
        if batch and (len(batch) == most or batch[0][1].shape != sample.image.shape):
            yield batch
            batch = []
        batch.append((sample.image_id, sample.image))
    if batch:
        yield batch


# --- the size-adaptive rule ---------------------------------------------------------------------------------------

REFERENCE_EXTENT = 0.4
"""Share of the image's side that an object has at which scale 1 serves best."""

SIZE_SHARPNESS = 1.0
"""How fast the weight of a scale falls with its distance (in octaves) from the scale that serves best."""


def size_adaptive_weights(extent: Tensor, scales: Tensor) -> Tensor:
    """Weights of the scales for an object of a given extent: the larger the object, the smaller the scale.

    Args:
        extent: (...) square root of the object's share of the image's area, in (0, 1].
        scales: (S,) relative to the original size.

    Returns:
        (S, ...) summing to 1 over the scales.
    """
    best = torch.log2(REFERENCE_EXTENT / extent.clamp(min=1e-3))
    distance = torch.log2(scales).view(-1, *[1] * extent.dim()) - best
    return torch.softmax(-SIZE_SHARPNESS * distance.square(), dim=0)

"""Stage 2: class attention maps of one image at several scales, and their fusion into one.

A network finds objects of about the size that it was trained on. Enlarging the image brings small objects into that
range, shrinking it brings large ones. Maps of different scales err in different places, so their fusion is better than
any one of them (section 3.2 of the paper).
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smaflib.config import closest_to_one
from smaflib.data.views import views_of
from smaflib.plugins import load_custom
from smaflib.runtime import Runtime, device_of
from smaflib.sources import AttentionSource, Classes, as_source
from smaflib.sources.caa import refine_by_affinity
from smaflib.sources.correlation import correlate

PEAK_EPSILON = 0.5e-5
"""Added to a peak before dividing by it: half the reference's 1e-5, which it adds to sums over two flips, not means."""


def multi_scale_cams(
    network: nn.Module,
    image: Tensor,
    scales: Sequence[float],
    flip: bool = True,
    runtime: Runtime = Runtime(),
    classes: Sequence[int] | None = None,
    caa: float | None = None,
    correlation: float | None = None,
) -> list[Tensor]:
    """Class attention maps of an image at several scales.

    Args:
        network: teacher, student, any module with ``attention``, or a source; put in eval mode.
        image: uint8 (3, H, W).
        scales: factors of the image's size, resized bicubically.
        flip: average with the maps of the mirror image.
        runtime: precision; the device is the network's.
        classes: numbers of the classes asked for; gradients, transformers and CLIP make maps of these alone.
        caa: refine the maps by the source's affinity (:func:`~smaflib.sources.caa.refine_by_affinity`).
        correlation: exponent; refine them by :func:`~smaflib.sources.correlation.correlate`.

    Returns:
        Per scale (K, h_s, w_s): non-negative float32 on the CPU, at the network's stride; with ``correlation`` all of
        the size of the scale closest to 1.

    Raises:
        ValueError: if the source needs ``classes`` and they are not given.

    Source: the reference code's multi-scale inference; section 3.2 of the paper.

    Example:
        >>> from smaflib.models.pretrained import pretrained_network
        >>> image = torch.zeros(3, 64, 64, dtype=torch.uint8)
        >>> cams = multi_scale_cams(pretrained_network("teacher"), image, scales=(0.5, 1.0))
        >>> [tuple(cam.shape) for cam in cams]
        [(6, 4, 4), (6, 8, 8)]
    """
    source = as_source(network)
    if classes is None and source.needs_classes:
        raise ValueError(
            f"{type(source).__name__} only makes maps of the classes asked for; pass classes=[0] or others"
        )
    views = [view[None] for view in views_of(image, scales, source.patch)]
    cams = attend_views(source, views, scales, [list(classes or ())], flip, runtime, caa, correlation)
    return [maps[0] for maps in cams]


def attend_views(
    source: AttentionSource,
    views: Sequence[Tensor],
    scales: Sequence[float],
    classes: Classes,
    flip: bool,
    runtime: Runtime,
    caa: float | None,
    correlation: float | None,
) -> list[Tensor]:
    """Maps of a batch at every scale: (B, 3, H_s, W_s), normalised, to (B, K, h_s, w_s) on the CPU."""
    cams = [class_attention(source, images, classes, flip, runtime, caa) for images in views]
    if correlation is not None:
        at = [*scales].index(closest_to_one(scales))
        with torch.no_grad(), runtime.autocast():
            features = source.features(views[at].to(device_of(source)))
        cams = correlate(cams, (cams[at].shape[-2], cams[at].shape[-1]), features, correlation)
    return [maps.cpu() for maps in cams]


def class_attention(
    source: AttentionSource,
    images: Tensor,
    classes: Classes,
    flip: bool = True,
    runtime: Runtime = Runtime(),
    caa: float | None = None,
) -> Tensor:
    """One forward pass: float32 (B, 3, H, W), normalised, to (B, K, h, w), non-negative, on the source's device."""
    source.eval()
    images = images.to(device_of(source))
    with torch.set_grad_enabled(source.needs_gradients), runtime.autocast():
        if flip:
            images, classes = torch.cat([images, images.flip(-1)]), [*classes, *classes]
        maps, affinity = source.attend(images, classes)
    maps = maps.detach().float()
    if flip:
        plain, mirrored = maps.chunk(2)
        maps = (plain + mirrored.flip(-1)) / 2
    if caa is not None:
        if affinity is None:
            raise ValueError(f"caa needs the affinity of patches, which {type(source).__name__} does not know")
        maps = torch.stack([refine_by_affinity(*each, caa) for each in zip(maps, affinity.detach(), strict=False)])
    return maps


Fusion = Callable[[Tensor, Tensor], Tensor]
"""Joins one image's maps over scales: maps (S, K, H, W) at the image's size and scales (S,) to (K, H, W).

Maps and result are non-negative and finite; S may be 1 and a class may be zero everywhere. Each class must be joined
independently: only the classes of the image label are fused, one or two of eighty.
"""


def fuse_cams(
    cams: Sequence[Tensor],
    size: tuple[int, int],
    rule: str | Fusion = "sum",
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
        rule: one of :data:`FUSIONS`, ``package.module:attribute``, or a function such as those.
        scales: scale of each map; ``size_adaptive`` and custom rules need them.
        weights: non-negative factor of each map, before the rule; None: all 1, as in the paper.

    Returns:
        (K, H, W) in [0, 1]; an all-zero class stays zero.

    Raises:
        ValueError: if the rule lacks its scales.

    Source: section 3.2 of the paper; the reference code's sum over scales and flips.

    Example:
        >>> cams = [torch.tensor([[[0.0, 2.0]]]), torch.tensor([[[1.0, 2.0]]])]
        >>> fuse_cams(cams, size=(1, 2)).round(decimals=3).tolist()
        [[[0.25, 1.0]]]
    """
    if rule not in ("sum", "mean", "max") and len(scales or ()) != len(cams):
        raise ValueError(f"the rule {rule} needs the scale of each of the {len(cams)} maps, got {scales}")
    maps = torch.stack([_upsample(cam, size) for cam in cams])  # (S, K, H, W)
    if rule == "mean":
        maps = peak_at_one(maps)
    if weights is not None:
        maps = maps * torch.tensor(list(weights), dtype=torch.float32).view(-1, 1, 1, 1)
    fuse = (FUSIONS.get(rule) or load_custom(rule)) if isinstance(rule, str) else rule
    return peak_at_one(fuse(maps, torch.tensor(list(scales or ()))))


def fusion_rules(rule: str) -> tuple[str, ...]:
    """The names of the library's rules, and that of a config if it is custom: what is compared and offered."""
    return tuple(dict.fromkeys([*FUSIONS, rule]))


def peak_at_one(maps: Tensor) -> Tensor:  # (..., H, W) -> (..., H, W)
    """Divide each map by its maximum; an all-zero map stays zero."""
    return maps / (maps.amax(dim=(-2, -1), keepdim=True) + PEAK_EPSILON)


def at_size(cam: Tensor, size: tuple[int, int]) -> Tensor:
    """One class's map of one scale, (h, w), at the image's size (H, W) with a peak of 1, for display."""
    return peak_at_one(_upsample(cam[None], size))[0]


def _upsample(cam: Tensor, size: tuple[int, int]) -> Tensor:  # (K, h, w) -> (K, H, W)
    return F.interpolate(cam[None].float(), size=size, mode="bilinear", align_corners=False)[0]


REFERENCE_EXTENT = 0.4  # of an object, as a share of the image's side, that scale 1 serves best
SIZE_SHARPNESS = 1.0  # how fast the weight of a scale falls with its distance, in octaves, from the best one


def size_adaptive_weights(extent: Tensor, scales: Tensor) -> Tensor:
    """Weights of the scales for an object of a given extent: the larger the object, the smaller the scale.

    From the square root of the object's share of the image's area, (...) in (0, 1], and the scales (S,), to (S, ...)
    summing to 1 over the scales.

    Example:
        >>> size_adaptive_weights(torch.tensor(0.4), torch.tensor([0.5, 1.0, 2.0]))
        tensor([0.2119, 0.5761, 0.2119])
    """
    best = torch.log2(REFERENCE_EXTENT / extent.clamp(min=1e-3))
    distance = torch.log2(scales).view(-1, *[1] * extent.dim()) - best
    return torch.softmax(-SIZE_SHARPNESS * distance.square(), dim=0)


def _size_adaptive_sum(maps: Tensor, scales: Tensor) -> Tensor:  # (S, K, H, W) -> (K, H, W)
    # The sum of all scales is a good enough estimate of the extent to choose among them.
    extent = (peak_at_one(maps.sum(dim=0)) > 0.5).float().mean(dim=(1, 2)).sqrt()  # (K,)
    weights = size_adaptive_weights(extent, scales)  # (S, K)
    return (weights[..., None, None] * maps).sum(dim=0)


FUSIONS: dict[str, Fusion] = {
    "sum": lambda maps, scales: maps.sum(dim=0),
    "mean": lambda maps, scales: maps.mean(dim=0),  # fuse_cams brings the scales to a peak of 1 first
    "max": lambda maps, scales: maps.amax(dim=0),
    "size_adaptive": _size_adaptive_sum,
}

"""Stage 2: class attention maps of one image at several scales, and their fusion into one.

A network finds objects of about the size that it was trained on. Enlarged, small objects come into its reach; shrunk,
large ones do. So the maps of different scales are wrong in different places, and their fusion is better than
each (section 3.2 of the paper).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smaflib.config import FusionRule
from smaflib.data.transforms import normalize, resize_to_each, scaled_size
from smaflib.models.networks import attention_of
from smaflib.plugins import FUSION, calling, checked_maps, load, own_name
from smaflib.runtime import Runtime, device_of, start_copy

FUSION_RULES: tuple[FusionRule, ...] = FUSION.built_in
"""The library's own."""

PEAK_EPSILON = 0.5e-5
"""Added to a peak before dividing by it: half the reference's 1e-5, which it adds to sums over two flips, not means."""


def multi_scale_cams(
    network: nn.Module,
    image: Tensor,
    scales: Sequence[float],
    flip: bool = True,
    runtime: Runtime | None = None,
) -> list[Tensor]:
    """Class attention maps of an image at several scales.

    Args:
        network: teacher, student or any module with ``attention``; put in eval mode.
        image: uint8 (3, H, W), or (B, 3, H, W) for images of one size.
        scales: factors of the image's size, resized bicubically.
        flip: also take a forward pass of the mirror image, and average.
        runtime: precision; None: float32. The device is the network's.

    Returns:
        Per scale (K, h_s, w_s), or (B, K, h_s, w_s): non-negative float32 on the CPU, at the network's stride.

    Source: the reference code's multi-scale inference; section 3.2 of the paper.

    Example:
        >>> from smaflib.models.pretrained import pretrained_network
        >>> image = torch.zeros(3, 64, 64, dtype=torch.uint8)
        >>> cams = multi_scale_cams(pretrained_network("teacher"), image, scales=(0.5, 1.0))
        >>> [tuple(cam.shape) for cam in cams]
        [(6, 4, 4), (6, 8, 8)]
    """
    images = image if image.dim() == 4 else image[None]
    cams = cams_of_inputs(network, scaled_inputs(images, scales), flip, runtime)
    return cams if image.dim() == 4 else [cam[0] for cam in cams]


def scaled_inputs(images: Tensor, scales: Sequence[float]) -> list[Tensor]:
    """Images as the network takes them, once per scale: the host's part of :func:`multi_scale_cams`.

    Args:
        images: uint8 (B, 3, H, W).
        scales: factors of their size; bicubic.

    Returns:
        Per scale float32 (B, 3, H_s, W_s), normalised.
    """
    sizes = [scaled_size(images.shape[-2:], scale) for scale in scales]
    resized = [resize_to_each(image, sizes) for image in images]
    return [normalize(torch.stack(of_a_scale)) for of_a_scale in zip(*resized, strict=True)]


def cams_of_inputs(
    network: nn.Module, inputs: Sequence[Tensor], flip: bool = True, runtime: Runtime | None = None
) -> list[Tensor]:
    """The network's part of :func:`multi_scale_cams`.

    Args:
        network: as there.
        inputs: as of :func:`scaled_inputs`.
        flip: as there.
        runtime: as there.

    Returns:
        Per scale (B, K, h_s, w_s), non-negative float32 on the CPU.
    """
    return start_cams(network, inputs, flip, runtime)()


@torch.no_grad()
def start_cams(
    network: nn.Module,
    inputs: Sequence[Tensor],
    flip: bool = True,
    runtime: Runtime | None = None,
    mirrored: bool = False,
) -> Callable[[], list[Tensor]]:
    """:func:`cams_of_inputs` in two: a GPU is told what to compute, and what is returned waits for the maps.

    Arguments as there; ``mirrored``: the inputs have come through :func:`with_mirror_images` already.
    """
    network.eval()
    cams = []
    for scaled in inputs:
        scaled = scaled.to(device_of(network), non_blocking=True)
        with runtime.autocast() if runtime else torch.autocast("cpu", enabled=False):
            logits = network(with_mirror_images(scaled) if flip and not mirrored else scaled)
            maps = attention_of(network, logits.float())
        if flip:
            plain, of_mirror_images = maps.chunk(2)
            maps = (plain + of_mirror_images.flip(-1)) / 2
        cams.append(maps)
    return start_copy(cams)  # after the last scale: a GPU has all of them to work on


def with_mirror_images(images: Tensor) -> Tensor:  # (B, 3, H, W) -> (2B, 3, H, W)
    """Images, and after them each one's mirror image."""
    return torch.cat([images, images.flip(-1)])


class Fusion(Protocol):
    """A fusion rule of somebody's own: joins one image's class attention maps over scales.

    Each class must be joined by itself: the chain fuses the classes of the image label alone, of eighty one or two.

    Args:
        maps: float32 (S, K, H, W), non-negative and finite, at the image's size; a class may be zero all over.
        scales: float32 (S,), of the maps; S may be 1.

    Returns:
        float (K, H, W), non-negative and finite; :func:`fuse_cams` brings each class to a peak of 1.
    """

    def __call__(self, maps: Tensor, scales: Tensor, /) -> Tensor: ...


def fusion_rules(rule: FusionRule) -> tuple[FusionRule, ...]:
    """The library's rules, and the one that a config names if it is somebody's own: what is compared and offered."""
    return FUSION_RULES if rule in FUSION_RULES else (*FUSION_RULES, rule)


def fuse_cams(
    cams: Sequence[Tensor],
    size: tuple[int, int],
    rule: FusionRule | Fusion = "sum",
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
        rule: how the scales are joined; a name as in a config, or a function (:class:`Fusion`).
        scales: the scale of each map; ``size_adaptive`` and rules of somebody's own need them.
        weights: factor of each map, not negative, on top of what the rule does; None: all alike, as in the paper.

    Returns:
        (K, H, W) in [0, 1]; an all-zero class stays zero.

    Raises:
        ValueError: if ``cams`` is empty, the maps disagree on K, a rule does not get its scales, there is no such rule,
            or the weights do not fit.
        PluginError: if a rule of somebody's own does not do what it must.

    Source: section 3.2 of the paper; the reference code's sum over scales and flips.

    Example:
        >>> cams = [torch.tensor([[[0.0, 2.0]]]), torch.tensor([[[1.0, 2.0]]])]
        >>> fuse_cams(cams, size=(1, 2)).round(decimals=3).tolist()
        [[[0.25, 1.0]]]
        >>> fuse_cams(cams, (1, 2), lambda maps, scales: maps.amin(dim=0), scales=(0.5, 1.0)).round(decimals=3).tolist()
        [[[0.0, 1.0]]]
    """
    if not cams or len({len(cam) for cam in cams}) != 1:
        raise ValueError(f"fuse_cams needs maps of one set of classes, got {[tuple(cam.shape) for cam in cams]}")
    _check_rule(rule, scales, len(cams))
    upsampled = torch.stack([_upsample(cam, size) for cam in cams])  # (S, K, H, W)
    if rule == "mean":
        upsampled = peak_at_one(upsampled)
    if weights is not None:
        upsampled = upsampled * _checked_weights(weights, len(cams))[:, None, None, None]
    return peak_at_one(_join(upsampled, rule, torch.tensor(list(scales or ()))))


def _check_rule(rule: FusionRule | Fusion, scales: Sequence[float] | None, num_maps: int) -> None:
    if isinstance(rule, str) and rule not in FUSION_RULES and not FUSION.is_own(rule):
        raise ValueError(
            f"there is no fusion rule {rule!r}; there are {', '.join(FUSION_RULES)}, or package.module:attribute"
        )
    if rule not in ("sum", "mean", "max") and len(scales or ()) != num_maps:
        name = rule if isinstance(rule, str) else own_name(rule)
        raise ValueError(f"the {name} rule needs the scale of each of the {num_maps} maps, got {scales}")


def _join(maps: Tensor, rule: FusionRule | Fusion, scales: Tensor) -> Tensor:  # (S, K, H, W) -> (K, H, W)
    if rule == "sum":
        return maps.sum(dim=0)
    if rule == "max":
        return maps.amax(dim=0)
    if rule == "mean":
        return maps.mean(dim=0)
    if rule == "size_adaptive":
        # The sum of all scales is a good enough guess of the extent to choose among them.
        extent = (peak_at_one(maps.sum(dim=0)) > 0.5).float().mean(dim=(1, 2)).sqrt()  # (K,)
        of_size = size_adaptive_weights(extent, scales)  # (S, K)
        return (of_size[..., None, None] * maps).sum(dim=0)
    function: Fusion = load(FUSION, rule) if isinstance(rule, str) else rule
    what = f"the fusion rule {rule if isinstance(rule, str) else own_name(rule)}"
    with calling(what):
        return checked_maps(what, function(maps, scales), tuple(maps.shape[1:]), "(K, H, W)")


def _checked_weights(weights: Sequence[float], num_maps: int) -> Tensor:
    if len(weights) != num_maps or min(weights) < 0 or not any(weights):
        raise ValueError(
            f"weights must be {num_maps} numbers of which none is negative and one is above 0, got {list(weights)}"
        )
    return torch.tensor(list(weights), dtype=torch.float32)


def peak_at_one(maps: Tensor) -> Tensor:  # (..., H, W) -> (..., H, W)
    """Divide each map by its maximum; an all-zero map stays zero.

    Example:
        >>> peak_at_one(torch.tensor([[2.0, 4.0]])).round(decimals=3).tolist()
        [[0.5, 1.0]]
    """
    return maps / (maps.amax(dim=(-2, -1), keepdim=True) + PEAK_EPSILON)


def at_size(cam: Tensor, size: tuple[int, int]) -> Tensor:
    """One class's map of one scale, (h, w), at the image's size (H, W) and with its peak at 1: to be shown."""
    return peak_at_one(_upsample(cam[None], size))[0]


def _upsample(cam: Tensor, size: tuple[int, int]) -> Tensor:  # (K, h, w) -> (K, H, W)
    return F.interpolate(cam[None].float(), size=size, mode="bilinear", align_corners=False)[0]


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

    Example:
        >>> size_adaptive_weights(torch.tensor(0.4), torch.tensor([0.5, 1.0, 2.0]))
        tensor([0.2119, 0.5761, 0.2119])
    """
    best = torch.log2(REFERENCE_EXTENT / extent.clamp(min=1e-3))
    distance = torch.log2(scales).view(-1, *[1] * extent.dim()) - best
    return torch.softmax(-SIZE_SHARPNESS * distance.square(), dim=0)

"""Feature extractors from timm: any convolutional model by name, at an output stride of 8, 16 or 32."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Sequence
from typing import Any

import timm
import torch
from torch import Tensor, nn

from smaflib.config import NAMED_WEIGHTS, ModelConfig
from smaflib.data.transforms import IMAGENET_MEAN, IMAGENET_STD, renormalization
from smaflib.errors import ConfigError
from smaflib.models.weights.files import check_weights, read_weights
from smaflib.models.weights.hub import fetch_timm_weights
from smaflib.models.weights.sources import find_weights

PREFIX = "timm/"
"""What a config puts before the name of a timm model."""


class TimmBackbone(nn.Module):
    """Feature maps of a convolutional timm model, by timm's own feature extractor.

    Images come with ImageNet's mean and standard deviation, as for every network here; a model that was trained with
    others gets its own, by a scale and a shift per channel that are stored with the weights.

    Attributes:
        num_features: channels C of the maps.
        skip_channels: channels at stride 4.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, model: Any, mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD) -> None:
        super().__init__()
        scale, shift = renormalization(mean, std)
        self.register_buffer("scale", scale)
        self.register_buffer("shift", shift)
        self.model = model
        self.skip_channels, self.num_features = model.feature_info.channels()

    def forward(self, images: Tensor) -> Tensor:  # (B, 3, H, W) -> (B, C, h, w)
        return self.features(images)[1]

    def features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features at stride 4 and at the output stride."""
        early, late = self.model(images * self.scale + self.shift)
        return early, late

    def early_layers(self) -> list[nn.Module]:
        """What ``model.freeze_early`` freezes: up to stride 4; nothing in HRNet, where timm names no such module."""
        # timm names the module that ends at stride 4; what is registered before it runs before it.
        wanted = _extractor_name(self.model.feature_info.module_name()[0])
        ends = [name for name, _ in self.model.named_modules() if _extractor_name(name) == wanted]
        if not ends:
            return []
        layers, parent = [], self.model
        for part in ends[0].split("."):
            children = dict(parent.named_children())
            layers += list(children.values())[: list(children).index(part)]
            parent = children[part]
        return [*layers, parent]


def build_timm_backbone(config: ModelConfig) -> TimmBackbone:
    """Make the backbone of a config whose ``backbone`` is ``timm/`` and the name of a model, with its initial weights.

    Its own mean and std belong to timm's weights and to files that were trained with them. Those of an installed
    package, and files whose first batch norm says so, take ImageNet's.

    Raises:
        ConfigError: if there is no such model, none with convolutional features at this output stride, or no weights.
        WeightsError: if the weights do not fit.
    """
    options = _extractor_options(config.backbone, config.output_stride)
    name, weights = config.backbone.removeprefix(PREFIX), config.weights
    model = timm.create_model(name, **options)
    own: Any = model.pretrained_cfg
    mean, std = own["mean"], own["std"]
    if weights == "pretrained":
        _fill_extractor(model, _own_weights(config.backbone), config.backbone, source=weights)
    elif weights is not None:
        state = find_weights(weights, config.backbone, config.allow_mask_weights)
        _fill_extractor(model, state, config.backbone, source=weights)
        if weights in NAMED_WEIGHTS or _expects_imagenet_statistics(model, mean, std):
            mean, std = IMAGENET_MEAN, IMAGENET_STD
    return TimmBackbone(model, mean, std)


@functools.cache  # a run rebuilds its networks for every stage, and this builds three without values
def _extractor_options(backbone: str, output_stride: int) -> dict[str, Any]:
    """Arguments for ``timm.create_model`` that give features at stride 4 and at the output stride.

    Raises:
        ConfigError: if there is no such model, or none with convolutional features at this stride.
    """
    name = backbone.removeprefix(PREFIX)
    architecture = name.partition(".")[0]
    if not (timm.models.is_model_pretrained(name) or (timm.is_model(name) and name == architecture)):
        names = timm.list_pretrained(f"{architecture}.*") if timm.is_model(architecture) else timm.list_models()
        near = ", ".join(f"{PREFIX}{match}" for match in difflib.get_close_matches(name, names, n=3, cutoff=0.0))
        raise ConfigError(f"model.backbone is {backbone!r}, but timm has no model of that name; the nearest are {near}")
    reductions = [info["reduction"] for info in getattr(timm_reference(backbone), "feature_info", [])]
    at_4 = [index for index, reduction in enumerate(reductions) if reduction == 4]
    options: dict[str, Any] = {"features_only": True, "out_indices": (*at_4[-1:], len(reductions) - 1)}
    stride = _stride(name, options) if at_4 else None
    if stride is None:
        raise ConfigError(
            f"model.backbone {backbone!r} has no convolutional features: maps with a cell for every 4, 8 ... pixels of "
            "an image of any size; choose a ResNet, RegNet, EfficientNet, MobileNet or ConvNeXt"
        )
    if stride != output_stride:
        options["output_stride"] = output_stride
        if _stride(name, options) != output_stride:
            raise ConfigError(
                f"timm cannot give model.backbone {backbone!r} the output stride {output_stride}; set "
                f"model.output_stride={stride}, its own, or choose a ResNet, RegNet, EfficientNet or ConvNeXt"
            )
    return options


def timm_reference(backbone: str) -> nn.Module:
    """The whole classification model without values, for its names and shapes."""
    with torch.device("meta"):
        return timm.create_model(backbone.removeprefix(PREFIX))


def _stride(name: str, options: dict[str, Any]) -> int | None:
    """The output stride of a feature extractor, found without arithmetic.

    None: its features are no (B, C, h, w) with cells of one size for an image that is no square.
    """
    try:
        with torch.device("meta"):
            model: Any = timm.create_model(name, **options)
            features = model.eval()(torch.empty(1, 3, 96, 160))
    except Exception:  # families refuse in their own ways: an unknown argument, an assertion, a wrong shape
        return None
    info = model.feature_info
    strides: list[int] = info.reduction()
    expected = [(1, width, 96 // step, 160 // step) for width, step in zip(info.channels(), strides, strict=True)]
    transformer = type(model).__name__ == "FeatureGetterNet"  # what timm takes features of transformers with
    return strides[-1] if not transformer and [tuple(feature.shape) for feature in features] == expected else None


def _own_weights(backbone: str) -> dict[str, Tensor]:
    """The weights that timm has of a model, downloaded unless they are in the cache."""
    published = timm.models.get_pretrained_cfg(backbone.removeprefix(PREFIX))
    if published is None or not published.has_weights:
        raise ConfigError(f"model.weights is 'pretrained', but timm has no weights of {backbone}; give a file or null")
    return read_weights(fetch_timm_weights(backbone, published))


def _extractor_name(name: str) -> str:
    """A name in timm's model or its feature extractor without what differs: dots or underscores, ``body`` before."""
    return name.replace(".", "_").removeprefix("body_")


def _fill_extractor(model: nn.Module, state: dict[str, Tensor], backbone: str, source: str) -> None:
    """Copy weights under timm's names into a feature extractor; what follows the features may be missing."""
    reference, own = timm_reference(backbone), model.state_dict()
    inside = {_extractor_name(name): name for name in own}
    names = list(reference.state_dict())
    after = tuple(name for name in names if _extractor_name(name) not in inside)
    check_weights(reference, state, backbone, source, optional=after)
    given = {inside[_extractor_name(name)]: state[name] for name in names if name in state and name not in after}
    model.load_state_dict(own | given)


def _expects_imagenet_statistics(model: nn.Module, mean: Sequence[float], std: Sequence[float]) -> bool:
    """Whether a model was trained on images with ImageNet's mean and std rather than with these, its own.

    A file does not say so, but its first batch norm does. It holds the mean of what the first convolution gave: the sum
    of the kernel times the mean colour, which is 0 where that colour was taken off. In standard deviations, the median
    channel of EfficientNet-Lite0 and 2 is 0.03 from what is right, and 0.08 to 0.12 from the other.
    """
    layers = (layer for layer in model.modules() if isinstance(layer, nn.Conv2d | nn.BatchNorm2d))
    convolution, norm = next(layers), next(layers)
    _, mean_color = renormalization(mean, std)  # in the model's own normalisation
    if not (isinstance(convolution, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d) and mean_color.any()):
        return False
    if convolution.bias is not None:
        return False
    assert norm.running_mean is not None and norm.running_var is not None
    of_mean_color = (convolution.weight * mean_color).sum(dim=(1, 2, 3))
    alive = norm.running_var > 1e-6
    gaps = torch.stack([norm.running_mean, norm.running_mean - of_mean_color])[:, alive].abs()
    taken_off, own = (gaps / norm.running_var[alive].sqrt()).median(dim=1).values
    return bool(taken_off < own)

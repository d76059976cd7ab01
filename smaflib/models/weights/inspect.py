"""What a weights file is, and which network it fits."""

from __future__ import annotations

from pathlib import Path

import torch
import torchvision.models
from torch import nn

from smaflib.config import ModelConfig
from smaflib.errors import ConfigError
from smaflib.models.backbones import TorchvisionBackbone, build_backbone
from smaflib.models.timm_backbone import timm_reference
from smaflib.models.weights.files import (
    classifier_prefixes,
    first_names,
    has_segmentation_head,
    mismatches,
    network_state,
    weights_format,
)

CANDIDATES = (
    *("resnet38", "slim", "resnet18", "resnet34", "resnet50", "resnet101", "vgg16", "squeezenet1_0"),
    *("timm/tf_efficientnet_lite0", "timm/tf_efficientnet_lite2", "timm/resnet50"),
)
FORMATS = {"mxnet": "MXNet .params", "torch": "PyTorch checkpoint", "safetensors": "safetensors"}


def describe_weights(path: Path, backbone: str | None = None) -> str:
    """Say what a file is, what fits and what is missing.

    Args:
        path: a file that :func:`~smaflib.models.weights.files.read_weights` reads.
        backbone: compare with this one; None: with the one of :data:`CANDIDATES` that fits best.

    Returns:
        A few lines for a terminal.

    Raises:
        ConfigError: if the file cannot be read or there is no such backbone.
    """
    state = network_state(path)
    count = sum(value.numel() for value in state.values())
    types = ", ".join(sorted({str(value.dtype).removeprefix("torch.") for value in state.values()}))
    what_it_is = FORMATS[weights_format(path)]
    lines = [f"{path}: {what_it_is}, {len(state)} tensors, {count / 1e6:.2f} million numbers, {types}"]
    if has_segmentation_head(state):
        lines.append("it holds a segmentation network, which has learned from pixel masks: no image-level supervision")
    # Teachers and students of this library keep their backbone under that name, those of torchvision and timm inside.
    own = any(name.startswith(("backbone.late.", "backbone.model.")) for name in state)
    plain = {name.removeprefix("backbone."): value for name, value in state.items()}
    networks = {name: network_named(name, wrapped=own) for name in ((backbone,) if backbone else CANDIDATES)}
    compared = {name: mismatches(net, plain, classifier_prefixes(net)) for name, net in networks.items()}
    least = min(sum(map(len, rows)) for rows in compared.values())
    best = [name for name, rows in compared.items() if sum(map(len, rows)) == least]  # resnet50 has one set of names
    missing, superfluous, shapes = compared[best[0]]
    fits = not (missing or shapes)
    lines.append(f"{'fits' if fits else 'does not fit'} the backbone {' and '.join(best)}")
    for what, keys in (("missing", missing), ("of another shape", shapes), ("beside the backbone", superfluous)):
        if keys:
            lines.append(f"  {what} ({len(keys)}): {first_names(keys)}")
    if heads := [f"{key} {tuple(plain[key].shape)}" for key in superfluous if key in ("fc8.weight", "head.weight")]:
        lines.append(f"  a head of attention maps: {', '.join(heads)}: can be given as classifier.checkpoint")
    return "\n".join(lines)


def network_named(name: str, wrapped: bool = False) -> nn.Module:
    """A network without values, for its names and shapes.

    Args:
        name: of a backbone.
        wrapped: a model of torchvision or timm has the names that it has within this library's networks.

    Raises:
        ConfigError: if there is none.
    """
    with torch.device("meta"):
        if name in torchvision.models.list_models(module=torchvision.models):
            model = torchvision.models.get_model(name, weights=None)
            return TorchvisionBackbone(model, output_stride=8) if wrapped else model
        if name.startswith("timm/") and not wrapped:
            return timm_reference(name)
        if not (name.startswith("timm/") or name in ("slim", "resnet38")):
            raise ConfigError(
                f"there is no backbone {name!r}; there are slim, resnet38, torchvision's, and timm/ names"
            )
        return build_backbone(ModelConfig(backbone=name, output_stride=32))

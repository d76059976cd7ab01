"""Where class attention maps come from: a network's own logit maps, or what somebody else makes of the network."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from smaflib.errors import PluginError
from smaflib.models.networks import AttentionNetwork
from smaflib.plugins import SOURCE, calling, checked_maps, load


class Source(Protocol):
    """A source of maps of somebody's own: a class, or a function, that makes a module of a trained teacher or student.

    The module gets float32 images (B, 3, H, W), with ImageNet's mean and standard deviation, on the network's device,
    and gives class attention maps, float (B, K, h, w), non-negative and finite, of any h and w. Gradients are enabled
    inside it. It is in eval mode.

    Args:
        network: the teacher or the student, in eval mode; ``network.num_classes`` is K.
    """

    def __call__(self, network: AttentionNetwork, /) -> nn.Module: ...


class OwnSource(nn.Module):
    """A source of somebody's own around a network; images in, class attention maps out.

    Args:
        network: stays as it is.
        name: of the source, as in a config.

    Raises:
        PluginError: if there is no such source, or it is no module.
    """

    def __init__(self, network: AttentionNetwork, name: str) -> None:
        super().__init__()
        self.what, self.network = f"the source of maps {name}", network
        make: Source = load(SOURCE, name)
        with calling(self.what):
            maps_of = make(network)
        if not isinstance(maps_of, nn.Module):
            raise PluginError(f"{self.what} made a {type(maps_of).__name__} of the network; it must make an nn.Module")
        self.maps_of = maps_of.eval()

    def forward(self, images: Tensor) -> Tensor:  # (B, 3, H, W) -> (B, K, h, w) >= 0
        with calling(self.what), torch.enable_grad():  # Grad-CAM and its kin need them
            maps = self.maps_of(images)
            return checked_maps(self.what, maps, (len(images), self.network.num_classes, None, None), "(B, K, h, w)")

    def compile(self, *args: object, **options: object) -> None:
        """Somebody's own code is called as it is, whatever the setting ``compile`` says: it may look into layers."""

    def attention(self, maps: Tensor) -> Tensor:
        """They are attention maps already."""
        return maps


def source_of(network: nn.Module, name: str) -> nn.Module:
    """What gives a network's class attention maps, as ``attention.source`` says: a module with ``attention``.

    Args:
        network: teacher or student; another module with ``attention`` for the source ``network`` only.
        name: ``network`` or a source of somebody's own.

    Raises:
        PluginError: if there is no such source, it is no module, or the network is none of this library.
    """
    if not SOURCE.is_own(name):
        return network
    if not isinstance(network, AttentionNetwork):
        raise PluginError(f"the source of maps {name} needs a teacher or a student, got a {type(network).__name__}")
    return OwnSource(network, name)

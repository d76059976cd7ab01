"""Where attention maps come from: one interface, a file per source, chosen by ``attention.source``.

Fusion, denoising, reactivation, refinement and self-training take the maps of any source.
"""

import importlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from smaflib.config import CLIP_SOURCES, GRADIENT_SOURCES, IMAGENET_SOURCES, VIT_SOURCES, AttentionConfig
from smaflib.data.views import views_of
from smaflib.errors import ConfigError
from smaflib.plugins import is_custom, load_custom
from smaflib.runtime import device_of

Classes = Sequence[Sequence[int]]  #: Per image the numbers of the classes whose maps are asked for.


class Attention(NamedTuple):
    """Class attention maps, and how much each patch attends to every other, where the source knows it."""

    maps: Tensor  # (B, K, h, w) >= 0, zero where a class was not asked for; (K, h, w) of a single image
    affinity: Tensor | None = None  # (B, hw, hw) >= 0, patches row by row; (hw, hw) of a single image


class AttentionSource(nn.Module):
    """Makes class attention maps of images. Subclasses implement :meth:`attend`."""

    supervision = "image labels"  # that the network learned from; numbers of different supervision are not comparable
    patch = 1  # in pixels; the sides of images are rounded up to multiples of it
    needs_classes = False  # whether only classes that are asked for have maps
    needs_gradients = False  # whether ``attend`` runs with gradients

    def attend(self, images: Tensor, classes: Classes) -> Attention:
        """Maps of a batch, float32 (B, 3, H, W), normalised with ImageNet's mean and standard deviation."""
        raise NotImplementedError

    def features(self, images: Tensor) -> Sequence[Tensor]:
        """Features before the last ones, (B, C, h, w) each, for pixel correlation."""
        raise NotImplementedError

    def forward(self, image: Tensor, classes: Sequence[int], scale: float = 1.0) -> Attention:
        """Maps (K, h, w) of the K classes asked for, and affinity, of an image, uint8 (3, H, W), at one scale.

        Example:
            >>> from smaflib.models.pretrained import pretrained_network
            >>> source = NetworkSource(pretrained_network("teacher"))
            >>> source(torch.zeros(3, 64, 64, dtype=torch.uint8), classes=[0, 2], scale=2.0).maps.shape
            torch.Size([2, 16, 16])
        """
        (view,) = views_of(image, [scale], self.patch)
        with torch.set_grad_enabled(self.needs_gradients):
            maps, affinity = self.eval().attend(view[None].to(device_of(self)), [classes])
        return Attention(maps.detach()[0, list(classes)], None if affinity is None else affinity.detach()[0])


class NetworkSource(AttentionSource):
    """The class logit maps of a teacher, a student or any module with ``attention``."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def attend(self, images: Tensor, classes: Classes) -> Attention:
        logits = self.network(images).float()
        return Attention(self.network.attention(logits))  # type: ignore[operator]

    def features(self, images: Tensor) -> Sequence[Tensor]:
        backbone = getattr(self.network, "backbone", None)
        found = backbone.features(images)[1:-1] if backbone is not None and hasattr(backbone, "features") else ()
        if not found:
            raise ConfigError("attention.correlation needs a backbone whose features() gives three tensors or more")
        return found


class CustomSource(AttentionSource):
    """Maps (B, K, h, w), non-negative, of normalised images by the module that ``make`` makes of a trained network."""

    needs_gradients = True

    def __init__(self, network: nn.Module, make: Callable[[nn.Module], nn.Module]) -> None:
        super().__init__()
        self.network, self.maps_of = network, make(network)

    def attend(self, images: Tensor, classes: Classes) -> Attention:
        return Attention(self.maps_of(images))


def as_source(network: nn.Module) -> AttentionSource:
    """A source as it is; of a network its logit maps."""
    return network if isinstance(network, AttentionSource) else NetworkSource(network)


def make_source(attention: AttentionConfig, class_names: Sequence[str], network: nn.Module | None) -> AttentionSource:
    """Build the source that ``attention.source`` names, for K classes.

    ``network`` is a teacher or student; None for a source with one of its own (:attr:`AttentionConfig.pretrained`).
    ConfigError if a class name, a layer or the weights do not fit the source, or its package is missing.
    """
    name = attention.source
    if name == "classifier":
        assert network is not None  # a classifier is trained before it is asked
        return NetworkSource(network)
    if is_custom(name):
        assert network is not None
        return CustomSource(network, load_custom(name))
    kinds = {"imagenet": IMAGENET_SOURCES, "gradcam": GRADIENT_SOURCES, "vit": VIT_SOURCES, "clip": CLIP_SOURCES}
    module = next(kind for kind, names in kinds.items() if name in names)
    made: AttentionSource = importlib.import_module(f"{__name__}.{module}").make(attention, class_names, network)
    return made.eval()

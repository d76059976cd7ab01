"""Feature extractors by name: the slim network, ResNet38, or a model of torchvision or timm without its classifier."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import torch
import torchvision.models
from torch import Tensor, nn

from smaflib.config import NAMED_WEIGHTS, ModelConfig
from smaflib.errors import ConfigError, PluginError
from smaflib.models.resnet38 import ResNet38
from smaflib.models.slim import SlimResNet
from smaflib.models.weights.files import fill, read_weights
from smaflib.models.weights.sources import load_backbone_weights
from smaflib.plugins import BACKBONE, calling, load

if TYPE_CHECKING:  # timm takes a third of a second to import, which other backbones need not wait for
    from smaflib.models.timm_backbone import TimmBackbone


class TorchvisionBackbone(nn.Module):
    """Feature maps of a torchvision classification model.

    ResNets (and ResNeXts, Wide ResNets) and models that are one ``features`` sequence of convolutions and pools (VGG,
    SqueezeNet, MobileNet, EfficientNet, ...) reach ``output_stride`` by dilation instead of stride, which keeps
    the pretrained weights' field of view (Chen et al., DeepLab). Other families keep the stride that they have.

    Attributes:
        num_features: channels C of the maps.
        skip_channels: channels at stride 4, or 0 where the family offers no such point.
    """

    def __init__(self, model: Any, output_stride: int) -> None:
        super().__init__()
        self.early: nn.Module = nn.Identity()
        self.late: nn.Module
        self.skip_channels = 0
        if hasattr(model, "layer4"):
            self.early = nn.Sequential(model.conv1, model.bn1, model.relu, model.maxpool, model.layer1)
            self.late = nn.Sequential(model.layer2, model.layer3, model.layer4)
            self.skip_channels = model.layer1[-1].conv1.in_channels
            for layer, stride in ((model.layer2, 8), (model.layer3, 16), (model.layer4, 32)):
                if stride > output_stride:
                    _dilate_residual_layer(layer, dilation=stride // output_stride)
        else:
            self.late = model.features
            if isinstance(model, torchvision.models.SqueezeNet):
                # Its classifier is dropout, convolution, ReLU, mean: the 1000 maps before the mean are features.
                self.late = nn.Sequential(*model.features, *model.classifier[1:3])
            _dilate_sequence(self.late, output_stride)
        self.num_features = _last_channels(nn.Sequential(self.early, self.late))

    def forward(self, images: Tensor) -> Tensor:  # (B, 3, H, W) -> (B, C, h, w)
        return self.late(self.early(images))

    def early_layers(self) -> list[nn.Module]:
        """What ``model.freeze_early`` freezes: up to stride 4; nothing where the family offers no such point."""
        return [self.early]

    def features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features at stride 4 (only where ``skip_channels`` is not 0) and at the output stride."""
        early = self.early(images)
        return early, self.late(early)


class BackboneMaker(Protocol):
    """A backbone of somebody's own: a class, or a function, that makes a module. A stored network is rebuilt by it.

    The module gets images (B, 3, H, W), with ImageNet's mean and standard deviation, and gives features
    (B, C, h, w), finite; its attribute ``num_features`` is C. It has weights, and copies of it can be made. It may have
    ``skip_channels`` and ``features(images)``, which gives the features at stride 4 and the last ones, for
    ``segmentation.skip_channels``; and ``early_layers()``, the modules that ``model.freeze_early`` freezes.

    Args:
        config: the settings of the network, for ``output_stride`` and whatever else is of use. A file in ``weights`` is
            read into the module by this library; it is null when a stored network is rebuilt.
    """

    def __call__(self, config: ModelConfig, /) -> nn.Module: ...


class OwnBackbone(nn.Module):
    """A backbone of somebody's own, with what the networks ask of every backbone.

    Attributes:
        num_features: channels C of the maps.
        skip_channels: channels at stride 4, or 0.

    Raises:
        PluginError: if there is no such backbone, or it is no module that tells its ``num_features``.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.what = f"the backbone {config.backbone}"
        make: BackboneMaker = load(BACKBONE, config.backbone)
        with calling(self.what):
            made = make(config)
        if not isinstance(made, nn.Module):
            raise PluginError(f"{self.what} is made as a {type(made).__name__}; it must be an nn.Module")
        if not isinstance(getattr(made, "num_features", None), int):
            raise PluginError(f"{self.what} has no num_features; set it to the number of channels of its features")
        if config.freeze_early and not hasattr(made, "early_layers"):
            raise PluginError(f"model.freeze_early is set, but {self.what} has no early_layers(); add it, or set false")
        self.own: Any = made
        self.num_features: int = made.num_features  # type: ignore[assignment]
        self.skip_channels: int = getattr(made, "skip_channels", 0) if hasattr(made, "features") else 0

    def forward(self, images: Tensor) -> Tensor:  # (B, 3, H, W) -> (B, C, h, w)
        return self._checked(self.own, images)

    def early_layers(self) -> list[nn.Module]:
        """What ``model.freeze_early`` freezes."""
        with calling(self.what):
            return list(self.own.early_layers())

    def features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features at stride 4 (only where ``skip_channels`` is not 0) and at the output stride."""
        if not self.skip_channels:
            return images, self(images)
        with calling(self.what):
            early, late = self.own.features(images)
        return early, self._checked(lambda _: late, images)

    def _checked(self, function: Any, images: Tensor) -> Tensor:
        with calling(self.what):
            features = function(images)
        # Whether they are finite shows in the loss; asking here would make a GPU wait at each step.
        if not isinstance(features, Tensor) or (features.dim(), *features.shape[:2]) != (
            4,
            len(images),
            self.num_features,
        ):
            found = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise PluginError(
                f"{self.what} gave {found} for {len(images)} images; it must give features (B, C, h, w) with C = "
                f"num_features = {self.num_features}"
            )
        return features


def _build_own(config: ModelConfig) -> OwnBackbone:
    backbone = OwnBackbone(config)
    if config.weights in NAMED_WEIGHTS:
        raise ConfigError(
            f"model.weights is {config.weights!r}, but {backbone.what} has none of that kind; give a file or null: it "
            "may load weights by itself"
        )
    if config.weights is not None:
        fill(backbone.own, read_weights(Path(config.weights)), source=config.weights)
    return backbone


Backbone: TypeAlias = "SlimResNet | ResNet38 | TorchvisionBackbone | TimmBackbone | OwnBackbone"


def build_backbone(config: ModelConfig) -> Backbone:
    """Make the backbone that a config names, with its initial weights.

    Raises:
        ConfigError: if there is no such model, it has no convolutional features to make maps of, or timm cannot give
            it the output stride.
        PluginError: if a backbone of somebody's own is not what it must be.
    """
    if config.backbone.startswith("timm/"):
        from smaflib.models.timm_backbone import build_timm_backbone

        return build_timm_backbone(config)
    if config.backbone == "slim":
        slim = SlimResNet()
        load_backbone_weights(slim, config.weights, "slim", config.allow_mask_weights)
        return slim
    if config.backbone == "resnet38":
        resnet38 = ResNet38()
        load_backbone_weights(resnet38, config.weights, "resnet38", config.allow_mask_weights)
        return resnet38
    known = torchvision.models.list_models(module=torchvision.models)
    if config.backbone not in known and BACKBONE.is_own(config.backbone):
        return _build_own(config)
    if config.backbone not in known:
        raise ConfigError(
            f"model.backbone is {config.backbone!r}, which is neither 'slim' nor 'resnet38' nor a torchvision "
            "classification model; common ones are resnet50, resnet101 and squeezenet1_0; a model of timm is "
            "'timm/' and its name; one of your own is package.module:attribute"
        )
    model = torchvision.models.get_model(config.backbone, weights=None)
    convolutional = hasattr(model, "layer4") or isinstance(getattr(model, "features", None), nn.Sequential)
    if not convolutional or isinstance(model, torchvision.models.SwinTransformer):  # Swin's maps are (B, h, w, C)
        raise ConfigError(
            f"model.backbone {config.backbone!r} has no plain convolutional features; choose a ResNet, VGG, "
            "SqueezeNet, DenseNet, MobileNet, EfficientNet or ConvNeXt"
        )
    load_backbone_weights(model, config.weights, config.backbone, config.allow_mask_weights)
    return TorchvisionBackbone(model, config.output_stride)


def _dilate_residual_layer(layer: nn.Module, dilation: int) -> None:
    """Trade the layer's stride for dilation.

    The convolution that loses its stride looks at the grid of the layer before and keeps that one's dilation, so the
    function at every ``dilation``-th position stays what it was.
    """
    before = max(1, dilation // 2)
    for module in layer.modules():
        if isinstance(module, nn.Conv2d):
            if module.kernel_size == (3, 3):
                own = before if module.stride == (2, 2) else dilation
                module.dilation = module.padding = (own, own)
            module.stride = (1, 1)


def _dilate_sequence(features: nn.Module, output_stride: int) -> None:
    """Walk a feed-forward sequence: what would stride beyond ``output_stride`` dilates what follows instead."""
    stride, dilation = 1, 1
    for module in features.modules():
        if not isinstance(module, nn.Conv2d | nn.MaxPool2d):
            continue
        kernel, step = _side(module.kernel_size), _side(module.stride)
        if isinstance(module, nn.Conv2d) and dilation > 1 and kernel > 1:
            module.dilation = (dilation, dilation)
            module.padding = (dilation * (kernel // 2),) * 2
        if step > 1 and kernel > 1:
            if stride * step <= output_stride:
                stride *= step
            elif kernel % 2 == 1:
                module.stride = 1 if isinstance(module, nn.MaxPool2d) else (1, 1)
                if isinstance(module, nn.MaxPool2d):
                    module.padding = kernel // 2
                dilation *= step
            elif isinstance(module, nn.MaxPool2d):
                # VGG's 2x2 pool has no middle: without its stride it becomes a 3x3 pool, as in DeepLab.
                module.kernel_size, module.stride, module.padding = 3, 1, 1
                dilation *= step


def _side(value: int | tuple[int, ...]) -> int:
    return value if isinstance(value, int) else value[0]


def _last_channels(features: nn.Module) -> int:
    """Channels that a feature extractor gives, found by sending a small picture of zeros through it."""
    stem = next(module for module in features.modules() if isinstance(module, nn.Conv2d))
    training = features.training
    features.eval()
    with torch.no_grad():
        channels = features(torch.zeros(1, stem.in_channels, 64, 64)).shape[1]
    features.train(training)
    return int(channels)

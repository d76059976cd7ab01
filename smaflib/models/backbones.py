"""Feature extractors by name: the slim network, ResNet38, a convolutional model of timm, or a custom module."""

import contextlib
import difflib
import functools
from pathlib import Path
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn

from smaflib.config import ModelConfig
from smaflib.data.transforms import IMAGENET_MEAN, IMAGENET_STD, renormalization
from smaflib.errors import ConfigError
from smaflib.models.resnet38 import ResNet38
from smaflib.models.slim import SlimResNet
from smaflib.models.weights import extractor_name, fill, image_level_weights, meta_model, timm_model
from smaflib.plugins import is_custom, load_custom

BUILT_IN: dict[str, type[SlimResNet] | type[ResNet38]] = {"slim": SlimResNet, "resnet38": ResNet38}

CLASSIFIERS = ("classifier.", "fc.", "head.", "fc8.", "cov_feat.", "bn.")
"""Prefixes of the layers after the features, in checkpoints of built-in backbones; they are left out."""


class TimmBackbone(nn.Module):
    """Feature maps of a convolutional timm model, by timm's own feature extractor.

    Every network here takes images with ImageNet's mean and standard deviation. A model that was trained with others
    gets its own, by a scale and a shift per channel that are stored with the weights.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, model: Any, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        scale, shift = renormalization(mean, std)
        self.register_buffer("scale", scale)
        self.register_buffer("shift", shift)
        self.model = model
        self.skip_channels, *_, self.num_features = model.feature_info.channels()

    def forward(self, images: Tensor) -> Tensor:  # (B, 3, H, W) -> (B, C, h, w)
        return self.features(images)[-1]

    def features(self, images: Tensor) -> tuple[Tensor, ...]:
        """Features from stride 4 on, the last ones at the output stride."""
        return tuple(self.model(images * self.scale + self.shift))

    def early_layers(self) -> list[nn.Module]:
        """The layers up to stride 4, which ``model.freeze_early`` freezes; none in HRNet, where timm names no end."""
        # timm names the module that ends at stride 4; modules run in the order in which they are registered.
        end = extractor_name(self.model.feature_info.module_name()[0])
        modules = [(extractor_name(name), module) for name, module in self.model.named_modules() if name]
        until = next((number for number, (name, _) in enumerate(modules, start=1) if name == end), 0)
        return [module for name, module in modules[:until] if not end.startswith(f"{name}_")]  # not those around it


Backbone: TypeAlias = SlimResNet | ResNet38 | TimmBackbone
"""``num_features`` is the number of channels, ``skip_channels`` that at stride 4; for custom ones see below."""


def build_backbone(config: ModelConfig) -> Backbone:
    """Make the backbone that a config names, with its initial weights.

    ``model.backbone`` is ``slim``, ``resnet38``, ``timm/`` and the name of a convolutional timm model, torchvision's
    name of a ResNet (the same network and weights, from timm), or ``package.module:attribute``. The latter is called
    with the config and returns a module that takes images (B, 3, H, W), normalised with ImageNet's mean and standard
    deviation, and gives features (B, C, h, w); its attribute ``num_features`` is C. Optional are ``features(images)``,
    those from stride 4 on, with ``skip_channels``, for ``segmentation.skip_channels`` and ``attention.correlation``,
    and ``early_layers()``, for ``model.freeze_early``.

    ConfigError if there is no such model or no such weights, it has no features at this output stride, or the weights
    do not fit.
    """
    name, weights = config.backbone, config.weights
    backbone: Backbone
    if name in BUILT_IN:
        backbone = BUILT_IN[name]()
    elif is_custom(name) and not name.startswith("timm/"):
        backbone = cast(Backbone, load_custom(name)(config))
    else:
        return _build_timm(config)
    if weights is not None:
        state = image_level_weights(Path(weights), config.allow_mask_weights)
        if name in BUILT_IN:
            state = {key: value for key, value in state.items() if not key.startswith(CLASSIFIERS)}
        fill(backbone, state, source=weights)
    return backbone


def _build_timm(config: ModelConfig) -> TimmBackbone:
    name = _timm_name(config.backbone)
    read = functools.partial(image_level_weights, allow_mask_weights=config.allow_mask_weights)
    model = timm_model(name, config.weights, read, **_extractor_options(name, config.output_stride))
    if config.weights == "wheel":
        return TimmBackbone(model, IMAGENET_MEAN, IMAGENET_STD)
    return TimmBackbone(model, model.pretrained_cfg["mean"], model.pretrained_cfg["std"])


def _timm_name(backbone: str) -> str:
    """The model's name in timm; for torchvision's name of a ResNet, that of torchvision's newest weights."""
    import timm

    name = backbone.removeprefix("timm/")
    tags = ("",) if name != backbone else (".tv2_in1k", ".tv_in1k")
    for each in (f"{name}{tag}" for tag in tags):
        if timm.models.is_model_pretrained(each) or (timm.is_model(each) and "." not in each):
            return each
    near = difflib.get_close_matches(name, [*timm.list_models(), *timm.list_pretrained()], n=3, cutoff=0.0)
    known = f"slim, resnet38, a model of timm nor package.module:attribute; the nearest are timm/{', timm/'.join(near)}"
    raise ConfigError(f"model.backbone is {backbone!r}, which is neither {known}")


@functools.cache  # builds models without values, and each stage of a run builds its networks anew
def _extractor_options(name: str, output_stride: int) -> dict[str, Any]:
    """Arguments for ``timm.create_model`` that give features from stride 4 to the output stride."""
    reductions = [info["reduction"] for info in getattr(meta_model(name), "feature_info", [])]
    if 4 in reductions:
        at_4 = len(reductions) - 1 - reductions[::-1].index(4)
        options: dict[str, Any] = {"features_only": True, "out_indices": (*range(at_4, len(reductions)),)}
        for every in (options, options | {"output_stride": output_stride}):
            with contextlib.suppress(Exception):  # families refuse in different ways: unknown argument, wrong shape
                model = meta_model(name, **every).eval()
                early, *_, late = model(torch.empty(1, 3, 96, 160, device="meta"))
                skip, *_, width = model.feature_info.channels()
                fits = early.shape == (1, skip, 24, 40)
                fits &= late.shape == (1, width, 96 // output_stride, 160 // output_stride)
                if fits and type(model).__name__ != "FeatureGetterNet":  # timm's class for transformers
                    return every
    raise ConfigError(
        f"timm gives no convolutional features of model.backbone timm/{name} at output stride {output_stride}; set "
        "model.output_stride=32, or choose a ResNet, RegNet, EfficientNet, MobileNet or ConvNeXt"
    )

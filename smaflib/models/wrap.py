"""Class attention maps of a trained classifier, such as those of timm and torchvision, as it is."""

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smaflib.data.transforms import IMAGENET_MEAN, IMAGENET_STD, renormalization
from smaflib.runtime import device_of


def wrap(
    model: nn.Module,  # images (B, 3, H, W) of any size to logits (B, N)
    classes: Sequence[int] | None = None,  # numbers of the K classes whose maps are wanted; None: all N
    mean: Sequence[float] | None = None,  # of the pixels in [0, 1]; None: as timm's models say, or ImageNet's
    std: Sequence[float] | None = None,
) -> "CamNetwork":
    """Give a classifier class attention maps, for :func:`~smaflib.cams.multi_scale_cams`.

    It must compute its logits by one linear layer from the spatial mean of its last features, with at most a layer norm
    in between, as ResNet, EfficientNet, ConvNeXt, DenseNet and RegNet do. The model is put in eval mode.

    ValueError if the model has another head, as a vision transformer.

    Source: Zhou et al., "Learning Deep Features for Discriminative Localization", CVPR 2016.

    Example:
        >>> import torchvision
        >>> network = wrap(torchvision.models.resnet18(), classes=[281, 282])
        >>> network.attention(network(torch.zeros(1, 3, 64, 96))).shape
        torch.Size([1, 2, 2, 3])
    """
    facts: dict[str, Any] = getattr(model, "pretrained_cfg", None) or {}  # of timm's models
    mean, std = mean or facts.get("mean", IMAGENET_MEAN), std or facts.get("std", IMAGENET_STD)
    return CamNetwork(model, classes, mean, std, facts.get("input_size", (3, 224, 224)))


class CamNetwork(nn.Module):
    """A classifier with class attention maps, see :func:`wrap`; the chosen ``classes`` may be set at any time."""

    def __init__(self, model: nn.Module, classes: Any, mean: Any, std: Any, input_size: Sequence[int]) -> None:
        super().__init__()
        self.model = model.eval()
        self._parts = [*_find_parts(model, input_size)]  # in a list, as they are modules of the model already
        self.classes = [*range(len(self._parts[2].weight))] if classes is None else [*classes]
        self._renormalization = renormalization(mean, std)

    @property
    def features(self) -> nn.Module:
        """The module whose output is the last features, (B, C, h, w)."""
        return self._parts[0]

    @property
    def bias(self) -> Any:
        """(N,) of the last layer. With it the mean of the maps of ``forward`` over the cells is the model's logit."""
        last = self._parts[2]
        return torch.zeros(len(last.weight)) if last.bias is None else last.bias

    @property
    def weight(self) -> Tensor:
        """(N, C) of the last layer."""
        return self._parts[2].weight

    def forward(self, images: Tensor) -> Tensor:  # (B, 3, H, W) -> (B, N, h, w), of all classes
        return F.conv2d(self.cells(images), self.weight[:, :, None, None])

    def logits(self, images: Tensor) -> Tensor:
        """The model's own (B, N)."""
        scale, shift = (each.to(images.device) for each in self._renormalization)
        return self.model(images * scale + shift)

    def intermediate_features(self, images: Tensor) -> list[Tensor]:
        """A timm model's features of every stride but the last, (B, C, h, w) each."""
        scale, shift = (each.to(images.device) for each in self._renormalization)
        indices, model = [*range(len(self.model.feature_info) - 1)], self.model  # type: ignore[arg-type]
        how = {"indices": indices, "stop_early": True, "intermediates_only": True}
        return model.forward_intermediates(images * scale + shift, **how)  # type: ignore[operator]

    def cells(self, images: Tensor) -> Tensor:
        """The last features, (B, C, h, w), as the last layer sees their mean."""
        source, norm, _ = self._parts
        seen: list[Tensor] = []
        with source.register_forward_hook(lambda module, args, output: seen.append(output)):
            self.logits(images)
        cells = seen[-1]  # (B, C, h, w)
        if norm is not None:  # with the statistics of the mean, so that the mean of the maps stays the logit
            var, mean = torch.var_mean(cells.mean(dim=(2, 3), keepdim=True), dim=1, keepdim=True, correction=0)
            cells = (cells - mean) / (var + norm.eps).sqrt() * norm.weight[:, None, None] + norm.bias[:, None, None]
        return cells

    def image_logits(self, maps: Tensor) -> Tensor:  # (B, N, h, w) -> (B, K)
        return (maps.mean(dim=(2, 3)) + self.bias)[:, self.classes]

    def attention(self, maps: Tensor) -> Tensor:  # (B, N, h, w) -> (B, K, h, w) >= 0
        return maps[:, self.classes].relu()


@torch.no_grad()
def _find_parts(model: nn.Module, input_size: Sequence[int]) -> tuple[nn.Module, Any, Any]:
    """The module whose output's spatial mean the last layer gets, a layer norm between them or None, the last layer.

    They are found by their values for one image of noise.
    """
    ran: list[tuple[nn.Module, Any, Any]] = []
    with contextlib.ExitStack() as stack:
        for each in model.modules():
            stack.enter_context(each.register_forward_hook(lambda *call: ran.append(call)))
        noise = torch.randn(1, *input_size, generator=torch.Generator().manual_seed(0))
        logits = model(noise.to(device_of(model)))
    ran = [call for call in reversed(ran) if isinstance(call[2], Tensor)]
    for last, (pooled, *_), output in ran:
        if isinstance(last, nn.Linear) and torch.equal(output, logits):
            norms = (
                (each, args[0]) for each, args, out in ran if isinstance(each, nn.LayerNorm) and _same(out, pooled)
            )
            norm, pooled = next(norms, (None, pooled))
            for source, _, features in ran:
                whole = features.dim() == 4 and features.shape[2:].numel() > 1
                if whole and _same(features.mean(dim=(2, 3)), pooled):
                    return source, norm, last
    raise ValueError(
        f"{type(model).__name__} has no class activation maps: its logits are not a linear layer of the mean of its "
        "last features. Give multi_scale_cams a module with forward and attention (docs/extend.md)"
    )


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors hold the same numbers, up to rounding and to dimensions of length 1."""
    return one.numel() == other.numel() and torch.allclose(one.flatten(), other.flatten(), rtol=1e-3, atol=1e-5)

"""The networks of the method: images in, logit maps out, background first."""

import copy
from pathlib import Path
from typing import Self, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.segmentation.deeplabv3 import DeepLabHead

from smaflib.config import ModelConfig, SegmentationConfig
from smaflib.models.backbones import build_backbone
from smaflib.models.weights import attention_state, fill, read_weights

Network = TypeVar("Network", bound=nn.Module)


class BackboneNetwork(nn.Module):
    """A backbone, parts of which may be frozen: in eval mode, without gradients."""

    def __init__(self, config: ModelConfig, num_classes: int) -> None:
        super().__init__()
        self.config, self.num_classes = config, num_classes
        self.backbone = build_backbone(config)
        # The channels of a frozen backbone differ in scale by orders of magnitude; a linear head learns better on one.
        width = self.backbone.num_features
        self.standardize = nn.BatchNorm2d(width, affine=False) if config.freeze_backbone else nn.Identity()

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        frozen: list[nn.Module] = [*self.backbone.early_layers()] if self.config.freeze_early else []
        if self.config.freeze_backbone:
            frozen += [self.backbone, self.standardize]
        if self.config.freeze_batch_norm:  # the reference freezes all, including the new one in its head
            layers = [*self.backbone.modules(), *getattr(self, "neck", nn.Identity()).modules()]
            frozen += [layer for layer in layers if isinstance(layer, nn.BatchNorm2d)]
        for layer in frozen:
            layer.eval().requires_grad_(False)
        return self


class AttentionNetwork(BackboneNetwork):
    """Teacher and student: a backbone and a 1x1 convolution.

    ``forward`` gives K+1 logit maps, background first, if ``background`` is true (EPS and the student), else K (plain).
    :meth:`attention` turns them into class attention maps.
    """

    def __init__(self, config: ModelConfig, num_classes: int, background: bool) -> None:
        super().__init__(config, num_classes)
        self.background, width = background, self.backbone.num_features
        self.neck: nn.Module = nn.Identity()
        if config.head_channels:
            self.neck = nn.Sequential(
                nn.Conv2d(width, config.head_channels, 1, bias=False),
                nn.BatchNorm2d(config.head_channels),
                nn.ReLU(inplace=True),
            )
            width = config.head_channels
        self.head = nn.Conv2d(width, num_classes + background, 1, bias=False)

    def forward(self, images: Tensor) -> Tensor:  # (B, 3, H, W) -> (B, K or K+1, h, w) logits
        return self.head(self.neck(self.standardize(self.backbone(images))))

    def image_logits(self, logits: Tensor) -> Tensor:  # (B, K or K+1, h, w) -> (B, K)
        """Spatial mean of the foreground logit maps, for comparison with the image label."""
        return logits[:, self.num_background :].mean(dim=(2, 3))

    def attention(self, logits: Tensor) -> Tensor:  # (B, K or K+1, h, w) -> (B, K, h, w) >= 0
        """Class attention maps: with a background the foreground of a softmax over all maps, else ReLU."""
        return logits.softmax(dim=1)[:, 1:] if self.background else logits.relu()

    @property
    def num_background(self) -> int:
        return int(self.background)

    def new_layers(self) -> list[nn.Module]:
        """Layers without pretrained weights; they get a higher learning rate."""
        return [self.neck, self.head]


class SummedBranches(nn.ModuleList):
    """Parallel layers whose outputs are summed."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([branch(x) for branch in self]).sum(dim=0)


class SegmentationNetwork(BackboneNetwork):
    """A backbone and DeepLab's head, to K+1 logit maps.

    ``deeplabv2``: parallel dilated 3x3 convolutions, summed. ``deeplabv3``: torchvision's head, with a pooled branch.

    With ``skip_channels``, features of stride 4 join before the classifier, so that small objects cover more cells
    (the idea of DeepLab-V3+'s decoder).

    Source: Chen et al., "DeepLab", TPAMI 2018, section 3.2.
    """

    def __init__(self, model: ModelConfig, config: SegmentationConfig, num_classes: int) -> None:
        super().__init__(model, num_classes)
        width = config.skip_channels or num_classes + 1
        self.aspp: nn.Module
        if config.architecture == "deeplabv3":
            self.aspp = DeepLabHead(self.backbone.num_features, num_classes + 1, config.aspp_dilations)
        else:
            self.aspp = SummedBranches(
                nn.Conv2d(self.backbone.num_features, width, 3, padding=dilation, dilation=dilation)
                for dilation in config.aspp_dilations
            )
        self.skip = bool(config.skip_channels)
        if self.skip:
            self.early = nn.Conv2d(self.backbone.skip_channels, width, 1, bias=False)
            self.mix = nn.Sequential(
                nn.BatchNorm2d(width),
                nn.ReLU(inplace=True),
                nn.Conv2d(width, width, 3, padding=1, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(inplace=True),
                nn.Conv2d(width, num_classes + 1, 1),
            )

    def forward(self, images: Tensor) -> Tensor:  # (B, 3, H, W) -> (B, K+1, h, w) logits, background first
        if not self.skip:
            return self.aspp(self.standardize(self.backbone(images)))
        early, *_, late = self.backbone.features(images)
        logits = self.aspp(self.standardize(late))
        finer = F.interpolate(logits, size=early.shape[2:], mode="bilinear", align_corners=False)
        return self.mix(finer + self.early(early))

    def new_layers(self) -> list[nn.Module]:
        """Layers without pretrained weights; they get a higher learning rate."""
        return [self.aspp, *([self.early, self.mix] if self.skip else [])]


def with_background(teacher: Network) -> Network:
    """The student before training: a copy of the teacher with a background map.

    A plain teacher has no background map. Its student's starts at a logit of 0, so that a pixel where all class logits
    are negative begins as background. A network of another class is copied unchanged, and must have a background map.
    """
    student = copy.deepcopy(teacher)
    if isinstance(student, AttentionNetwork) and not student.background:
        weight = student.head.weight.detach()
        student.head = nn.Conv2d(weight.shape[1], len(weight) + 1, 1, bias=False, device="meta")
        student.head.weight = nn.Parameter(torch.cat([torch.zeros_like(weight[:1]), weight]))
        student.background = True
    return student


def load_attention_network(path: Path, config: ModelConfig, num_classes: int) -> AttentionNetwork:
    """Rebuild a teacher or student, in eval mode on the CPU, from a checkpoint of a run, of the reference or of EPS."""
    state = attention_state(read_weights(path), num_classes)
    background = len(state.get("head.weight", ())) == num_classes + 1
    network = AttentionNetwork(config.model_copy(update={"weights": None}), num_classes, background)
    fill(network, state, source=str(path))
    return network.eval()

"""ResNet38, the backbone of the reference implementation and of most classifiers in this field.

Wu, Shen, van den Hengel, "Wider or Deeper: Revisiting the ResNet Model for Visual Recognition", 2016, model A1: few but
wide pre-activation blocks, here without strides after the fourth stage. Layers have the names of published checkpoints.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

FROZEN_LAYERS = ("conv1a", "b2", "b2_1", "b2_2")
"""Layers that the reference never trains."""


class BasicBlock(nn.Module):
    """BatchNorm, ReLU and a 3x3 convolution, twice, beside a shortcut.

    ``dilation`` is that of the second convolution, and of the first unless ``first_dilation`` is given.
    """

    def __init__(
        self,
        in_channels: int,
        mid_channels: int,
        out_channels: int,
        stride: int = 1,
        dilation: int = 1,
        first_dilation: int | None = None,
    ) -> None:
        super().__init__()
        first = dilation if first_dilation is None else first_dilation
        self.same_shape = stride == 1 and in_channels == out_channels
        self.bn_branch2a = nn.BatchNorm2d(in_channels)
        self.conv_branch2a = nn.Conv2d(in_channels, mid_channels, 3, stride, first, first, bias=False)
        self.bn_branch2b1 = nn.BatchNorm2d(mid_channels)
        self.conv_branch2b1 = nn.Conv2d(mid_channels, out_channels, 3, 1, dilation, dilation, bias=False)
        if not self.same_shape:
            self.conv_branch1 = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        activated = F.relu(self.bn_branch2a(x))
        shortcut = x if self.same_shape else self.conv_branch1(activated)
        y = self.conv_branch2a(activated)
        return shortcut + self.conv_branch2b1(F.relu(self.bn_branch2b1(y)))


class BottleneckBlock(nn.Module):
    """A 1x1, a dilated 3x3 and a 1x1 convolution, each after BatchNorm and ReLU, beside a 1x1 shortcut.

    Dropout of whole channels precedes the second and third convolution.
    """

    def __init__(self, in_channels: int, out_channels: int, dilation: int, dropout: float) -> None:
        super().__init__()
        quarter, half = out_channels // 4, out_channels // 2
        self.bn_branch2a = nn.BatchNorm2d(in_channels)
        self.conv_branch2a = nn.Conv2d(in_channels, quarter, 1, bias=False)
        self.bn_branch2b1 = nn.BatchNorm2d(quarter)
        self.dropout_2b1 = nn.Dropout2d(dropout)
        self.conv_branch2b1 = nn.Conv2d(quarter, half, 3, padding=dilation, dilation=dilation, bias=False)
        self.bn_branch2b2 = nn.BatchNorm2d(half)
        self.dropout_2b2 = nn.Dropout2d(dropout)
        self.conv_branch2b2 = nn.Conv2d(half, out_channels, 1, bias=False)
        self.conv_branch1 = nn.Conv2d(in_channels, out_channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        activated = F.relu(self.bn_branch2a(x))
        y = self.conv_branch2a(activated)
        y = self.conv_branch2b1(self.dropout_2b1(F.relu(self.bn_branch2b1(y))))
        y = self.conv_branch2b2(self.dropout_2b2(F.relu(self.bn_branch2b2(y))))
        return self.conv_branch1(activated) + y


class ResNet38(nn.Module):
    """4096 channels at stride 8; 470 MB of weights."""

    num_features = 4096
    skip_channels = 256

    def __init__(self) -> None:
        super().__init__()
        self.conv1a = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        self.b2 = BasicBlock(64, 128, 128, stride=2)
        self.b2_1 = BasicBlock(128, 128, 128)
        self.b2_2 = BasicBlock(128, 128, 128)
        self.b3 = BasicBlock(128, 256, 256, stride=2)
        self.b3_1 = BasicBlock(256, 256, 256)
        self.b3_2 = BasicBlock(256, 256, 256)
        self.b4 = BasicBlock(256, 512, 512, stride=2)
        for number in range(1, 6):
            self.add_module(f"b4_{number}", BasicBlock(512, 512, 512))
        self.b5 = BasicBlock(512, 512, 1024, first_dilation=1, dilation=2)
        self.b5_1 = BasicBlock(1024, 512, 1024, dilation=2)
        self.b5_2 = BasicBlock(1024, 512, 1024, dilation=2)
        self.b6 = BottleneckBlock(1024, 2048, dilation=4, dropout=0.3)
        self.b7 = BottleneckBlock(2048, 4096, dilation=4, dropout=0.5)
        self.bn7 = nn.BatchNorm2d(4096)

    def forward(self, images: Tensor) -> Tensor:  # (B, 3, H, W) -> (B, 4096, H/8, W/8)
        return self.features(images)[1]

    def early_layers(self) -> list[nn.Module]:
        """The layers that ``model.freeze_early`` freezes."""
        return [self.get_submodule(name) for name in FROZEN_LAYERS]

    def features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features at stride 4, (B, 256, H/4, W/4), and at stride 8, (B, 4096, H/8, W/8)."""
        blocks = dict(self.named_children())
        x = blocks.pop("conv1a")(images)
        last = blocks.pop("bn7")
        early = x
        for name, block in blocks.items():
            x = block(x)
            if name == "b3_2":
                early = x
        return early, F.relu(last(x))

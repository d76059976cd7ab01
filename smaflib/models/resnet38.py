"""ResNet38, the backbone of the reference implementation and of most classifiers in this field.

Wu, Shen, van den Hengel, "Wider or Deeper: Revisiting the ResNet Model for Visual Recognition", 2016, model A1: few but
wide pre-activation blocks, here without strides after the fourth stage. Layers have the names of published checkpoints.
"""

import torch.nn.functional as F
from torch import Tensor, nn


class BasicBlock(nn.Module):
    """BatchNorm, ReLU and a 3x3 convolution, twice, beside a shortcut, with so many channels."""

    def __init__(self, start: int, middle: int, end: int, stride: int = 1, dilations: tuple[int, int] = (1, 1)) -> None:
        super().__init__()
        first, second = dilations
        self.same_shape = stride == 1 and start == end
        self.bn_branch2a = nn.BatchNorm2d(start)
        self.conv_branch2a = nn.Conv2d(start, middle, 3, stride, first, first, bias=False)
        self.bn_branch2b1 = nn.BatchNorm2d(middle)
        self.conv_branch2b1 = nn.Conv2d(middle, end, 3, 1, second, second, bias=False)
        if not self.same_shape:
            self.conv_branch1 = nn.Conv2d(start, end, 1, stride, bias=False)

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
        self.b5 = BasicBlock(512, 512, 1024, dilations=(1, 2))
        self.b5_1 = BasicBlock(1024, 512, 1024, dilations=(2, 2))
        self.b5_2 = BasicBlock(1024, 512, 1024, dilations=(2, 2))
        self.b6 = BottleneckBlock(1024, 2048, dilation=4, dropout=0.3)
        self.b7 = BottleneckBlock(2048, 4096, dilation=4, dropout=0.5)
        self.bn7 = nn.BatchNorm2d(4096)

    def forward(self, images: Tensor) -> Tensor:  # (B, 3, H, W) -> (B, 4096, H/8, W/8)
        return self.features(images)[-1]

    def early_layers(self) -> list[nn.Module]:
        """The layers that ``model.freeze_early`` freezes; the reference never trains them."""
        return [self.conv1a, self.b2, self.b2_1, self.b2_2]

    def features(self, images: Tensor) -> tuple[Tensor, ...]:
        """Features at stride 4, (B, 256, H/4, W/4), and at stride 8 of three layers, the last (B, 4096, H/8, W/8)."""
        x, kept = images, list[Tensor]()
        for name, layer in self.named_children():  # in the order of __init__
            x = layer(x)
            if name in ("b3_2", "b4_5", "b5_2"):
                kept.append(x)
        return *kept, F.relu(x)

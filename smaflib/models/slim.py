"""A residual network that trains on a laptop's CPU in a minute."""

from torch import Tensor, nn

CHANNELS = (16, 32, 64, 96)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1, dilation: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, dilation, dilation, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, dilation, dilation, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != out_channels:
            self.shortcut.append(nn.Conv2d(in_channels, out_channels, 1, stride, bias=False))
            self.shortcut.append(nn.BatchNorm2d(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class SlimResNet(nn.Module):
    """Four stages at strides 2, 4, 8 and 8; the last is dilated."""

    num_features = CHANNELS[-1]
    skip_channels = CHANNELS[1]

    def __init__(self) -> None:
        super().__init__()
        c1, c2, c3, c4 = CHANNELS
        self.stem = nn.Sequential(nn.Conv2d(3, c1, 3, 2, 1, bias=False), nn.BatchNorm2d(c1), nn.ReLU(inplace=True))
        self.layer1 = ResidualBlock(c1, c1)  # stride 2
        self.layer2 = ResidualBlock(c1, c2, stride=2)  # stride 4
        self.layer3 = ResidualBlock(c2, c3, stride=2)  # stride 8
        self.layer4 = nn.Sequential(ResidualBlock(c3, c4, dilation=2), ResidualBlock(c4, c4, dilation=2))

    def forward(self, images: Tensor) -> Tensor:  # (B, 3, H, W) -> (B, 96, H/8, W/8)
        return self.features(images)[-1]

    def early_layers(self) -> list[nn.Module]:
        """The layers that ``model.freeze_early`` freezes: all at stride 2."""
        return [self.stem, self.layer1]

    def features(self, images: Tensor) -> tuple[Tensor, ...]:
        """Features at stride 4, (B, 32, H/4, W/4), and at stride 8 of two layers, the last (B, 96, H/8, W/8)."""
        early = self.layer2(self.layer1(self.stem(images)))
        middle = self.layer3(early)
        return early, middle, self.layer4(middle)

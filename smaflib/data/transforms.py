"""Geometry and colour of training: the same random crop is applied to image, saliency, maps and mask."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torchvision.transforms.v2.functional as F
from torch import Tensor
from torchvision.transforms import InterpolationMode

from smaflib.config import TrainingConfig

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def normalize(image: Tensor) -> Tensor:
    """uint8 (..., 3, H, W) to float32 with ImageNet's mean and standard deviation, as torchvision's weights expect."""
    if image.dtype != torch.uint8:
        raise TypeError(f"an image at the boundary is uint8, got {image.dtype}; convert it with (image * 255).byte()")
    return F.normalize(F.to_dtype(image, torch.float32, scale=True), list(IMAGENET_MEAN), list(IMAGENET_STD))


def scaled_size(size: Sequence[int], scale: float) -> tuple[int, int]:
    """(H, W) times a factor, in whole pixels and at least one."""
    height, width = size
    return max(1, round(height * scale)), max(1, round(width * scale))


def working_size(size: Sequence[int], longest_side: int) -> tuple[int, int]:
    """The size, (H, W), at which images of any size are worked on: the long side has ``longest_side`` pixels.

    An image more than twice as long as wide gets the area of one that is twice as long: a panorama would become a line.

    Example:
        >>> working_size((3000, 4000), 512), working_size((48, 64), 512), working_size((600, 8000), 512)
        ((384, 512), (384, 512), (99, 1322))
    """
    height, width = size
    return scaled_size(size, longest_side / min(max(size), (2 * height * width) ** 0.5))


def renormalization(mean: Sequence[float], std: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Scale and shift, (3, 1, 1) each, from :func:`normalize`'s result to another mean and std of pixels in [0, 1]."""
    imagenet_mean, imagenet_std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
    scale, shift = imagenet_std / torch.tensor(std), (imagenet_mean - torch.tensor(mean)) / torch.tensor(std)
    return scale.view(3, 1, 1), shift.view(3, 1, 1)


@dataclass(frozen=True)
class Crop:
    """A resize, an optional flip and a window, in pixels; the window may reach over the image's border."""

    resized: tuple[int, int]  # (H', W')
    top: int
    left: int
    side: int
    flip: bool

    def apply(self, field: Tensor, interpolation: str = "bilinear", fill: float = 0) -> Tensor:
        """Cut the window out of a field, (C, H, W) or (H, W), resized by ``bilinear``, ``bicubic`` or ``nearest``."""
        flat = field.dim() == 2
        # torchvision's bilinear and bicubic antialias, as PIL's do; its "nearest" would shift a mask against its image.
        mode = InterpolationMode("nearest-exact" if interpolation == "nearest" else interpolation)
        resized = F.resize(field[None] if flat else field, list(self.resized), mode)
        if self.flip:
            resized = resized.flip(-1)
        inside = resized[:, max(self.top, 0) : self.top + self.side, max(self.left, 0) : self.left + self.side]
        cut = F.pad(inside, self._border, fill=fill)
        return cut[0] if flat else cut

    def zero_outside(self, field: Tensor) -> Tensor:
        """Set the pixels outside the image to 0 in a field that is already cut, (..., side, side)."""
        left, top, right, bottom = self._border
        return F.pad(field[..., top : self.side - bottom, left : self.side - right], self._border)

    @property
    def _border(self) -> list[int]:
        """Columns and rows of the window outside the image: left, top, right, bottom."""
        height, width = self.resized
        end = (self.left + self.side - width, self.top + self.side - height)
        return [max(length, 0) for length in (-self.left, -self.top, *end)]


def draw_crop(size: tuple[int, int], config: TrainingConfig, generator: torch.Generator) -> Crop:
    """Draw long side, window and flip; a side shorter than the window is placed inside it at random."""
    smallest, largest = config.resize_range
    long_side = int(torch.randint(smallest, largest + 1, (), generator=generator))
    resized = scaled_size(size, long_side / max(size))

    def start(length: int) -> int:
        slack = length - config.crop_size
        offset = int(torch.randint(0, abs(slack) + 1, (), generator=generator))
        return offset if slack >= 0 else -offset

    flip = config.flip and bool(torch.rand((), generator=generator) < 0.5)
    return Crop(resized, start(resized[0]), start(resized[1]), config.crop_size, flip)


def whole_image(side: int, config: TrainingConfig, generator: torch.Generator) -> Crop:
    """The whole image as a square of that side, flipped at random."""
    return Crop((side, side), 0, 0, side, config.flip and bool(torch.rand((), generator=generator) < 0.5))


def jitter_colors(image: Tensor, strengths: tuple[float, float, float, float], generator: torch.Generator) -> Tensor:
    """Change brightness, contrast, saturation and hue (in turns of the colour wheel) of a uint8 image (3, H, W).

    Each change is drawn from plus or minus its strength; 0 draws nothing.
    """
    steps = (F.adjust_brightness, 1), (F.adjust_contrast, 1), (F.adjust_saturation, 1), (F.adjust_hue, 0)
    for (adjust, unchanged), strength in zip(steps, strengths, strict=True):
        if strength:
            draw = float(torch.rand((), generator=generator))
            image = adjust(image, unchanged + (2 * draw - 1) * strength)
    return image

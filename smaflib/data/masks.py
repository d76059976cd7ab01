"""Masks as palette PNGs in the colours of PASCAL VOC, and safe decoding of images."""

import contextlib
import io
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torchvision.transforms.v2.functional as F
from PIL import Image
from torch import Tensor

from smaflib.data.classes import VOID_LABEL
from smaflib.data.transforms import working_size
from smaflib.errors import DataError
from smaflib.files import save_image

MAX_PIXELS = 120_000_000  # largest image, saliency map or mask; a small file may decode to gigabytes

_BITS = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")  # (256, 8), lowest bit first

VOC_PALETTE = np.hstack([np.packbits(_BITS[:, channel::3], axis=1) for channel in range(3)])
"""uint8 (256, 3): the RGB colour of each mask value. Bits 0, 3, 6 of a value are the highest bits of its red, bits 1,
4, 7 of its green, bits 2, 5 of its blue, so that neighbours look different. Source: the VOC development kit."""

_COLOR_CODE = np.array((65536, 256, 1))
_NUMBER_OF_COLOR = np.zeros(2**24, dtype=np.int16)  # plus 1; 0 where a color is none of VOC's
_NUMBER_OF_COLOR[VOC_PALETTE @ _COLOR_CODE] = np.arange(1, 257)
_MASK_CURE = "save masks as 8-bit grey PNGs of class numbers, or in the colors of PASCAL VOC"


@contextlib.contextmanager
def decoding(path: Path, content: bytes | None = None) -> Iterator[Image.Image]:
    """Open a JPEG, PNG or WebP file of at most :data:`MAX_PIXELS`, or a file's content.

    A failure while the block decodes it becomes a :class:`DataError`.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # refused below
            # Without formats Pillow would hand an EPS named .jpg to Ghostscript.
            picture = Image.open(path if content is None else io.BytesIO(content), formats=("JPEG", "PNG", "WEBP"))
        with picture:
            width, height = picture.size
            if width * height > MAX_PIXELS:
                raise DataError(f"{path} has {width} x {height} pixels, more than 120 million; save it smaller")
            yield picture
    except (DataError, MemoryError):
        raise
    except Exception as error:  # Pillow raises many kinds
        raise DataError(f"{path} cannot be read as an image: {error}") from error


def read_mask(path: Path) -> Tensor:
    """Read the class numbers of a grey PNG, or of one in VOC's colours: with a palette in any order, or RGB.

    They are uint8 (H, W): 0 background, 1 to K the classes, 255 void; see :func:`check_mask_values`.
    """
    with decoding(path) as picture:
        if picture.mode not in ("P", "L", "RGB", "RGBA"):
            raise DataError(f"{path} is a picture of mode {picture.mode}; {_MASK_CURE}")
        if picture.mode == "L":
            return torch.from_numpy(np.array(picture))
        if picture.mode == "P":
            values = np.array(picture)
            used = np.flatnonzero(np.bincount(values.ravel()))
            colors = np.array(picture.getpalette()).reshape(-1, 3)[used]
            if (colors == used[:, None]).all():  # a grey ramp, which software adds to class numbers
                return torch.from_numpy(values)
        else:
            colors = np.array(picture.convert("RGB"))
        numbers = _NUMBER_OF_COLOR[colors @ _COLOR_CODE]
        if not numbers.all():
            raise DataError(f"{path} has the color {colors[numbers == 0][0].tolist()}; {_MASK_CURE}")
        if picture.mode == "P":
            number_of_value = np.zeros(256, dtype=np.int16)
            number_of_value[used] = numbers
            numbers = number_of_value[values]
        return torch.from_numpy((numbers - 1).astype(np.uint8))


def mask_values(mask: Tensor) -> list[int]:
    """The values that occur in a uint8 mask (H, W), ascending."""
    return np.flatnonzero(np.bincount(mask.numpy().ravel())).tolist()  # torch.unique sorts: 60 times as long


def strongest(scores: Tensor, dim: int = 0) -> tuple[Tensor, Tensor]:
    """Each pixel's highest score and its number, the first of equals; ValueError where no mask can be made of it."""
    if scores.shape[dim] > VOID_LABEL:
        raise ValueError(f"{scores.shape[dim]} labels do not fit into a mask of 8 bits: 254 classes and the background")
    best, number = scores.max(dim=dim)  # not argmax, which takes several times as long on the CPU
    if not best.isfinite().all():
        raise ValueError("the scores hold NaN or infinity, so they tell no label; look at the network that made them")
    return best, number


def check_mask_values(mask: Tensor, num_classes: int, path: object) -> None:
    """Refuse a mask (H, W) with values other than 0 to ``num_classes`` and 255."""
    wrong = [value for value in mask_values(mask) if num_classes < value < VOID_LABEL]
    if wrong:
        values = f"0 (background), 1 to {num_classes} and 255 (void)"
        raise DataError(f"{path} holds the value {wrong[0]}; with {num_classes} classes a mask holds {values}")


def save_mask(path: Path, mask: Tensor | np.ndarray) -> None:
    """Write a mask, (H, W) of integers from 0 to 255 (else a ValueError), as a palette PNG in VOC's colours."""
    values = mask.cpu().numpy() if isinstance(mask, Tensor) else np.asarray(mask)
    if values.dtype.kind not in "uib" or values.min() < 0 or values.max() > 255:
        raise ValueError(f"a mask must hold integers from 0 to 255, got {values.dtype} up to {values.max()}")
    picture = Image.fromarray(np.ascontiguousarray(values, dtype=np.uint8))
    picture.putpalette(VOC_PALETTE.tobytes())
    save_image(path, picture)


def resize_mask(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """A mask, uint8 (H, W), at another size: each pixel gets the label with the largest share of it."""
    labels, largest = torch.zeros(2, *size, dtype=torch.uint8)
    for value in mask_values(mask):
        share = F.resize((mask == value)[None].to(torch.uint8) * 255, list(size))[0]
        labels[share > largest] = value
        largest = largest.maximum(share)
    return labels


class MaskFiles(Sequence[Tensor]):
    """Masks of a split, uint8 (H, W) each, read when indexed; with ``longest_side`` at their working size."""

    def __init__(self, paths: Sequence[Path], longest_side: int | None = None) -> None:
        self.paths, self.longest_side = paths, longest_side

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:  # type: ignore[override]
        mask = read_mask(self.paths[index])
        return resize_mask(mask, working_size(mask.shape, self.longest_side)) if self.longest_side else mask

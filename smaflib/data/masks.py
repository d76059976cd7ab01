"""Masks as palette PNGs in the colours of PASCAL VOC, and safe decoding of images."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from smaflib.data.classes import VOID_LABEL
from smaflib.errors import DataError
from smaflib.files import save_image

MAX_PIXELS = 50_000_000
"""Largest image, saliency map or mask; a small file may decode to gigabytes."""

_BITS = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")  # (256, 8), lowest bit first

VOC_PALETTE = np.hstack([np.packbits(_BITS[:, channel::3], axis=1) for channel in range(3)])
"""uint8 (256, 3): the RGB colour of each mask value. Bits 0, 3, 6 of a value are the highest bits of its red, bits 1,
4, 7 of its green, bits 2, 5 of its blue, so that neighbours look different. Source: the VOC development kit."""


def open_picture(file: Path | BinaryIO, name: str) -> Image.Image:
    """Open a JPEG, PNG or WebP file of at most :data:`MAX_PIXELS` without decoding it; Pillow's errors pass."""
    # Pillow would hand an EPS named .jpg to Ghostscript.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # refused below
        picture = Image.open(file, formats=("JPEG", "PNG", "WEBP"))
    if picture.width * picture.height > MAX_PIXELS:
        picture.close()
        raise DataError(f"{name} has {picture.width} x {picture.height} pixels, more than 50 million; save it smaller")
    return picture


@contextlib.contextmanager
def decoding(path: Path) -> Iterator[Image.Image]:
    """Open an image; any failure while it is decoded inside the block becomes a :class:`DataError` with its path."""
    try:
        with open_picture(path, str(path)) as picture:
            yield picture
    except (DataError, MemoryError):
        raise
    except Exception as error:  # Pillow raises many kinds
        raise DataError(f"{path} cannot be read as an image: {error}") from error


def read_mask(path: Path) -> Tensor:
    """Read the class numbers of a palette or grey PNG; the colours of the palette do not matter.

    Returns:
        uint8 (H, W): 0 background, 1 to K the classes, 255 void; see :func:`check_mask_values`.
    """
    with decoding(path) as picture:
        if picture.mode not in ("P", "L"):
            raise DataError(f"{path} is a picture of mode {picture.mode}; a mask is an 8-bit palette or grey PNG")
        return torch.from_numpy(np.array(picture, dtype=np.uint8))


def mask_values(mask: Tensor) -> list[int]:
    """The values that occur in a uint8 mask (H, W), ascending."""
    return np.flatnonzero(np.bincount(mask.numpy().ravel())).tolist()  # torch.unique sorts: 60 times as long


def check_mask_values(mask: Tensor, num_classes: int, path: object) -> None:
    """Refuse a mask (H, W) with values other than 0 to ``num_classes`` and 255."""
    wrong = [value for value in mask_values(mask) if num_classes < value < VOID_LABEL]
    if wrong:
        raise DataError(
            f"{path} holds the value {wrong[0]}; with {num_classes} classes a mask holds 0 (background), 1 to "
            f"{num_classes} and 255 (void)"
        )


def save_mask(path: Path, mask: Tensor | np.ndarray) -> None:
    """Write a mask, (H, W) of integers from 0 to 255, as a palette PNG in VOC's colours; :func:`read_mask` reads it.

    Raises:
        ValueError: if it holds other values; nothing is written.
    """
    values = mask.cpu().numpy() if isinstance(mask, Tensor) else np.asarray(mask)
    if values.dtype.kind not in "uib" or values.min() < 0 or values.max() > 255:
        raise ValueError(f"a mask must hold integers from 0 to 255, got {values.dtype} up to {values.max()}")
    picture = Image.fromarray(np.ascontiguousarray(values, dtype=np.uint8))
    picture.putpalette(VOC_PALETTE.tobytes())
    save_image(path, picture)


class MaskFiles(Sequence[Tensor]):
    """Masks of a split, uint8 (H, W) each, read when indexed."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:  # type: ignore[override]
        return read_mask(self.paths[index])

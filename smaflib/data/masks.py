"""Masks as palette PNGs in the colours of PASCAL VOC, and safe decoding of images."""

from __future__ import annotations

import contextlib
import os
import struct
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


def _voc_palette() -> np.ndarray:
    palette = np.zeros((256, 3), dtype=np.uint8)
    numbers = np.arange(256)
    for bit in range(8):
        for channel in range(3):
            palette[:, channel] |= (((numbers >> (3 * bit + channel)) & 1) << (7 - bit)).astype(np.uint8)
    palette.setflags(write=False)
    return palette


VOC_PALETTE = _voc_palette()
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
    damage = (OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error, Image.DecompressionBombError)
    try:
        with open_picture(path, str(path)) as picture:
            yield picture
    except DataError:
        raise
    except (FileNotFoundError, PermissionError) as error:
        raise DataError(f"{path} cannot be opened: {error.strerror}") from error
    except damage as error:
        raise DataError(f"{path} cannot be decoded ({error}): it is damaged or no image; save it again") from error


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


def check_mask_values(mask: Tensor, num_classes: int, path: Path) -> None:
    """Refuse a mask (H, W) with values other than 0 to ``num_classes`` and 255."""
    wrong = [value for value in mask_values(mask) if num_classes < value < VOID_LABEL]
    if wrong:
        raise DataError(
            f"{path} holds the value {wrong[0]}; with {num_classes} classes a mask holds 0 (background), 1 to "
            f"{num_classes} and 255 (void)"
        )


def save_mask(path: Path, mask: Tensor | np.ndarray) -> None:
    """Write a mask as a palette PNG in VOC's colours, atomically; :func:`read_mask` reads it back.

    Args:
        path: ends in ``.png``.
        mask: (H, W), integer or boolean, values 0 to 255.

    Raises:
        ValueError: if shape, type, a value or the extension does not fit.
    """
    values = mask.detach().cpu().numpy() if isinstance(mask, Tensor) else np.asarray(mask)
    if path.suffix.lower() != ".png":
        raise ValueError(f"a mask must be saved as .png, which keeps class numbers exact, got {path.name}")
    if values.ndim != 2 or values.size == 0 or values.dtype.kind not in "uib":
        raise ValueError(f"a mask must be integers (H, W), got {values.dtype} {values.shape}")
    if values.min() < 0 or values.max() > 255:
        raise ValueError(f"a mask must hold 0 to 255, got {values.min()} to {values.max()}")
    picture = Image.fromarray(np.ascontiguousarray(values, dtype=np.uint8))
    picture.putpalette(VOC_PALETTE.tobytes())
    save_image(path, picture)


class MaskFiles(Sequence[Tensor]):
    """Masks of a split, uint8 (H, W) each, read when indexed.

    Args:
        paths: one palette PNG per image.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = list(paths)
        # A folder is listed once: asking for each of 10,000 files takes long on a network disk.
        folders = {path.parent for path in self.paths}
        there = {folder: set(os.listdir(folder)) if folder.is_dir() else set() for folder in folders}
        if missing := [path for path in self.paths if path.name not in there[path.parent]]:
            raise DataError(f"{len(missing)} of {len(self.paths)} masks are missing, the first is {missing[0]}")

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:  # type: ignore[override]
        return read_mask(self.paths[index])

"""Masks as palette PNGs, in the colours of PASCAL VOC."""

from __future__ import annotations

import contextlib
import struct
import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from smaflib.data.classes import VOID_LABEL
from smaflib.data.sample import Samples
from smaflib.errors import DataError
from smaflib.files import names_there, save_image

# What Pillow raises on damaged files, found by cutting and flipping bytes of real ones.
_DAMAGE = (OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error, Image.DecompressionBombError)


PICTURE_FORMATS = ("JPEG", "PNG", "WEBP")
MAX_PIXELS = 50_000_000
"""Of an image, saliency map or mask; a small file may ask for gigabytes."""


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
    """Open a JPEG, PNG or WebP file of bearable size, not decoded yet.

    Raises:
        DataError: if it has more than :data:`MAX_PIXELS`.
        Exception: a dozen kinds of Pillow's, if it is no picture or damaged.
    """
    # Pillow would hand an EPS named .jpg to Ghostscript, and knows formats that nobody keeps photos in.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # refused below, with the numbers
        picture = Image.open(file, formats=PICTURE_FORMATS)
    if picture.width * picture.height > MAX_PIXELS:
        picture.close()
        raise DataError(
            f"{name} has {picture.width} x {picture.height} pixels, more than {MAX_PIXELS / 1e6:.0f} million, "
            "which need gigabytes at four scales; save it smaller"
        )
    return picture


@contextlib.contextmanager
def decoding(path: Path) -> Iterator[Image.Image]:
    """Open a picture; whatever goes wrong while it is decoded inside the block becomes a :class:`DataError`.

    Raises:
        DataError: if the file is missing, is no picture, or is truncated or damaged.
    """
    try:
        with open_picture(path, str(path)) as picture:
            yield picture
    except DataError:
        raise
    except FileNotFoundError as error:
        raise DataError(f"there is no file {path}; was it moved after the data set was loaded?") from error
    except PermissionError as error:
        raise DataError(f"{path} cannot be opened: {error}; allow this user to read it") from error
    except _DAMAGE as error:
        raise DataError(
            f"{path} cannot be decoded: {error}; the file is truncated or damaged, or no picture: fetch or save it "
            "again, or take it off the list of images"
        ) from error


def read_mask(path: Path) -> Tensor:
    """Read the class numbers of a palette or grey PNG; the palette's colours do not matter.

    Returns:
        uint8 (H, W): 0 background, 1 to K the classes, 255 void. The values are not checked against K here, see
        :func:`check_mask_values`.

    Raises:
        DataError: if the file is missing or damaged, or holds colours (RGB) instead of class numbers.
    """
    with decoding(path) as picture:
        if picture.mode not in ("P", "L"):
            raise DataError(
                f"{path} is a picture of mode {picture.mode}, whose pixels are no class numbers; convert the mask to "
                "an 8-bit palette (or grey) PNG, where the value of a pixel is the number of its class "
                "(smaflib.data.masks.save_mask writes one)"
            )
        return torch.from_numpy(np.array(picture, dtype=np.uint8))


def mask_values(mask: Tensor) -> list[int]:
    """The values that occur in a uint8 mask (H, W), in rising order."""
    # torch.unique sorts every pixel: 94 ms for 640 x 480 on two busy cores, against 1.5 ms of counting.
    return np.flatnonzero(np.bincount(mask.numpy().ravel())).tolist()


def check_mask_values(mask: Tensor, num_classes: int, path: Path) -> None:
    """Refuse a mask (H, W) with values that are neither 0 to ``num_classes`` nor 255.

    Raises:
        DataError: naming ``path``, the value and the number of classes.
    """
    wrong = [value for value in mask_values(mask) if num_classes < value < VOID_LABEL]
    if wrong:
        raise DataError(
            f"{path} holds the value {wrong[0]}, but there are {num_classes} classes: a mask holds 0 "
            f"(background), 1 to {num_classes} and 255 (void); correct the mask or data.class_names"
        )


def save_mask(path: Path, mask: Tensor | np.ndarray) -> None:
    """Write a mask as a palette PNG in VOC's colours, all or nothing; :func:`read_mask` reads it back.

    Args:
        path: ends in ``.png``; folders are made.
        mask: (H, W) of whole numbers (or booleans) in 0 to 255.

    Raises:
        ValueError: if the shape, type, a value or the ending does not fit.
    """
    values = mask.detach().cpu().numpy() if isinstance(mask, Tensor) else np.asarray(mask)
    if path.suffix.lower() != ".png":
        raise ValueError(f"a mask must be saved as .png, which keeps class numbers exact, got {path.name}")
    if values.ndim != 2 or values.size == 0:
        raise ValueError(f"mask must be (H, W) with at least one pixel, got {values.shape}")
    if values.dtype.kind not in "uib":
        raise ValueError(f"mask must hold whole numbers, got {values.dtype}; take the argmax of scores first")
    if values.min() < 0 or values.max() > 255:
        raise ValueError(f"mask must hold 0 to 255, got {values.min()} to {values.max()}")
    picture = Image.fromarray(np.ascontiguousarray(values, dtype=np.uint8))
    picture.putpalette(VOC_PALETTE.tobytes())
    save_image(path, picture)


class MaskFiles(Sequence[Tensor]):
    """Masks of a split, uint8 (H, W) each, read when asked for.

    Args:
        paths: one palette PNG per image.

    Raises:
        DataError: if any of them is missing.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = list(paths)
        by_folder: dict[Path, list[str]] = defaultdict(list)
        for path in self.paths:
            by_folder[path.parent].append(path.name)
        there = {folder: names_there(folder, names) for folder, names in by_folder.items()}
        if missing := [path for path in self.paths if path.name not in there[path.parent]]:
            raise DataError(f"{len(missing)} of {len(self.paths)} masks are missing, the first is {missing[0]}")

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:  # type: ignore[override]
        return read_mask(self.paths[index])


def ground_truth_of(samples: Samples) -> MaskFiles | None:
    """The ground truth masks of a split, for evaluation; None where the data has none."""
    return MaskFiles([files.mask for files in samples.files if files.mask]) if samples.has_ground_truth else None

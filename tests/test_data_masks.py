"""Masks as palette PNGs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from smaflib.data.masks import VOC_PALETTE, read_mask, resize_mask, save_mask
from smaflib.errors import DataError

MASKS = hnp.arrays(np.uint8, hnp.array_shapes(min_dims=2, max_dims=2, max_side=40))


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(mask=MASKS, as_tensor=st.booleans())
def test_saved_mask_reads_back_unchanged(tmp_path: Path, mask: np.ndarray, as_tensor: bool) -> None:
    path = tmp_path / "mask.png"
    save_mask(path, torch.from_numpy(mask) if as_tensor else mask)
    again = read_mask(path)
    assert again.dtype == torch.uint8 and np.array_equal(again.numpy(), mask)
    with Image.open(path) as picture:
        assert np.array_equal(np.asarray(picture.convert("RGB")), VOC_PALETTE[mask])
    assert [file.name for file in tmp_path.iterdir()] == ["mask.png"]  # nothing temporary stays


def test_palette_has_the_published_colours() -> None:
    # aeroplane, bicycle, person, tvmonitor and the void border, as the VOC development kit prints them.
    published = {0: [0, 0, 0], 1: [128, 0, 0], 2: [0, 128, 0], 15: [192, 128, 128], 20: [0, 64, 128]}
    published[255] = [224, 224, 192]
    assert {value: VOC_PALETTE[value].tolist() for value in published} == published
    assert len({tuple(colour) for colour in VOC_PALETTE.tolist()}) == 256


@pytest.mark.parametrize(
    ("mode", "kind", "words"),
    [
        ("I;16", "PNG", "mode I;16; save masks as 8-bit grey PNGs of class numbers"),
        ("RGB", "EPS", "cannot be read as an image"),  # Pillow would start Ghostscript
        (None, None, "cannot be read as an image: .*No such file"),
    ],
)
def test_file_that_is_no_mask_is_named(tmp_path: Path, mode: str, kind: str, words: str) -> None:
    if mode:
        Image.new(mode, (4, 4)).save(tmp_path / "cat.png", kind)
    with pytest.raises(DataError, match=rf"cat\.png .*{words}"):
        read_mask(tmp_path / "cat.png")


def test_picture_that_asks_for_gigabytes_is_refused_by_its_header(tmp_path: Path) -> None:
    Image.new("1", (13_000, 13_000)).save(tmp_path / "huge.png")
    assert (tmp_path / "huge.png").stat().st_size < 50_000
    with pytest.raises(DataError, match=r"huge\.png has 13000 x 13000 pixels, more than 120 million"):
        read_mask(tmp_path / "huge.png")


# Row and column: background, aeroplane (1), person (15), void (255) of VOC.
NUMBERS = np.array([[0, 1], [15, 255]], np.uint8)
ORDERS = {"by use": [0, 1, 15, 255], "reversed": [255, 15, 1, 0], "with unused colours": [7, 255, 15, 1, 0, 20]}


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
def test_palette_that_an_editor_has_sorted_is_read_by_colour(tmp_path: Path, order: list[int]) -> None:
    picture = Image.fromarray(np.array([[order.index(n) for n in row] for row in NUMBERS.tolist()], np.uint8))
    picture.putpalette(VOC_PALETTE[order].tobytes())
    picture.save(tmp_path / "a.png")
    assert np.array_equal(read_mask(tmp_path / "a.png"), NUMBERS)


def test_grey_palette_holds_class_numbers(tmp_path: Path) -> None:
    picture = Image.fromarray(NUMBERS)
    picture.putpalette(np.arange(256, dtype=np.uint8).repeat(3).tobytes())
    picture.save(tmp_path / "a.png")
    assert np.array_equal(read_mask(tmp_path / "a.png"), NUMBERS)


@pytest.mark.parametrize("mode", ["RGB", "P"])
def test_colour_that_is_none_of_vocs_is_named(tmp_path: Path, mode: str) -> None:
    pixels = VOC_PALETTE[NUMBERS]
    pixels[0, 1] = 255, 128, 0
    Image.fromarray(pixels).convert(mode, palette=Image.Palette.ADAPTIVE).save(tmp_path / "a.png")
    with pytest.raises(DataError, match=r"a\.png has the color \[255, 128, 0\]; save masks as 8-bit grey PNGs"):
        read_mask(tmp_path / "a.png")


def test_resized_mask_gives_each_pixel_the_label_of_most_of_it() -> None:
    rows = [[0, 0, 0, 3], [0, 3, 3, 3], [255, 255, 3, 3], [255, 0, 3, 3]]
    mask = torch.tensor(rows, dtype=torch.uint8)
    assert resize_mask(mask, (4, 4)).tolist() == rows
    assert resize_mask(mask, (2, 2)).tolist() == [[0, 3], [255, 3]]
    assert resize_mask(mask, (40, 40))[5::10, 5::10].tolist() == rows


@pytest.mark.parametrize("mask", [np.zeros((4, 4), np.float32), np.array([[0, 256]]), np.array([[-1, 0]])], ids=str)
def test_unfit_mask_is_refused_and_leaves_no_file(tmp_path: Path, mask: np.ndarray) -> None:
    with pytest.raises(ValueError, match="integers from 0 to 255, got"):
        save_mask(tmp_path / "a.png", mask)
    assert not list(tmp_path.iterdir())

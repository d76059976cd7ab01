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

from smaflib.data.masks import VOC_PALETTE, check_mask_values, read_mask, save_mask
from smaflib.errors import DataError

MASKS = hnp.arrays(np.uint8, hnp.array_shapes(min_dims=2, max_dims=2, max_side=40))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
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
        ("RGB", "PNG", "mode RGB; a mask is an 8-bit palette or grey PNG"),
        ("I;16", "PNG", "mode I;16"),
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
    with pytest.raises(DataError, match=r"huge\.png has 13000 x 13000 pixels, more than 50 million"):
        read_mask(tmp_path / "huge.png")


def test_value_beyond_the_classes_is_named_with_their_count() -> None:
    check_mask_values(torch.tensor([[0, 1, 2, 255]], dtype=torch.uint8), 2, Path("cat.png"))
    with pytest.raises(DataError, match=r"cat\.png holds the value 7; with 2 classes"):
        check_mask_values(torch.tensor([[0, 7, 255]], dtype=torch.uint8), 2, Path("cat.png"))


@pytest.mark.parametrize("mask", [np.zeros((4, 4), np.float32), np.array([[0, 256]]), np.array([[-1, 0]])], ids=str)
def test_unfit_mask_is_refused_and_leaves_no_file(tmp_path: Path, mask: np.ndarray) -> None:
    with pytest.raises(ValueError, match="integers from 0 to 255, got"):
        save_mask(tmp_path / "a.png", mask)
    assert not list(tmp_path.iterdir())

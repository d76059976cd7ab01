"""Normalisation, crops and colour jitter."""

from __future__ import annotations

import pytest
import torch
from helpers import generator
from hypothesis import given, settings
from hypothesis import strategies as st

from smaflib.config import TrainingConfig
from smaflib.data.transforms import Crop, draw_crop, jitter_colors, normalize, whole_image


def coordinates(height: int, width: int) -> torch.Tensor:
    """(2, H, W) float32: each pixel's row and column."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([rows, columns]).float()


# --- normalize --------------------------------------------------------------------------------------------------------


def test_normalize_by_hand() -> None:
    image = torch.tensor([0, 255, 51], dtype=torch.uint8).view(3, 1, 1)
    expected = torch.tensor([(0 - 0.485) / 0.229, (1 - 0.456) / 0.224, (0.2 - 0.406) / 0.225])
    torch.testing.assert_close(normalize(image).flatten(), expected)
    torch.testing.assert_close(normalize(image[None])[0].flatten(), expected)


# --- Crop -------------------------------------------------------------------------------------------------------------


def test_window_inside_the_image() -> None:
    field = coordinates(4, 6)
    cut = Crop(resized=(4, 6), top=1, left=2, side=3, flip=False).apply(field)
    assert cut[0].tolist() == [[1, 1, 1], [2, 2, 2], [3, 3, 3]]
    assert cut[1].tolist() == [[2, 3, 4]] * 3


def test_window_over_the_border_is_filled() -> None:
    crop = Crop(resized=(2, 3), top=-1, left=-1, side=4, flip=False)
    mask = torch.tensor([[1, 2, 3], [4, 5, 6]], dtype=torch.uint8)
    expected = [[255, 255, 255, 255], [255, 1, 2, 3], [255, 4, 5, 6], [255, 255, 255, 255]]
    assert crop.apply(mask, "nearest", fill=255).tolist() == expected
    inside = crop.zero_outside(torch.ones(2, 4, 4))
    assert inside[0].tolist() == inside[1].tolist() == [[0, 0, 0, 0], [0, 1, 1, 1], [0, 1, 1, 1], [0, 0, 0, 0]]


def test_whole_image_is_squashed_and_flipped_half_of_the_time() -> None:
    field, source = coordinates(4, 8), generator(0)
    crops = [whole_image(4, TrainingConfig(whole_images=True), source) for _ in range(40)]
    assert 10 < sum(crop.flip for crop in crops) < 30
    squares = {crop.flip: crop.apply(field, "nearest") for crop in crops}
    assert squares[False][0].tolist() == [[0] * 4, [1] * 4, [2] * 4, [3] * 4]
    assert torch.equal(squares[True], squares[False].flip(-1)) and squares[False][1, 0, 0] < squares[False][1, 0, 3]
    assert not any(whole_image(4, TrainingConfig(flip=False), source).flip for _ in range(20))


@settings(max_examples=20)
@given(
    height=st.integers(20, 60),
    width=st.integers(20, 60),
    long_side=st.integers(16, 100),
    side=st.integers(8, 40),
    seed=st.integers(0, 2**20),
)
def test_image_and_mask_are_cut_alike(height: int, width: int, long_side: int, side: int, seed: int) -> None:
    """The image holds its own coordinates, the mask too: after the crop they must still agree."""
    config = TrainingConfig(crop_size=side, resize_range=(long_side, long_side))
    crop = draw_crop((height, width), config, generator(seed))
    field = coordinates(height, width)
    image, inside = crop.apply(field, "bilinear"), crop.apply(torch.ones(height, width)) > 0.999
    mask = torch.stack([crop.apply(part.byte(), "nearest", fill=255) for part in field]).float()
    assert torch.equal(inside, mask[0] != 255)

    # A smoothed ramp stays itself but at the border, where the kernel is cut off.
    scale = max(height / crop.resized[0], width / crop.resized[1], 1.0)
    limits = torch.tensor([height - 1, width - 1])[:, None, None]
    away = inside & ((image > scale) & (image < limits - scale)).all(dim=0)
    assert ((image - mask).abs() * away).max() <= 0.51  # nearest: half a pixel of the original at most
    assert torch.equal(crop.zero_outside(image), image)


@settings(max_examples=20)
@given(seed=st.integers(0, 2**20), height=st.integers(1, 300), width=st.integers(1, 300))
def test_drawn_crop_covers_as_much_image_as_it_can(seed: int, height: int, width: int) -> None:
    config = TrainingConfig(crop_size=32, resize_range=(20, 50))
    crop = draw_crop((height, width), config, generator(seed))
    assert 20 <= max(crop.resized) <= 50 and min(crop.resized) >= 1
    assert abs(crop.resized[0] * width - crop.resized[1] * height) <= max(height, width)  # equal but for rounding
    for start, length in zip((crop.top, crop.left), crop.resized, strict=True):
        if length >= 32:
            assert 0 <= start <= length - 32  # the window lies inside the image
        else:
            assert length - 32 <= start <= 0  # the image lies inside the window
    assert crop == draw_crop((height, width), config, generator(seed))


# --- jitter_colors ----------------------------------------------------------------------------------------------------


def picture() -> torch.Tensor:
    return torch.randint(0, 256, (3, 6, 5), dtype=torch.uint8, generator=generator(0))


def test_brightness_is_a_factor_within_its_range() -> None:
    grey = torch.full((3, 2, 2), 100, dtype=torch.uint8)
    values = {int(jitter_colors(grey, (0.3, 0, 0, 0), generator(seed))[0, 0, 0]) for seed in range(100)}
    assert 70 <= min(values) <= 75 and 125 <= max(values) <= 130


@pytest.mark.parametrize("position", range(4))
def test_every_strength_has_an_effect_that_the_seed_repeats(position: int) -> None:
    strengths = tuple(0.3 if index == position else 0.0 for index in range(4))
    one, again = (jitter_colors(picture(), strengths, generator(3)) for _ in range(2))  # type: ignore[arg-type]
    assert one.dtype == torch.uint8 and one.shape == picture().shape
    assert torch.equal(one, again) and not torch.equal(one, picture())

"""Colour-blind readers can tell the class colours apart."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from smaflib.report.palette import CLASS_COLORS, class_colors

# Machado, Oliveira and Fernandes, "A Physiologically-based Model for Simulation of Color Vision Deficiency", IEEE
# TVCG 15(6), 2009: severity 1.0, for linear RGB.
SIGHT = {
    "normal": np.eye(3),
    "protanopia": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    "deuteranopia": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    ),
}
TO_XYZ = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.072175], [0.0193339, 0.119192, 0.9503041]]
)


def linear(color: str) -> np.ndarray:
    values = np.array(list(bytes.fromhex(color[1:]))) / 255
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def lab(rgb: np.ndarray) -> np.ndarray:
    """CIE L*a*b* of linear RGB in [0, 1], white point D65."""
    x, y, z = np.where(
        (t := TO_XYZ @ rgb / TO_XYZ.sum(axis=1)) > (6 / 29) ** 3, np.cbrt(t), t / (3 * (6 / 29) ** 2) + 4 / 29
    )
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def nearest(colors: tuple[str, ...], sight: str) -> float:
    seen = [lab(np.clip(SIGHT[sight] @ linear(color), 0, 1)) for color in colors]
    return min(float(np.linalg.norm(one - two)) for one, two in itertools.combinations(seen, 2))


@pytest.mark.parametrize("sight", SIGHT)
def test_no_two_class_colours_are_closer_than_19(sight: str) -> None:
    assert nearest(CLASS_COLORS, sight) >= 19
    # What the test is for: the first colours of VOC's palette, dark red and green, would not pass it.
    assert sight == "normal" or nearest(("#800000", "#008000", "#808000"), sight) < 19


def test_a_class_keeps_its_colour_whatever_else_there_is() -> None:
    assert class_colors(20)[:3] == class_colors(3) == [[230, 159, 0], [86, 180, 233], [0, 158, 115]]
    assert len(class_colors(80)) == 80 and class_colors(80)[23] == class_colors(1)[0]

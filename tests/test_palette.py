"""Colour-blind readers can tell the class colours apart, and a scale looks the same in all plots."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
import pytest

from smaflib.report.palette import CLASS_COLORS, SCALES, class_colors, scale_style
from smaflib.report.plots import plot_curves

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


def ciede2000(one: np.ndarray, two: np.ndarray) -> float:
    """Colour difference; Sharma, Wu and Dalal, Color Research and Application 30(1), 2005."""
    (l1, a1, b1), (l2, a2, b2) = one, two
    chroma = (np.hypot(a1, b1) + np.hypot(a2, b2)) / 2
    g = 0.5 * (1 - np.sqrt(chroma**7 / (chroma**7 + 25.0**7)))
    a1, a2 = (1 + g) * a1, (1 + g) * a2
    c1, c2 = np.hypot(a1, b1), np.hypot(a2, b2)
    h1, h2 = np.degrees(np.arctan2(b1, a1)) % 360, np.degrees(np.arctan2(b2, a2)) % 360
    grey = c1 * c2 == 0
    turn = 0 if grey else (h2 - h1 + 180) % 360 - 180
    hue = 2 * np.sqrt(c1 * c2) * np.sin(np.radians(turn) / 2)
    mean_l, mean_c = (l1 + l2) / 2, (c1 + c2) / 2
    mean_h = h1 + h2 if grey else (h1 + turn / 2) % 360
    t = 1 - 0.17 * np.cos(np.radians(mean_h - 30)) + 0.24 * np.cos(np.radians(2 * mean_h))
    t += 0.32 * np.cos(np.radians(3 * mean_h + 6)) - 0.2 * np.cos(np.radians(4 * mean_h - 63))
    s_l = 1 + 0.015 * (mean_l - 50) ** 2 / np.sqrt(20 + (mean_l - 50) ** 2)
    s_c, s_h = 1 + 0.045 * mean_c, 1 + 0.015 * mean_c * t
    rotation = -2 * np.sqrt(mean_c**7 / (mean_c**7 + 25.0**7))
    rotation *= np.sin(np.radians(60 * np.exp(-(((mean_h - 275) / 25) ** 2))))
    parts = (l2 - l1) / s_l, (c2 - c1) / s_c, hue / s_h
    return float(np.sqrt(sum(part**2 for part in parts) + rotation * parts[1] * parts[2]))


@pytest.mark.parametrize(
    ("one", "two", "difference"),
    [
        ((50, 2.6772, -79.7751), (50, 0, -82.7485), 2.0425),
        ((50, 2.49, -0.001), (50, -2.49, 0.0009), 7.1792),
        ((60.2574, -34.0099, 36.2677), (60.4626, -34.1751, 39.4387), 1.2644),
        ((22.7233, 20.0904, -46.694), (23.0331, 14.973, -42.5619), 2.0373),
    ],
)
def test_the_measure_gives_the_published_differences(one: tuple, two: tuple, difference: float) -> None:
    assert ciede2000(np.array(one, dtype=float), np.array(two, dtype=float)) == pytest.approx(difference, abs=1e-4)


def nearest(colors: tuple[str, ...], sight: str) -> float:
    seen = [lab(np.clip(SIGHT[sight] @ linear(color), 0, 1)) for color in colors]
    return min(ciede2000(one, two) for one, two in itertools.combinations(seen, 2))


@pytest.mark.parametrize("sight", SIGHT)
def test_no_two_class_colours_are_closer_than_15(sight: str) -> None:
    assert nearest(CLASS_COLORS, sight) >= 15
    # What the test is for: the first colours of VOC's palette, dark red and green, would not pass it.
    assert sight == "normal" or nearest(("#800000", "#008000", "#808000"), sight) < 15


def test_a_class_keeps_its_colour_whatever_else_there_is() -> None:
    assert class_colors(20)[:3] == class_colors(3) == [[230, 159, 0], [86, 180, 233], [0, 158, 115]]
    assert len(class_colors(80)) == 80 and class_colors(80)[12] == class_colors(1)[0]


def test_each_scale_has_its_own_style_in_all_plots() -> None:
    looks = [tuple(map(str, scale_style(scale).values())) for scale in SCALES]
    assert len(set(looks)) == len(SCALES)
    assert len({scale_style(scale)["linestyle"] for scale in (0.5, 1.0, 1.5, 2.0)}) == 4  # readable in grey, too
    curves = pd.DataFrame({"teacher, scale 2": [0.2, 0.4], "fused (sum)": [0.5, 0.5]})
    drawn = [(line.get_color(), line.get_linestyle()) for line in plot_curves(curves, "IoU").axes[0].lines]
    assert drawn == [(scale_style(2.0)["color"], scale_style(2.0)["linestyle"]), ("black", "-")]

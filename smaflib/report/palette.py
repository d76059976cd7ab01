"""Colours of what is drawn: the same class and the same scale look the same in every figure, page and plot.

Masks are stored in VOC's palette, the format of the field (:data:`smaflib.data.masks.VOC_PALETTE`); but its dark red
and its green are one colour to a colour-blind reader. What is drawn takes the colours below.
"""

from __future__ import annotations

from typing import Any

CLASS_COLORS = (
    "#e69f00",
    "#56b4e9",
    "#009e73",
    "#78004b",
    "#d2ff96",
    "#0072b2",
    "#966900",
    "#b4ffe1",
    "#0000c3",
    "#2d3c00",
    "#a5f0ff",
    "#3c8787",
)
"""Any two differ by a CIEDE2000 of at least 15, for normal sight, deuteranopia and protanopia alike: the four of Okabe
and Ito's set that do, then the farthest ones of a grid over all colours, one after the other. Thirteen were the most
that a search found; so from the thirteenth class on colours come again, and no class changes its colour from picture
to picture. Names written on the regions tell apart what has one colour (:func:`smaflib.report.plots.show_panels`)."""

LINE_COLORS = ("#0072b2", "#e69f00", "#009e73", "#78004b", "#56b4e9", "#966900")
"""Those of :data:`CLASS_COLORS` that are dark enough for a line on white."""

LINE_STYLES: tuple[Any, ...] = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1)))
"""Beside the colours, so that a plot reads in grey, too."""

SIZE_COLORS = {"small": "#0072b2", "medium": "#e69f00", "large": "#009e73"}
SIZE_HATCHES = {"small": "", "medium": "//", "large": ".."}

SCALES = (0.5, 1.0, 1.5, 2.0, 0.75, 1.25, 0.25, 1.75, 2.5, 3.0)
"""The paper's first: each has a line of its own, in all plots of all runs."""


def class_color(number: int) -> str:
    """``#rrggbb`` of a class, by its number, 0 to K-1."""
    return CLASS_COLORS[number % len(CLASS_COLORS)]


def class_colors(num_classes: int) -> list[list[int]]:
    """RGB of each class, K times three numbers in 0 to 255."""
    return [list(bytes.fromhex(class_color(number)[1:])) for number in range(num_classes)]


def line_style(number: int) -> dict[str, Any]:
    """Colour and dash of the ``number``-th line of a plot, as matplotlib's keywords."""
    return {
        "color": LINE_COLORS[number % len(LINE_COLORS)],
        # Once all colours are used, they come again with other dashes.
        "linestyle": LINE_STYLES[(number + number // len(LINE_COLORS)) % len(LINE_STYLES)],
    }


def scale_style(scale: float) -> dict[str, Any]:
    """Colour and dash of a scale, which depend on the scale alone: the same in all plots of all runs."""
    return line_style(SCALES.index(scale) if scale in SCALES else len(SCALES) + round(4 * scale))


def fused_style(number: int = 0) -> dict[str, Any]:
    """Colour and dash of the ``number``-th fusion of all scales: black, which no scale is."""
    return {"color": "black", "linestyle": LINE_STYLES[number % len(LINE_STYLES)], "linewidth": 2.0}

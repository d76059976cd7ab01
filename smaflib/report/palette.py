"""Colours of classes and scales, the same in every figure, page and plot.

Masks are stored in VOC's palette (:data:`smaflib.data.masks.VOC_PALETTE`), whose dark red and green look alike to a
colour-blind reader; figures use the colours below.
"""

from typing import Any

CLASS_COLORS = tuple(
    "#e69f00 #56b4e9 #009e73 #78004b #d2ff96 #0072b2 #966900 #b4ffe1 #0000c3 #2d3c00 #a5f0ff #3c8787 #000069 #0078ff "
    "#ffff00 #69b45a #3c3cb4 #b42d3c #5ac3b4 #69d296 #870f78 #fff069 #0f96f0".split()
)
"""Any two are at least 19 apart in CIELAB, for normal sight, deuteranopia and protanopia: four of Okabe and Ito's
set, then one by one the farthest of a grid without very dark and pale colours. They repeat from the 24th class on."""

LINE_COLORS = ("#0072b2", "#e69f00", "#009e73", "#78004b", "#56b4e9", "#966900")
"""Colours of :data:`CLASS_COLORS` that are dark enough for a line on white."""

LINE_STYLES: tuple[Any, ...] = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1)))  # apart in grey, too

SIZE_COLORS = {"small": "#0072b2", "medium": "#e69f00", "large": "#009e73"}
SIZE_HATCHES = {"small": "", "medium": "//", "large": ".."}

SCALES = (0.5, 1.0, 1.5, 2.0, 0.75, 1.25, 0.25, 1.75, 2.5, 3.0)  # with a fixed line style, the paper's first


def class_color(number: int) -> str:
    """``#rrggbb`` of a class by its number, 0 to K-1."""
    return CLASS_COLORS[number % len(CLASS_COLORS)]


def class_colors(num_classes: int) -> list[list[int]]:
    """RGB of each class in 0 to 255, K lists of three numbers."""
    return [list(bytes.fromhex(class_color(number)[1:])) for number in range(num_classes)]


def line_style(number: int) -> dict[str, Any]:
    """Colour and dash of the ``number``-th line of a plot, as keywords of matplotlib."""
    return {
        "color": LINE_COLORS[number % len(LINE_COLORS)],
        # Colours that repeat get other dashes.
        "linestyle": LINE_STYLES[(number + number // len(LINE_COLORS)) % len(LINE_STYLES)],
    }


def scale_style(scale: float) -> dict[str, Any]:
    """Colour and dash of a scale, the same in all plots of all runs."""
    return line_style(SCALES.index(scale) if scale in SCALES else len(SCALES) + round(4 * scale))

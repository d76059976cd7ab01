"""Pictures that carry numbers: their pixels and lines say what they should."""

from __future__ import annotations

import io
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.figure import Figure

from smaflib.report.palette import class_colors
from smaflib.report.plots import (
    BOTH,
    GAINED,
    LOST,
    _apart,
    draw_outline,
    draw_pixel_row,
    overlay_alternatives,
    overlay_changes,
    overlay_mask,
    picture,
    show_panels,
    show_scales,
    window_around,
)

matplotlib.use("agg")


def test_names_that_would_cover_each_other_get_a_line_each():
    near = _apart([(50, 40, "llama"), (52, 44, "crane"), (51, 100, "plant")], (120, 120))
    assert near == ((50, 40, "llama"), (51, 100, "plant"), (60, 44, "crane"))


def test_changes_are_blue_where_gained_and_orange_where_lost() -> None:
    image = torch.full((3, 4, 4), 100, dtype=torch.uint8)
    ground_truth = torch.zeros(4, 4, dtype=torch.uint8)
    before, after = ground_truth.clone(), ground_truth.clone()
    before[0, 0], after[3, 3] = 1, 1
    ground_truth[0, 3] = 255
    before[0, 3] = 1
    panel = overlay_changes(image, before, after, ground_truth, opacity=1)
    assert tuple(panel[0, 0]) == GAINED and tuple(panel[3, 3]) == LOST
    assert tuple(panel[1, 1]) == (100, 100, 100) and tuple(panel[0, 3]) == (100, 100, 100)


def test_alternatives_are_blue_orange_or_green_where_they_differ_from_the_mask_in_use() -> None:
    image, used = torch.full((3, 4, 4), 100, dtype=torch.uint8), torch.zeros(4, 4, dtype=torch.uint8)
    low, high = used.clone(), used.clone()
    low[0, 0] = high[3, 3] = low[0, 3] = 1
    high[0, 3] = 2  # another label than low's, and than the one in use
    panel = overlay_alternatives(image, low, used, high, opacity=1)
    assert [tuple(panel[place]) for place in ((0, 0), (3, 3), (0, 3))] == [GAINED, LOST, BOTH]
    assert tuple(panel[1, 1]) == (100, 100, 100)


def test_row_of_pixels_has_an_axis_per_step_and_the_background_where_it_joins() -> None:
    fused = torch.tensor([[0.2, 0.9, 0.1], [0.5, 0.4, 0.3]])
    steps = {"fused": fused, "with background": torch.cat([torch.full((1, 3), 0.35), fused])}
    figure, axes = plt.subplots(2)
    draw_pixel_row(axes, steps, ["ram", "crane"], [True, False], torch.tensor([0, 1, 0], dtype=torch.uint8))
    drawn = [[line.get_label() for line in axis.lines if not line.get_label().startswith("_")] for axis in figure.axes]
    assert drawn == [["ram"], ["background", "ram"]]
    labelled = next(line for line in figure.axes[1].lines if line.get_label() == "ram")
    assert np.allclose(labelled.get_ydata(), [0.2, 0.9, 0.1])


def test_masks_are_drawn_in_the_class_colours() -> None:
    image, mask = torch.zeros(3, 9, 9, dtype=torch.uint8), torch.full((9, 9), 24, dtype=torch.uint8)
    mask[4:] = 2
    panel = overlay_mask(image, mask, opacity=1)
    assert [panel[1, 4].tolist(), panel[7, 4].tolist()] == class_colors(2)  # the 24th begins again


def test_window_is_a_square_around_the_objects_that_stays_in_the_image() -> None:
    mask = torch.zeros(40, 50, dtype=torch.uint8)
    mask[10:20, 20:24] = 3  # ten rows, four columns: a square of 20 with half of that to spare on each side
    assert window_around(mask, margin=0.5) == (slice(5, 25), slice(12, 32))
    mask[:] = 0
    mask[36:40, 0:2] = 1
    assert window_around(mask, margin=0.5) == (slice(32, 40), slice(0, 8))
    assert window_around(mask, margin=20) == (slice(0, 40), slice(0, 50))
    mask[:] = 0
    assert window_around(mask) == (slice(None), slice(None))


def test_names_stand_inside_of_their_regions_and_reach_the_figure() -> None:
    image, mask = torch.zeros(3, 20, 30, dtype=torch.uint8), torch.zeros(20, 30, dtype=torch.uint8)
    mask[2:9, 3:10] = 1
    mask[12:19, 20:27] = 3
    mask[0, 29] = 255
    panel = overlay_mask(image, mask, ["ram", "crane", "$boat"])
    assert panel.names == ((5, 6, "ram"), (15, 23, "$boat"))
    assert draw_outline(picture(image), mask, ["ram"]).names == ((5, 6, "ram"),)  # a class without a name has none
    assert panel[:10].names == ()  # cut out, their places would be wrong
    (axis,) = show_panels([[panel]]).axes
    assert [(text.get_text(), text.get_position()) for text in axis.texts] == [("ram", (6, 5)), ("$boat", (23, 15))]
    axis.figure.savefig(io.BytesIO())  # a dollar begins no formula


def scales_of_a_crane() -> dict[str, Any]:
    """Two rows of pixels: class 0 is in the left pixel, class 1 beside it; the last pixel is void."""
    cams = [torch.tensor([[[0.0, 0.0, 0.1, 0.0]], [[0.0, 0.2, 0.0, 0.0]]])]
    cams.append(torch.tensor([[[0.4, 0.2, 0.0, 0.4]], [[0.0, 0.3, 0.0, 0.0]]]))
    fused = torch.tensor([[[1.0, 0.6, 0.0, 0.0]], [[0.0, 0.8, 1.0, 0.0]]])
    truth = torch.tensor([[1, 2, 0, 255]], dtype=torch.uint8)
    mask = torch.tensor([[1, 1, 0, 1]], dtype=torch.uint8)
    image = torch.full((3, 1, 4), 90, dtype=torch.uint8)
    return {"image": image, "cams": cams, "fused": fused, "mask": mask, "ground_truth": truth, "scales": (0.5, 2.0)}


def captions_of(figure: Figure) -> list[str]:
    return [text.get_text() for axis in figure.axes for text in axis.texts]


def test_scales_peaks_and_iou_are_on_the_panels() -> None:
    figure = show_scales(**scales_of_a_crane(), class_names=["crane", "llama"], bg_score=0.2)
    # The map of 0.5 is on the wrong pixel. At 2 half the peak is on the neighbour, which the other class wins; the void
    # does not count. The mask covers the neighbour, too.
    assert [text for text in captions_of(figure) if text not in ("crane", "llama")] == [
        "crane, 25.0%",
        "scale 0.5\npeak 0.10, IoU 0%",
        "scale 2\npeak 0.40, IoU 100%",
        "fused\npeak 1.00, IoU 100%",
        "mask\nIoU 50%",
    ]


def test_a_scale_that_sees_little_is_dark_in_the_common_range() -> None:
    facts = scales_of_a_crane() | {"ground_truth": None}
    brightest = {}
    for common in (True, False):
        axes = show_scales(**facts, common_range=common).axes
        brightest[common] = [int(axis.images[0].get_array()[..., 0].max()) for axis in axes[1:3]]
    assert brightest[True][0] < brightest[True][1] == brightest[False][1] == brightest[False][0]


def test_rows_share_what_is_given_once_and_unknown_ground_truth_leaves_no_iou() -> None:
    image, mask = torch.zeros(3, 4, 4, dtype=torch.uint8), torch.zeros(4, 4, dtype=torch.uint8)
    facts = scales_of_a_crane() | {"ground_truth": None, "image": image, "mask": mask}
    figure = show_scales(**facts, class_number=[0, 1], names=["a", "b"])
    assert len(figure.axes) == 2 * 5 + 1  # and one colour bar
    assert [text for text in captions_of(figure) if "0.5" in text] == [
        "scale 0.5\npeak 0.10",
        "scale 0.5\npeak 0.20",
    ]
    figure.savefig(io.BytesIO())
    assert min(axis.get_window_extent().width for axis in figure.axes[:10]) >= 200
    assert {"a", "b", "mask"} <= {*captions_of(figure)} and "IoU" not in "".join(captions_of(figure))

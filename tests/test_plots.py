"""Pictures that carry numbers: their pixels and lines say what they should."""

from __future__ import annotations

import io
from typing import Any

import matplotlib
import torch
from matplotlib.figure import Figure

from smaflib.report.palette import class_colors
from smaflib.report.plots import (
    GAINED,
    LOST,
    draw_outline,
    overlay_changes,
    overlay_mask,
    picture,
    show_panels,
    show_scales,
)

matplotlib.use("agg")


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


def test_masks_are_drawn_in_the_class_colours() -> None:
    image, mask = torch.zeros(3, 9, 9, dtype=torch.uint8), torch.full((9, 9), 24, dtype=torch.uint8)
    mask[4:] = 2
    panel = overlay_mask(image, mask, opacity=1)
    assert [panel[1, 4].tolist(), panel[7, 4].tolist()] == class_colors(2)  # the 24th begins again


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


def test_rows_share_what_is_given_once_and_unknown_ground_truth_leaves_no_iou() -> None:
    image, mask = torch.zeros(3, 4, 4, dtype=torch.uint8), torch.zeros(4, 4, dtype=torch.uint8)
    facts = scales_of_a_crane() | {"ground_truth": None, "image": image, "mask": mask}
    figure = show_scales(**facts, class_number=[0, 1], names=["a", "b"])
    assert len(figure.axes) == 2 * 5 + 1  # and one colour bar
    assert [text for text in captions_of(figure) if "0.5" in text] == ["scale 0.5\npeak 0.10", "scale 0.5\npeak 0.20"]
    figure.savefig(io.BytesIO())
    assert min(axis.get_window_extent().width for axis in figure.axes[:10]) >= 200
    assert {"a", "b", "mask"} <= {*captions_of(figure)} and "IoU" not in "".join(captions_of(figure))

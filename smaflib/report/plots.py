"""Overlays of maps and masks on images, grids of them, and the plots of a run.

Overlays are arrays, uint8 (H, W, 3). Colour maps rise in lightness and read the same for colour-blind readers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.ndimage import distance_transform_edt
from torch import Tensor

from smaflib.data.classes import VOID_LABEL
from smaflib.report.palette import SIZE_COLORS, SIZE_HATCHES, class_colors, fused_style, line_style, scale_style

if TYPE_CHECKING:
    from smaflib.data import Sample
    from smaflib.training import History

Panel = np.ndarray
"""uint8 (H, W, 3)."""


class NamedPanel(np.ndarray):
    """A panel with names to write on it, as (row, column, text); a slice of it has none."""

    names: tuple[tuple[int, int, str], ...] = ()


def picture(image: Tensor) -> Panel:
    """uint8 (3, H, W) as a panel."""
    return image.permute(1, 2, 0).cpu().numpy()


def overlay_map(image: Tensor, cam: Tensor, opacity: float = 0.75) -> Panel:
    """Overlay a map, (H, W) in [0, 1], on a grey version of an image, uint8 (3, H, W)."""
    grey = picture(image).mean(axis=2, keepdims=True)
    colors = matplotlib.colormaps["inferno"](cam.clamp(0, 1).cpu().numpy())[..., :3] * 255
    return ((1 - opacity) * grey + opacity * colors).astype(np.uint8)


def overlay_mask(image: Tensor, mask: Tensor, class_names: Sequence[str] = (), opacity: float = 0.6) -> Panel:
    """Overlay the classes of a mask, uint8 (H, W), in their colours with a white outline; void stays transparent.

    :func:`show_panels` writes the ``class_names`` on the regions.
    """
    panel, labels = picture(image).astype(float), mask.cpu().numpy()
    shown = (labels > 0) & (labels != VOID_LABEL)
    panel[shown] = (1 - opacity) * panel[shown] + opacity * np.array([[0, 0, 0], *class_colors(254)])[labels[shown]]
    return draw_outline(panel.astype(np.uint8), mask, class_names=class_names)


GAINED, LOST, BOTH = (0, 114, 178), (230, 159, 0), (0, 158, 115)
"""Blue, orange and bluish green of Okabe and Ito's set; the first two differ in lightness too."""


def overlay_changes(image: Tensor, before: Tensor, after: Tensor, ground_truth: Tensor, opacity: float = 0.85) -> Panel:
    """Show in blue where only the second mask is right, in orange where only the first is; all masks uint8 (H, W).

    Void pixels of the ground truth stay grey; its outline is white.
    """
    counted, was, now = ground_truth != VOID_LABEL, before == ground_truth, after == ground_truth
    return _colored(image, {GAINED: counted & now & ~was, LOST: counted & was & ~now}, ground_truth, opacity)


def overlay_alternatives(image: Tensor, low: Tensor, used: Tensor, high: Tensor, opacity: float = 0.7) -> Panel:
    """Show where two masks differ from the used one: only ``low`` in blue, only ``high`` in orange, both in green.

    The masks are uint8 (H, W); the outline of the used one is white.
    """
    by_low, by_high = low != used, high != used
    return _colored(image, {GAINED: by_low, LOST: by_high, BOTH: by_low & by_high}, used, opacity)


def _colored(image: Tensor, colors: Mapping[tuple[int, int, int], Tensor], outline: Tensor, opacity: float) -> Panel:
    grey = picture(image).mean(axis=2, keepdims=True).repeat(3, axis=2)
    panel = grey.copy()
    for color, pixels in colors.items():
        chosen = pixels.cpu().numpy()
        panel[chosen] = (1 - opacity) * grey[chosen] + opacity * np.array(color)
    return draw_outline(panel.astype(np.uint8), outline)


def draw_outline(panel: Panel, mask: Tensor | None, class_names: Sequence[str] = ()) -> Panel:
    """Draw the outline of a mask's objects, uint8 (H, W), in white; without a mask the panel stays as it is.

    :func:`show_panels` writes the ``class_names`` on the regions.
    """
    if mask is None:
        return panel
    objects = mask.cpu().numpy().copy()
    objects[objects == VOID_LABEL] = 0
    edge = np.zeros(objects.shape, dtype=bool)
    edge[:, 1:] |= objects[:, 1:] != objects[:, :-1]
    edge[1:] |= objects[1:] != objects[:-1]
    outlined = panel.copy().view(NamedPanel)
    outlined[edge] = 255
    named = [label for label in np.unique(objects).tolist() if 0 < label <= len(class_names)]
    outlined.names = _apart([(*place_of_name(objects == label), class_names[label - 1]) for label in named], edge.shape)
    return outlined


def _apart(names: list[tuple[int, int, str]], size: tuple[int, ...]) -> tuple[tuple[int, int, str], ...]:
    """Move names that would be printed over one above them to the next line, in a panel of ``size``, (H, W)."""
    line, letter = -(-size[0] // 12), size[1] / 30
    placed: list[tuple[int, int, str]] = []
    for row, column, name in sorted(names):
        for above, other, text in placed:
            if abs(row - above) < line and abs(column - other) < letter * (len(name) + len(text)) / 2:
                row = above + line
        placed.append((row, column, name))
    return tuple(placed)


def place_of_name(region: np.ndarray) -> tuple[int, int]:
    """Row and column of a name: the widest part of a region, bool (H, W), or above one that the name would hide."""
    depth = distance_transform_edt(np.pad(region, 1))[1:-1, 1:-1]  # beyond the image is outside, too
    row, column = divmod(int(depth.argmax()), depth.shape[1])
    line = len(region) // 16  # about half the height of the text in a panel
    if depth.max() < line:
        top = int(np.flatnonzero(region[:, column])[0])
        row = top - line if top >= 2 * line else min(len(region) - 1, row + 2 * line)
    return row, column


def window_around(mask: Tensor, margin: float = 0.6) -> tuple[slice, slice]:
    """Rows and columns of a square around the objects of a mask, uint8 (H, W), or of the whole image without any.

    ``margin`` on each side is a share of the objects' longer side.
    """
    rows, columns = (torch.nonzero((mask > 0).any(dim=dim))[:, 0] for dim in (1, 0))
    if not len(rows):
        return slice(None), slice(None)
    extents = [(int(places[0]), int(places[-1]) + 1) for places in (rows, columns)]
    side = round((1 + 2 * margin) * max(end - start for start, end in extents))
    windows = []
    for (start, end), length in zip(extents, mask.shape, strict=True):
        first = max(0, min((start + end - side) // 2, length - side))
        windows.append(slice(first, min(length, first + side)))
    return windows[0], windows[1]


def show_panels(
    rows: Sequence[Sequence[Panel]],
    columns: Sequence[str] = (),
    names: Sequence[str] = (),
    title: str = "",
    side: float = 1.9,
    captions: Sequence[Sequence[str]] = (),
) -> Figure:
    """A grid of panels.

    Args:
        rows: rows of panels, which may differ in length.
        columns: titles of the columns.
        names: names of the rows.
        side: width of a panel, in inches.
        captions: a short text in the upper left corner of each panel, such as its IoU; may be empty.
    """
    width = max(len(row) for row in rows)
    heights = [max(panel.shape[0] / panel.shape[1] for panel in row) for row in rows]
    size = (side * width, side * sum(heights) + 0.5)
    figure, axes = plt.subplots(
        len(rows), width, figsize=size, squeeze=False, layout="constrained", height_ratios=heights
    )
    for row, row_axes in zip(rows, axes, strict=True):
        for axis in row_axes:
            axis.set_axis_off()
        for axis, panel in zip(row_axes, row, strict=False):
            show_panel(axis, panel)
    box = {"facecolor": "black", "alpha": 0.65, "linewidth": 0, "pad": 1.5}
    for texts, row_axes in zip(captions, axes, strict=False):
        for axis, text in zip(row_axes, texts, strict=False):
            if text:
                axis.text(0.02, 0.98, text, transform=axis.transAxes, va="top", fontsize=8, color="white", bbox=box)
    for axis, column in zip(axes[0], columns, strict=False):
        axis.set_title(column, fontsize=9)
    for row_axes, name in zip(axes, names, strict=False):
        place = {"transform": row_axes[0].transAxes, "rotation": 90, "ha": "center", "va": "center"}
        row_axes[0].text(-0.06, 0.5, name, fontsize=8, **place)
    return _finish(figure, title)


def show_panel(axis: Axes, panel: Panel) -> None:
    """Show a panel without ticks, with its names in white with a dark rim, readable on every colour."""
    axis.imshow(panel, interpolation="nearest")
    axis.set_axis_off()
    rim = [patheffects.withStroke(linewidth=1.8, foreground="black")]
    look: dict[str, Any] = {"va": "center", "fontsize": 7, "color": "white", "path_effects": rim, "clip_on": True}
    for row, column, name in getattr(panel, "names", ()):
        place = column / panel.shape[1]
        side = "left" if place < 0.2 else "right" if place > 0.8 else "center"  # a name stays inside its panel
        axis.text(column, row, name, ha=side, parse_math=False, **look)  # a name may hold dollars


def chain_steps(
    sample: Sample, cams: Sequence[Tensor], maps: Sequence[Tensor], mask: Tensor, class_names: Sequence[str]
) -> dict[str, Panel]:
    """Panels for :func:`plot_chain`: one image from its label to a mask, all classes of its label together.

    Args:
        sample: image with its ground truth.
        cams: the teacher's maps, per scale (K, h_s, w_s); the first four are shown.
        maps: (K, H, W) in [0, 1] each: the teacher's fused, denoised and reactivated, the student's denoised.
        mask: pseudo mask, uint8 (H, W).
    """
    from smaflib.cams import at_size  # not above: most figures need no network

    assert sample.mask is not None
    image, numbers = sample.image, sample.image_label.nonzero()[:, 0].tolist()
    size = (image.shape[1], image.shape[2])
    shown = (torch.stack([at_size(cam[k], size) for k in numbers]).amax(dim=0) for cam in cams)
    scales = [overlay_map(image, each) for each in shown]
    fused, denoised, target, student = (overlay_map(image, strongest_map(each)) for each in maps)
    return {
        f"an image and its label\n“{', '.join(class_names[k] for k in numbers)}”": picture(image),
        "the teacher's attention\nat several scales": np.vstack([np.hstack(scales[i : i + 2]) for i in (0, 2)]),
        "fused\nall classes, each peaks at 1": fused,
        "denoised\nabsent classes are zero": denoised,
        "reactivated\nthe winner of each pixel is 1": target,
        "the student, which has\nlearned such targets, fused": student,
        "pseudo mask\nstrongest class, dense CRF": overlay_mask(image, mask, class_names),
        "(the ground truth, which\nno step has seen)": overlay_mask(image, sample.mask, class_names),
    }


def plot_chain(steps: Mapping[str, Panel]) -> Figure:
    """Eight steps by title, in two rows with arrows between them; the last step is only for comparison."""
    figure, axes = plt.subplots(2, 4, figsize=(10.2, 5.5))
    figure.subplots_adjust(left=0, right=0.95, bottom=0, top=0.88, wspace=0.22, hspace=0.28)
    for number, (axis, (title, panel)) in enumerate(zip(axes.flat, steps.items(), strict=True)):
        show_panel(axis, panel)
        axis.set_title(title, fontsize=9)
        if number not in (3, 6, 7):
            axis.text(1.11, 0.5, "→", transform=axis.transAxes, ha="center", va="center", fontsize=20)
    return _finish(figure)


def plot_history(histories: Mapping[str, History], title: str = "learning curves") -> Figure:
    """Losses over iterations: a panel per loss, a line per training."""
    losses = sorted({name for history in histories.values() for point in history for name in point} - {"iteration"})
    size = (4.2 * max(1, len(losses)), 2.8)
    figure, axes = plt.subplots(1, max(1, len(losses)), figsize=size, squeeze=False, layout="constrained")
    for axis, loss in zip(axes[0], losses, strict=False):
        for number, (name, history) in enumerate(histories.items()):
            points = [(point["iteration"], point[loss]) for point in history if loss in point]
            axis.plot(*zip(*points, strict=True), label=name, **line_style(number))
        axis.set(title=loss.replace("_", " "), xlabel="iteration", ylim=(0, None))
        axis.grid(alpha=0.3)
        if len(histories) > 1:
            axis.legend(fontsize=8)
    return _finish(figure, title)


def plot_curves(curves: pd.DataFrame, title: str) -> Figure:
    """A line per column over the index, NaN left out; the names of index and columns label the axes.

    A column named like ``scale 0.5`` or ``teacher, scale 0.5`` gets that scale's line style, others are black.
    """
    figure, axis = plt.subplots(figsize=(6, 3.4), layout="constrained")
    num_fused = 0
    for name, values in curves.items():
        scale = re.search(r"scale ([\d.]+)$", str(name))
        style = scale_style(float(scale[1])) if scale else fused_style(num_fused)
        num_fused += not scale
        values.dropna().plot(ax=axis, marker=".", label=str(name), **style)
    axis.set(xlabel=curves.index.name, ylabel=curves.columns.name)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7, ncols=2)
    return _finish(figure, title)


def plot_sizes(table: pd.DataFrame, title: str = "IoU by object size") -> Figure:
    """Bars of a table: a row per variant; columns ``small``, ``medium`` and ``large`` in percent."""
    sizes = table[[*SIZE_COLORS]]
    figure, axis = plt.subplots(figsize=(max(5.0, 0.9 * len(table) + 1.5), 3.2), layout="constrained")
    look: dict[str, Any] = {"width": 0.8, "edgecolor": "white", "linewidth": 0, "xlabel": "", "fontsize": 8}
    sizes.plot.bar(ax=axis, color=[*SIZE_COLORS.values()], **look)
    for bars, hatch in zip(axis.containers, SIZE_HATCHES.values(), strict=True):
        axis.bar_label(bars, fmt="%.0f", fontsize=7)  # type: ignore[arg-type]
        plt.setp(bars, hatch=hatch)
    axis.set_xticklabels(axis.get_xticklabels(), rotation=20, ha="right")
    axis.set(ylabel="mean IoU in %", ylim=(0, 1.25 * max(sizes.max().max(), 1.0)))  # room for the legend
    axis.legend(fontsize=8, ncols=3, loc="upper left")
    axis.grid(axis="y", alpha=0.3)
    return _finish(figure, title)


def draw_pixel_row(
    axes: Sequence[Axes],
    steps: Mapping[str, Tensor],
    names: Sequence[str],
    present: Sequence[bool],
    ground_truth: Tensor | None = None,
) -> None:
    """Draw the scores of one row of pixels, an axis per step: labelled classes in colour, absent ones in grey.

    Args:
        axes: one per step, from top to bottom.
        steps: title of a step to scores in [0, 1]: (K, W), or (K+1, W) with the background first.
        names: the K classes.
        present: which of them the image label holds.
        ground_truth: labels of the row, uint8 (W,), drawn as bars below the curves.
    """
    styles = [line_style(sum(present[:k])) if there else {"color": "0.7"} for k, there in enumerate(present)]
    for axis, (step, scores) in zip(axes, steps.items(), strict=True):
        if len(scores) > len(names):
            axis.plot(scores[0], color="black", linestyle=(0, (8, 4)), linewidth=1.2, label="background")
        for k in sorted(range(len(names)), key=lambda k: present[k]):  # labelled classes above the absent ones
            if present[k] or scores[k - len(names)].any():
                width, label = (1.8, names[k]) if present[k] else (1.0, None)
                axis.plot(scores[k - len(names)], **styles[k], linewidth=width, label=label)
            if ground_truth is not None and present[k]:
                there = (ground_truth == k + 1).numpy()
                axis.fill_between(range(len(there)), -0.1, -0.03, where=there, color=styles[k]["color"], step="mid")
        axis.set(ylim=(-0.12, 1.08), yticks=(0, 0.5, 1))
        axis.set_title(step, fontsize=9, loc="left")
        axis.grid(alpha=0.3)
    axes[-1].legend(fontsize=8, ncols=4, loc="upper left", bbox_to_anchor=(0, -0.3))
    axes[-1].set_xlabel("pixel")


def plot_ablation(records: Sequence[Mapping[str, Any]], labels: Mapping[str, str], title: str = "ablation") -> Figure:
    """A panel for all objects and one per size; per row a dot for each seed, and a bar at their mean.

    Args:
        records: those of :func:`smaflib.apps.ablation.ablate`; the ones at the run's background threshold are drawn.
        labels: label of each variant.
    """
    table = pd.DataFrame(list(records)).query("bg_choice == 'own'")
    names, panels = list(dict.fromkeys(table["variant"])), ("all", *SIZE_COLORS)
    figsize = (2.9 * len(panels), 0.34 * len(names) + 1.3)
    figure, axes = plt.subplots(1, len(panels), figsize=figsize, sharey=True, layout="constrained")
    for axis, size in zip(axes, panels, strict=True):
        values = 100 * table[table["object_size"] == size].set_index("variant")["value"].astype(float)
        color = SIZE_COLORS.get(size, "0.35")
        for row, name in enumerate(names):
            of_seeds = values.loc[[name]].dropna()
            axis.plot(of_seeds, [row] * len(of_seeds), "o", color=color, markersize=4.5, alpha=0.75)
            axis.plot([of_seeds.mean()] * 2, [row - 0.3, row + 0.3], color=color, linewidth=2.5)
        axis.axvline(values.loc[[names[0]]].mean(), color="black", linestyle=":", linewidth=1)
        axis.set_title("mIoU, all pixels" if size == "all" else f"{size} objects", fontsize=9)
        axis.set_xlabel("IoU in %", fontsize=8)
        axis.grid(axis="x", alpha=0.3)
    axes[0].set_yticks(range(len(names)), [labels.get(name, name) for name in names], fontsize=8)
    axes[0].invert_yaxis()
    return _finish(figure, title)


def strongest_map(denoised: Tensor) -> Tensor:
    """(K, H, W) to (H, W): the highest score of each pixel, which shows all labelled classes in one picture."""
    return denoised.amax(dim=0)


def _finish(figure: Figure, title: str = "") -> Figure:
    """Title a figure, and close it in pyplot, or a notebook would show it twice."""
    if title:
        figure.suptitle(title, fontsize=11)
    plt.close(figure)
    return figure

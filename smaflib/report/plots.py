"""Pictures: overlays of maps and masks on images, grids of them, and the curves of a run.

Overlays are plain arrays, uint8 (H, W, 3), so that notebooks, reports and widgets can all use them. Colour maps rise in
lightness, so that they read the same in grey and for colour-blind readers.
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

from smaflib.config import variant_label
from smaflib.data.classes import VOID_LABEL
from smaflib.report.palette import SIZE_COLORS, SIZE_HATCHES, class_colors, fused_style, line_style, scale_style

if TYPE_CHECKING:  # a changed training must not count for what only draws its curves
    from smaflib.data import Sample
    from smaflib.training import History

Panel = np.ndarray
"""uint8 (H, W, 3)."""


class NamedPanel(np.ndarray):
    """A panel that knows what stands on it, for :func:`show_panels` to write; what is cut out of it has no names.

    Attributes:
        names: (row, column, text) each.
    """

    names: tuple[tuple[int, int, str], ...] = ()


def picture(image: Tensor) -> Panel:
    """uint8 (3, H, W) as a panel."""
    return image.permute(1, 2, 0).cpu().numpy()


def overlay_map(image: Tensor, cam: Tensor, colormap: str = "inferno", opacity: float = 0.75) -> Panel:
    """Lay a map over a grey image.

    Args:
        image: uint8 (3, H, W).
        cam: (H, W) in [0, 1].
        colormap: one of matplotlib's.
        opacity: of the map, in [0, 1].
    """
    grey = picture(image).mean(axis=2, keepdims=True).repeat(3, axis=2)
    colors = matplotlib.colormaps[colormap](cam.clamp(0, 1).cpu().numpy())[..., :3] * 255
    return ((1 - opacity) * grey + opacity * colors).astype(np.uint8)


def overlay_mask(image: Tensor, mask: Tensor, class_names: Sequence[str] = (), opacity: float = 0.6) -> Panel:
    """Lay a mask's classes over an image in their colours, each with a white outline; void stays as it is.

    Args:
        image: uint8 (3, H, W).
        mask: uint8 (H, W).
        class_names: of the K classes; :func:`show_panels` writes them on the regions.
        opacity: of the colours, in [0, 1].
    """
    panel, labels = picture(image).astype(float), mask.cpu().numpy()
    shown = (labels > 0) & (labels != VOID_LABEL)
    panel[shown] = (1 - opacity) * panel[shown] + opacity * np.array([[0, 0, 0], *class_colors(254)])[labels[shown]]
    return draw_outline(panel.astype(np.uint8), mask, class_names=class_names)


GAINED, LOST = (0, 114, 178), (230, 159, 0)
"""Blue and orange of Okabe and Ito's set, which differ in lightness too."""


def overlay_changes(image: Tensor, before: Tensor, after: Tensor, ground_truth: Tensor, opacity: float = 0.85) -> Panel:
    """Lay over a grey image what a second mask has right and the first wrong (blue), and the reverse (orange).

    Args:
        image: uint8 (3, H, W).
        before: the first mask, uint8 (H, W).
        after: the second mask, uint8 (H, W).
        ground_truth: uint8 (H, W); void pixels stay grey. Its outline is white.
        opacity: of the colours, in [0, 1].
    """
    panel = picture(image).mean(axis=2, keepdims=True).repeat(3, axis=2)
    counted = ground_truth != VOID_LABEL
    was, now = before == ground_truth, after == ground_truth
    for pixels, color in ((counted & now & ~was, GAINED), (counted & was & ~now, LOST)):
        chosen = pixels.cpu().numpy()
        panel[chosen] = (1 - opacity) * panel[chosen] + opacity * np.array(color)
    return draw_outline(panel.astype(np.uint8), ground_truth)


BOTH = (0, 158, 115)
"""Bluish green of the same set."""


def overlay_alternatives(image: Tensor, low: Tensor, used: Tensor, high: Tensor, opacity: float = 0.7) -> Panel:
    """Lay over a grey image where other masks differ from the one in use, whose outline is white.

    Args:
        image: uint8 (3, H, W).
        low: uint8 (H, W); where it alone differs from ``used``, blue.
        used: the mask in use, uint8 (H, W).
        high: uint8 (H, W); where it alone differs, orange; where both do, green.
        opacity: of the colours, in [0, 1].
    """
    panel = picture(image).mean(axis=2, keepdims=True).repeat(3, axis=2)
    by_low, by_high = low != used, high != used
    for pixels, color in ((by_low & ~by_high, GAINED), (by_high & ~by_low, LOST), (by_low & by_high, BOTH)):
        chosen = pixels.cpu().numpy()
        panel[chosen] = (1 - opacity) * panel[chosen] + opacity * np.array(color)
    return draw_outline(panel.astype(np.uint8), used)


def draw_outline(
    panel: Panel, mask: Tensor, class_names: Sequence[str] = (), color: tuple[int, int, int] = (255, 255, 255)
) -> Panel:
    """Draw the outline of a mask's objects into a panel; that of the ground truth shows what a map misses.

    Args:
        panel: uint8 (H, W, 3).
        mask: uint8 (H, W).
        class_names: of the K classes; :func:`show_panels` writes them on the regions.
        color: of the outline.
    """
    objects = mask.cpu().numpy().copy()
    objects[objects == VOID_LABEL] = 0
    edge = np.zeros(objects.shape, dtype=bool)
    edge[:, 1:] |= objects[:, 1:] != objects[:, :-1]
    edge[1:] |= objects[1:] != objects[:-1]
    outlined = panel.copy().view(NamedPanel)
    outlined[edge] = color
    outlined.names = tuple((*place_of_name(objects == k + 1), class_names[k]) for k in _labels_of(objects, class_names))
    return outlined


def place_of_name(region: np.ndarray) -> tuple[int, int]:
    """Row and column for the middle of a name: where a region, bool (H, W), is widest; above it if that is too narrow.

    A name in the middle of a small object would hide it.
    """
    depth = distance_transform_edt(np.pad(region, 1))[1:-1, 1:-1]  # beyond the image is outside, too
    row, column = divmod(int(depth.argmax()), depth.shape[1])
    line = len(region) // 16  # about half the height of the text in a panel
    if depth.max() < line:
        top = int(np.flatnonzero(region[:, column])[0])
        row = top - line if top >= 2 * line else min(len(region) - 1, row + 2 * line)
    return row, column


def _labels_of(objects: np.ndarray, class_names: Sequence[str]) -> list[int]:
    """Numbers, 0 to K-1, of the classes that a mask shows and that have a name."""
    return [label - 1 for label in np.unique(objects).tolist() if 0 < label <= len(class_names)]


def mark_pixel(panel: Panel, row: int, column: int) -> Panel:
    """Draw a white cross with a dark rim around a pixel, which itself stays visible."""
    marked = panel.copy()
    height, width = panel.shape[:2]
    arm = max(3, min(height, width) // 24)
    for thick, color in ((1, (0, 0, 0)), (0, (255, 255, 255))):
        for start, end in ((-arm - thick, -1), (2, arm + thick + 1)):
            for top, bottom, left, right in ((start, end, -thick, thick + 1), (-thick, thick + 1, start, end)):
                rows = slice(max(0, row + top), max(0, row + bottom))
                marked[rows, max(0, column + left) : max(0, column + right)] = color
    return marked


def window_around(mask: Tensor, margin: float = 0.6) -> tuple[slice, slice]:
    """Rows and columns of a square around a mask's objects; the whole image where there is none.

    Args:
        mask: uint8 (H, W).
        margin: room on each side, as a share of the objects' longer side.
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
        rows: panels; rows may be of different length. Names that a panel carries are written on its regions.
        columns: titles of the columns.
        names: names of the rows.
        title: of the figure.
        side: of a panel, in inches.
        captions: a short text in each panel's upper left corner, such as its IoU; ``""`` for none.
    """
    width = max(len(row) for row in rows)
    heights = [max(panel.shape[0] / panel.shape[1] for panel in row) for row in rows]
    figure, axes = plt.subplots(
        len(rows),
        width,
        figsize=(side * width, side * sum(heights) + 0.5),
        squeeze=False,
        layout="constrained",
        gridspec_kw={"height_ratios": heights},
    )
    for row, row_axes in zip(rows, axes, strict=True):
        for axis in row_axes:
            axis.set_axis_off()
        for axis, panel in zip(row_axes, row, strict=False):
            show_panel(axis, panel)
    for texts, row_axes in zip(captions, axes, strict=False):
        for axis, text in zip(row_axes, texts, strict=False):
            box = {"facecolor": "black", "alpha": 0.65, "linewidth": 0, "pad": 1.5}
            if text:
                axis.text(0.02, 0.98, text, transform=axis.transAxes, va="top", fontsize=8, color="white", bbox=box)
    for axis, column in zip(axes[0], columns, strict=False):
        axis.set_title(column, fontsize=9)
    for row_axes, name in zip(axes, names, strict=False):
        row_axes[0].text(
            -0.06, 0.5, name, transform=row_axes[0].transAxes, rotation=90, ha="center", va="center", fontsize=8
        )
    return _finish(figure, title)


def show_panel(axis: Axes, panel: Panel) -> None:
    """Show a panel without ticks, its names on its regions in white with a dark rim: readable on every colour."""
    axis.imshow(panel, interpolation="nearest")
    axis.set_axis_off()
    rim = [patheffects.withStroke(linewidth=1.8, foreground="black")]
    look: dict[str, Any] = {"va": "center", "fontsize": 7, "color": "white", "path_effects": rim, "clip_on": True}
    for row, column, name in getattr(panel, "names", ()):
        place = column / panel.shape[1]
        side = "left" if place < 0.2 else "right" if place > 0.8 else "center"  # a name must not leave its panel
        axis.text(column, row, name, ha=side, parse_math=False, **look)  # a name may hold dollars


def chain_steps(
    sample: Sample, cams: Sequence[Tensor], maps: Sequence[Tensor], mask: Tensor, class_names: Sequence[str]
) -> dict[str, Sequence[Panel]]:
    """One image's way from its label to a mask, for :func:`plot_chain`; maps show all classes of its label together.

    Args:
        sample: the image, with its mask.
        cams: of the teacher, per scale (K, h_s, w_s).
        maps: (K, H, W) in [0, 1] each: the teacher's fused, denoised and reactivated, the student's denoised.
        mask: the pseudo mask, uint8 (H, W).
        class_names: of the K classes.
    """
    from smaflib.cams import at_size  # not above: most figures need no network

    assert sample.mask is not None
    image, numbers = sample.image, sample.image_label.nonzero()[:, 0].tolist()
    size = (image.shape[1], image.shape[2])
    scales = [torch.stack([at_size(cam[k], size) for k in numbers]).amax(dim=0) for cam in cams]
    fused, denoised, target, student = ([overlay_map(image, strongest_map(each))] for each in maps)
    return {
        f"an image and its label\n“{', '.join(class_names[k] for k in numbers)}”": [picture(image)],
        "the teacher's attention\nat several scales": [overlay_map(image, scale) for scale in scales],
        "fused\nall classes, each peaks at 1": fused,
        "denoised\nabsent classes are zero": denoised,
        "reactivated\nthe winner of each pixel is 1": target,
        "the student, which has\nlearned such targets, fused": student,
        "pseudo mask\nstrongest class, dense CRF": [overlay_mask(image, mask, class_names)],
        "(the ground truth, which\nno step has seen)": [overlay_mask(image, sample.mask, class_names)],
    }


def plot_chain(steps: Mapping[str, Sequence[Panel]], columns: int = 4) -> Figure:
    """Steps one after the other with arrows between them, row by row, the last only to compare with.

    Args:
        steps: what a step is, in two lines, to its panels: one, or four that are shown two by two.
        columns: steps per row.
    """
    rows = -(-len(steps) // columns)
    figure = plt.figure(figsize=(2.55 * columns, 2.75 * rows))
    width, height = 0.8 / columns, 0.72 / rows
    for number, (title, panels) in enumerate(steps.items()):
        left, bottom = number % columns / columns, 1 - (number // columns + 1) / rows
        side = 2 if len(panels) > 1 else 1
        figure.text(left + width / 2, bottom + height + 0.02 / rows, title, ha="center", va="bottom", fontsize=9)
        for place, panel in enumerate(panels[: side * side]):
            box = (left + place % side * width / side, bottom + (side - 1 - place // side) * height / side)
            axis = figure.add_axes((*box, width / side * 0.98, height / side * 0.98))
            show_panel(axis, panel)
        if number % columns < columns - 1 and number < len(steps) - 2:
            figure.text(left + 0.9 / columns, bottom + height / 2, "→", ha="center", va="center", fontsize=20)
    return _finish(figure, "")


def plot_history(histories: Mapping[str, History], title: str = "learning curves") -> Figure:
    """A curve per loss, an axis per loss's name; several trainings side by side in colour."""
    losses = sorted({name for history in histories.values() for point in history for name in point} - {"iteration"})
    figure, axes = plt.subplots(
        1, max(1, len(losses)), figsize=(4.2 * max(1, len(losses)), 2.8), squeeze=False, layout="constrained"
    )
    for axis, loss in zip(axes[0], losses, strict=False):
        for number, (name, history) in enumerate(histories.items()):
            points = [point for point in history if loss in point]
            values = [point[loss] for point in points]
            axis.plot([point["iteration"] for point in points], values, label=name, **line_style(number))
        axis.set(title=loss.replace("_", " "), xlabel="iteration", ylim=(0, None))
        axis.grid(alpha=0.3)
        if len(histories) > 1:
            axis.legend(fontsize=8)
    return _finish(figure, title)


def plot_sweep(metrics: pd.DataFrame, bg_score: float, title: str = "mIoU over the background score") -> Figure:
    """Draw each variant's mIoU over the background score, with the score that the run uses.

    Args:
        metrics: records whose metric is ``iou_sweep``, of one split.
        bg_score: that the run uses.
        title: of the figure.
    """
    figure, axis = plt.subplots(figsize=(6, 3.4), layout="constrained")
    scales = [f", scale {scale:g}" if scale == scale else "" for scale in metrics["scale"].astype(float)]
    named = metrics.assign(fusion=metrics["fusion"].fillna(""), scale=scales, scale_number=metrics["scale"])
    num_fused = 0
    for (variant, scale, fusion), records in named.groupby(["variant", "scale", "fusion"], sort=False):
        records = records.sort_values("bg_score")
        label = variant_label(str(variant), str(fusion)) + str(scale)
        style = scale_style(float(records["scale_number"].iloc[0])) if scale else fused_style(num_fused)
        num_fused += not scale
        axis.plot(records["bg_score"], 100 * records["value"], marker=".", label=label, **style)
    axis.axvline(bg_score, color="grey", linestyle=":", label="used by this run")
    axis.set(xlabel="background score", ylabel="mIoU in %")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7, ncols=2)
    return _finish(figure, title)


def plot_sizes(table: pd.DataFrame, title: str = "IoU by object size") -> Figure:
    """Bars per variant for small, medium and large objects.

    Args:
        table: index: variants; columns: among them ``small``, ``medium``, ``large``, in percent.
        title: of the figure.
    """
    figure, axis = plt.subplots(figsize=(max(5.0, 0.9 * len(table) + 1.5), 3.2), layout="constrained")
    positions = np.arange(len(table))
    for offset, (size, color) in enumerate(SIZE_COLORS.items()):
        look: dict[str, Any] = {"color": color, "hatch": SIZE_HATCHES[size], "edgecolor": "white", "linewidth": 0}
        bars = axis.bar(positions + 0.27 * (offset - 1), table[size].fillna(0), 0.25, label=size, **look)
        axis.bar_label(bars, fmt="%.0f", fontsize=7)
    axis.set_xticks(positions, [str(name) for name in table.index], rotation=20, ha="right", fontsize=8)
    highest = max(float(table[list(SIZE_COLORS)].max().max()), 1.0)
    axis.set(ylabel="mean IoU in %", ylim=(0, 1.25 * highest))  # room for the legend above the bars
    axis.legend(fontsize=8, ncols=3, loc="upper left")
    axis.grid(axis="y", alpha=0.3)
    return _finish(figure, title)


def plot_objects(ious: pd.DataFrame, shares: pd.Series, title: str = "IoU over object size", bins: int = 8) -> Figure:
    """A line per view, a scale or the fused maps: mean IoU of the objects of about one size.

    Args:
        ious: a row per object, a column per view (``scale 0.5``, else it is fused), in [0, 1].
        shares: of each object, the part of its image's area that it covers, in (0, 1].
        title: of the figure.
        bins: as many groups of equally many objects.
    """
    figure, axis = plt.subplots(figsize=(6, 3.4), layout="constrained")
    groups = pd.qcut(shares, min(bins, len(shares)), duplicates="drop")
    middles = 100 * shares.groupby(groups, observed=True).median()
    num_fused = 0
    for name, column in ious.items():
        means = 100 * column.groupby(groups, observed=True).mean()
        is_scale = re.fullmatch(r"scale ([\d.]+)", str(name))
        style = scale_style(float(is_scale[1])) if is_scale else fused_style(num_fused)
        num_fused += not is_scale
        axis.plot(middles, means, marker=".", label=str(name), **style)
    axis.set(
        xscale="log", xlabel="share of the image's area in %", ylabel="mean IoU of the objects in %", ylim=(0, None)
    )
    ticks = [tick for tick in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100) if middles.min() / 2 < tick < 2 * middles.max()]
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.xaxis.minorticks_off()
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    return _finish(figure, title)


def plot_pixel_row(
    steps: Mapping[str, Tensor], names: Sequence[str], present: Sequence[bool], ground_truth: Tensor | None = None
) -> Figure:
    """The scores of one row of pixels, an axis per step; arguments as of :func:`draw_pixel_row`."""
    figure, axes = plt.subplots(
        len(steps), 1, figsize=(8, 1.55 * len(steps) + 0.4), sharex=True, squeeze=False, layout="constrained"
    )
    draw_pixel_row(list(axes[:, 0]), steps, names, present, ground_truth)
    return _finish(figure, "")


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
        steps: name of the step to scores (K, W), or (K+1, W) with the background first, in [0, 1].
        names: of the K classes.
        present: which of them the image label names.
        ground_truth: uint8 (W,) of the row; where it holds an object, a bar of the class's colour lies below the
            curves.
    """
    styles = [line_style(sum(present[:k])) if there else {"color": "0.7"} for k, there in enumerate(present)]
    for axis, (step, scores) in zip(axes, steps.items(), strict=True):
        if len(scores) > len(names):
            axis.plot(scores[0], color="black", linestyle=(0, (8, 4)), linewidth=1.2, label="background")
        for k in sorted(range(len(names)), key=lambda k: present[k]):  # labelled classes above the absent ones
            label = names[k] if present[k] else None
            if present[k] or scores[k - len(names)].any():
                axis.plot(scores[k - len(names)], **styles[k], linewidth=1.8 if present[k] else 1.0, label=label)
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
        records: of :func:`smaflib.apps.ablation.ablate`; those at the run's own background score are drawn.
        labels: what people read of each row.
        title: of the figure.
    """
    table = pd.DataFrame(list(records)).query("bg_choice == 'own'")
    names, panels = list(dict.fromkeys(table["variant"])), ("all", *SIZE_COLORS)
    figure, axes = plt.subplots(
        1, len(panels), figsize=(2.9 * len(panels), 0.34 * len(names) + 1.3), sharey=True, layout="constrained"
    )
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


def plot_counts(counts: Mapping[str, int], title: str = "images per class") -> Figure:
    """Horizontal bars of how many images show each class."""
    figure, axis = plt.subplots(figsize=(5, 0.28 * len(counts) + 0.9), layout="constrained")
    bars = axis.barh(list(counts), list(counts.values()), color="#56b4e9")
    axis.bar_label(bars, fontsize=8, padding=2)
    axis.invert_yaxis()
    axis.set(xlabel="images")
    return _finish(figure, title)


def plot_shares(shares: Sequence[float], limits: tuple[float, float], title: str = "object sizes") -> Figure:
    """Histogram of the share of an image's area that each object covers, with the limits of small and large."""
    figure, axis = plt.subplots(figsize=(5, 2.8), layout="constrained")
    axis.hist(100 * np.asarray(shares), bins=30, color="#56b4e9")
    for limit in limits:
        axis.axvline(100 * limit, color="black", linestyle=":")
    axis.set(xlabel="share of the image's area in %", ylabel="objects")
    return _finish(figure, title)


def strongest_map(denoised: Tensor) -> Tensor:
    """(K, H, W) to (H, W): the strongest class of each pixel, to show all labelled classes in one picture."""
    return denoised.amax(dim=0)


def _finish(figure: Figure, title: str) -> Figure:
    """Title a figure and close it in pyplot, which otherwise shows it a second time below the notebook's cell."""
    if title:
        figure.suptitle(title, fontsize=11)
    plt.close(figure)
    return figure

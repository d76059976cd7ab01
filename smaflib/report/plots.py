"""Overlays of maps and masks on images, grids of them, and the plots of a run.

Overlays are arrays, uint8 (H, W, 3). Colour maps rise in lightness and read the same for colour-blind readers.
"""

from __future__ import annotations

import itertools
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
from smaflib.report.palette import LINE_STYLES, SIZE_COLORS, SIZE_HATCHES, class_colors, line_style, scale_style

if TYPE_CHECKING:
    from smaflib.training import History

Panel = np.ndarray  # uint8 (H, W, 3)
SCALE_SIDE, SCALE_DPI = 2.2, 110  # of a panel of show_scales the width in inches, and dots per inch: 200 pixels or more


class NamedPanel(np.ndarray):
    """A panel with names to write on it, as (row, column, text); a slice of it has none."""

    names: tuple[tuple[int, int, str], ...] = ()


def picture(image: Tensor) -> Panel:
    """An image, uint8 (3, H, W), as a panel."""
    return image.permute(1, 2, 0).cpu().numpy()


def overlay_map(image: Tensor, cam: Tensor, opacity: float = 0.75) -> Panel:
    """Overlay a map, (H, W) in [0, 1], on a grey version of an image, uint8 (3, H, W)."""
    grey = picture(image).mean(axis=2, keepdims=True)
    colors = matplotlib.colormaps["inferno"](cam.clamp(0, 1).cpu().numpy())[..., :3] * 255
    return ((1 - opacity) * grey + opacity * colors).astype(np.uint8)


def overlay_mask(image: Tensor, mask: Tensor, class_names: Sequence[str] = (), opacity: float = 0.6) -> Panel:
    """Overlay the classes of a mask, uint8 (H, W), in their colours, outlined and named; void stays transparent."""
    panel, labels = picture(image).astype(float), mask.cpu().numpy()
    shown = (labels > 0) & (labels != VOID_LABEL)
    panel[shown] = (1 - opacity) * panel[shown] + opacity * np.array([[0, 0, 0], *class_colors(254)])[labels[shown]]
    return draw_outline(panel.astype(np.uint8), mask, class_names=class_names)


GAINED, LOST, BOTH = (0, 114, 178), (230, 159, 0), (0, 158, 115)  # Okabe and Ito's blue, orange, bluish green


def overlay_changes(image: Tensor, before: Tensor, after: Tensor, ground_truth: Tensor, opacity: float = 0.85) -> Panel:
    """Show in blue where only ``after``, uint8 (H, W), is right, in orange where only ``before``; void stays grey."""
    counted, was, now = ground_truth != VOID_LABEL, before == ground_truth, after == ground_truth
    return _colored(image, {GAINED: counted & now & ~was, LOST: counted & was & ~now}, ground_truth, opacity)


def overlay_alternatives(image: Tensor, low: Tensor, used: Tensor, high: Tensor, opacity: float = 0.7) -> Panel:
    """Show where two masks, uint8 (H, W), differ from the used one: ``low`` in blue, ``high`` in orange, both green."""
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
    """Draw the outline of a mask's objects, uint8 (H, W), in white, for :func:`show_panels` to name; None: none."""
    if mask is None:
        return panel
    objects = mask.masked_fill(mask == VOID_LABEL, 0).cpu().numpy()
    outlined = panel.copy().view(NamedPanel)
    outlined[:, 1:][objects[:, 1:] != objects[:, :-1]] = 255
    outlined[1:][objects[1:] != objects[:-1]] = 255
    named = [label for label in np.unique(objects).tolist() if 0 < label <= len(class_names)]
    outlined.names = _apart(
        [(*place_of_name(objects == label), class_names[label - 1]) for label in named], objects.shape
    )
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
    places = torch.nonzero(mask > 0)  # (N, 2)
    if not len(places):
        return slice(None), slice(None)
    extents = [(int(column.min()), int(column.max()) + 1) for column in places.T]
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
    """A grid of panels, ``side`` inches wide, with titles of ``columns`` and names of rows, which may differ in length.

    ``captions``, in the order of the panels, are written into their upper left corners; a caption may be empty.
    """
    width = max(len(row) for row in rows)
    heights = [max(panel.shape[0] / panel.shape[1] for panel in row) for row in rows]
    shape: dict[str, Any] = {"figsize": (side * width, side * sum(heights) + 0.5), "height_ratios": heights}
    figure, axes = plt.subplots(len(rows), width, squeeze=False, layout="constrained", **shape)
    box = {"facecolor": "black", "alpha": 0.65, "linewidth": 0, "pad": 1.5}
    for axis in axes.flat:
        axis.set_axis_off()
    for row_axes, row in zip(axes, rows, strict=True):
        for axis, panel in zip(row_axes, row, strict=False):
            show_panel(axis, panel)
    for row_axes, texts in zip(axes, captions, strict=False):
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


def show_scales(
    image: Any,
    cams: Any,
    fused: Any,
    mask: Any,
    scales: Sequence[float],
    class_number: Any = 0,
    ground_truth: Any = None,
    *,
    bg_score: float | Sequence[float] = 0.2,
    common_range: bool = True,
    class_names: Sequence[str] = (),
    names: Sequence[str] = (),
    title: str = "",
) -> Figure:
    """One class of an image at every scale, fused, and the mask; peak and, with ground truth, IoU are on the panels.

    For several rows, give a list with an entry per row for any of the arguments from ``image`` to ``ground_truth`` but
    ``scales``; what is given once serves all rows.

    Args:
        image: uint8 (3, H, W).
        cams: per scale (K, h_s, w_s), non-negative.
        fused: (K, H, W) in [0, 1].
        mask: uint8 (H, W), 0 is background.
        scales: that of each of the ``cams``.
        class_number: the class to show, 0 to K-1.
        ground_truth: uint8 (H, W), 255 is void; the object's outline is drawn in white. None: unknown.
        bg_score: background threshold at which the maps of the classes in the ground truth compete for their IoU; or
            one for each scale and one for the fused map.
        common_range: the colours of a row's scales reach up to the highest peak among them, so that a scale that sees
            nothing stays dark; if false, each to its own peak, as the fused map does anyway.
        names: names of the rows; by default the class and the object's share of the image.
    """
    from smaflib.cams import at_size  # not above: most figures need no network
    from smaflib.reactivation import hard_labels  # which the notebook of the data does not depend on

    given = [image, [cams] if isinstance(cams[0], Tensor) else cams, fused, mask, class_number, ground_truth]
    given = [each if isinstance(each, list | tuple) else [each] for each in given]
    num_rows = max(map(len, given))
    rows = zip(*(each * num_rows if len(each) == 1 else each for each in given), strict=True)
    titles = [*(f"scale {scale:g}" for scale in scales), "fused", "mask"]
    betas = [bg_score] * len(titles) if isinstance(bg_score, int | float) else [*bg_score, 0.0]
    panels, captions, labels = [], [], []
    for picked, per_scale, joined, found, k, truth in rows:
        peaks = [float(cam[k].max()) for cam in (*per_scale, joined)]
        shares = [peak / (max(peaks[:-1]) or 1.0) if common_range else 1.0 for peak in peaks[:-1]] + [1.0]
        texts, share, outline = [f"peak {peak:.2f}" for peak in peaks] + [""], "", None
        if truth is not None:
            there, counted = truth == k + 1, truth != VOID_LABEL
            outline, share = there.to(torch.uint8), f", {there.float().mean():.1%}"
            rivals = [k, *(label - 1 for label in truth.unique().tolist() if label not in (0, k + 1, VOID_LABEL))]
            scores = [torch.stack([at_size(cam[i], truth.shape) for i in rivals]) for cam in (*per_scale, joined)]
            masks = [hard_labels(each, beta) == 1 for each, beta in zip(scores, betas, strict=False)] + [found == k + 1]
            # An IoU of 0 if both are empty.
            unions = (((each | there) & counted).sum().clamp(min=1) for each in masks)
            ious = ((each & there).sum() / union for each, union in zip(masks, unions, strict=True))
            texts = [f"{text}, IoU {iou:.0%}".strip(", ") for text, iou in zip(texts, ious, strict=True)]
        at_peaks = (at_size(cam[k], picked.shape[-2:]) for cam in (*per_scale, joined))
        shown = [overlay_map(picked, cam * part) for cam, part in zip(at_peaks, shares, strict=True)]
        outlined = (draw_outline(panel, outline) for panel in shown)
        panels.append([picture(picked), *outlined, overlay_mask(picked, found, class_names)])
        captions.append(["", *(f"{name}\n{text}".strip() for name, text in zip(titles, texts, strict=True))])
        labels.append(f"{class_names[k]}{share}" if class_names else "")
    figure = show_panels(panels, names=names or labels, title=title, side=SCALE_SIDE, captions=captions)
    figure.set_dpi(SCALE_DPI)
    look: dict[str, Any] = {"fraction": 0.02, "pad": 0.01, "aspect": 30, "ticks": [0, 0.5, 1]}
    bar = figure.colorbar(matplotlib.cm.ScalarMappable(cmap="inferno"), ax=figure.axes, **look)
    bar.set_label(f"share of {'the highest' if common_range else 'its own'} peak", fontsize=8)
    return figure


def plot_history(histories: Mapping[str, History], title: str = "learning curves") -> Figure:
    """Losses over iterations: a panel per loss, a line per training."""
    losses = sorted({name for history in histories.values() for point in history for name in point} - {"iteration"})
    width = max(1, len(losses))
    figure, axes = plt.subplots(1, width, figsize=(4.2 * width, 2.8), squeeze=False, layout="constrained")
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
    dashes = itertools.cycle(LINE_STYLES)
    for name, values in curves.items():
        scale = re.search(r"scale ([\d.]+)$", str(name))
        black = {"color": "black", "linewidth": 2.0}
        style = scale_style(float(scale[1])) if scale else black | {"linestyle": next(dashes)}
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
        steps: by title scores in [0, 1]: (K, W), or (K+1, W) with the background first.
        present: which of the K ``names`` the image label holds.
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
    """A panel for all objects and one per size; per variant a dot for each seed, and a bar at their mean.

    Of the records of :func:`smaflib.apps.ablation.ablate` those at the run's background threshold are drawn.
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

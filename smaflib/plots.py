"""Pictures: overlays of maps and masks on images, grids of them, and the curves of a run.

Overlays are plain arrays, uint8 (H, W, 3), so that notebooks, reports and widgets can all use them. Colour maps rise in
lightness, so that they read the same in grey and for colour-blind readers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor

from smaflib.config import VOID_LABEL
from smaflib.data.masks import VOC_PALETTE
from smaflib.training import History

Panel = np.ndarray
"""uint8 (H, W, 3)."""

SIZE_COLORS = {"small": "#0072b2", "medium": "#e69f00", "large": "#009e73"}  # Okabe and Ito's colour-blind safe set


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


def overlay_mask(image: Tensor, mask: Tensor, opacity: float = 0.6) -> Panel:
    """Lay a mask's classes over an image in VOC's colours, each with a white outline; void stays as it is.

    Args:
        image: uint8 (3, H, W).
        mask: uint8 (H, W).
        opacity: of the colours, in [0, 1].
    """
    panel, labels = picture(image).astype(float), mask.cpu().numpy()
    shown = (labels > 0) & (labels != VOID_LABEL)
    panel[shown] = (1 - opacity) * panel[shown] + opacity * VOC_PALETTE[labels[shown]]
    return draw_outline(panel.astype(np.uint8), mask)


def draw_outline(panel: Panel, mask: Tensor, color: tuple[int, int, int] = (255, 255, 255)) -> Panel:
    """Draw the border of a mask's objects into a panel; the truth's outline on a map shows what the map misses."""
    objects = mask.cpu().numpy().copy()
    objects[objects == VOID_LABEL] = 0
    edge = np.zeros(objects.shape, dtype=bool)
    edge[:, 1:] |= objects[:, 1:] != objects[:, :-1]
    edge[1:] |= objects[1:] != objects[:-1]
    outlined = panel.copy()
    outlined[edge] = color
    return outlined


def show_panels(
    rows: Sequence[Sequence[Panel]],
    columns: Sequence[str] = (),
    names: Sequence[str] = (),
    title: str = "",
    side: float = 1.9,
) -> Figure:
    """A grid of panels.

    Args:
        rows: panels; rows may be of different length.
        columns: titles of the columns.
        names: names of the rows.
        title: of the figure.
        side: of a panel, in inches.
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
            axis.imshow(panel, interpolation="nearest")
    for axis, column in zip(axes[0], columns, strict=False):
        axis.set_title(column, fontsize=9)
    for row_axes, name in zip(axes, names, strict=False):
        row_axes[0].text(
            -0.06, 0.5, name, transform=row_axes[0].transAxes, rotation=90, ha="center", va="center", fontsize=8
        )
    return _finish(figure, title)


def plot_history(histories: Mapping[str, History], title: str = "learning curves") -> Figure:
    """A curve per loss, an axis per loss's name; several trainings side by side in colour."""
    losses = sorted({name for history in histories.values() for point in history for name in point} - {"iteration"})
    figure, axes = plt.subplots(
        1, max(1, len(losses)), figsize=(4.2 * max(1, len(losses)), 2.8), squeeze=False, layout="constrained"
    )
    for axis, loss in zip(axes[0], losses, strict=False):
        for name, history in histories.items():
            points = [point for point in history if loss in point]
            axis.plot([point["iteration"] for point in points], [point[loss] for point in points], label=name)
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
    for variant, records in metrics.groupby("variant", sort=False):
        records = records.sort_values("bg_score")
        axis.plot(records["bg_score"], 100 * records["value"], marker=".", label=str(variant))
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
        bars = axis.bar(positions + 0.27 * (offset - 1), table[size].fillna(0), 0.25, label=size, color=color)
        axis.bar_label(bars, fmt="%.0f", fontsize=7)
    axis.set_xticks(positions, [str(name) for name in table.index], rotation=20, ha="right", fontsize=8)
    highest = max(float(table[list(SIZE_COLORS)].max().max()), 1.0)
    axis.set(ylabel="mean IoU in %", ylim=(0, 1.25 * highest))  # room for the legend above the bars
    axis.legend(fontsize=8, ncols=3, loc="upper left")
    axis.grid(axis="y", alpha=0.3)
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


def strongest_map(clean: Tensor) -> Tensor:
    """(K, H, W) to (H, W): the strongest class of each pixel, to show all labelled classes in one picture."""
    return clean.amax(dim=0)


def at_size(cam: Tensor, size: tuple[int, int]) -> Tensor:
    """One raw map (h, w) at image size (H, W), with its peak at 1, to be laid over the image."""
    large = torch.nn.functional.interpolate(cam[None, None].float(), size=size, mode="bilinear", align_corners=False)
    return large[0, 0] / large.max().clamp(min=1e-5)


def _finish(figure: Figure, title: str) -> Figure:
    """Title a figure and close it in pyplot, which otherwise shows it a second time below the notebook's cell."""
    if title:
        figure.suptitle(title, fontsize=11)
    plt.close(figure)
    return figure

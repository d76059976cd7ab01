"""The picture of docs/voc12_small.md: curves of the numbers that docs/voc12_small.json holds."""

from __future__ import annotations

import hashlib
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from smaflib.config import Variant
from smaflib.files import replacing
from smaflib.report.palette import SIZE_COLORS, line_style

SIZES, PHOTOS, GAIN = "object size over scale", "number of photos", "what self-training gains"
ALL, FUSED = "all objects", "fused"
NUMBERS = "Numbers"
"""Of the PNG's metadata: the digest of what is drawn."""

KINDS = {"chain": "EPS, 900 photos", "plain": "plain, 900 photos", "photos 300": "EPS, 300", "photos 100": "EPS, 100"}
MASKS = {
    Variant.TEACHER_FUSED_REFINED: "teacher's masks",
    Variant.PSEUDO_MASKS: "pseudo masks",
    Variant.SEGMENTATION: "segmentation network, on the 200",
}


def curves(rows: pd.DataFrame) -> pd.DataFrame:
    """What is drawn, in %.

    Args:
        rows: of all runs: ``kind``, ``seed``, ``stage``, ``variant``, ``split``, ``scale``, ``fusion``, ``mIoU`` and
            object sizes.

    Returns:
        Columns ``panel``, ``line``, ``x``, ``mean``, ``sd``; sd is NaN for one seed, or for a point that is one.
    """
    points = [*_sizes(rows), *_photos(rows), *_gain(rows)]
    return pd.DataFrame(points, columns=["panel", "line", "x", "mean", "sd"])


def _sizes(rows: pd.DataFrame) -> list[tuple[str, str, str, float, float]]:
    maps = rows[(rows["kind"] == "chain") & (rows["split"] == "train") & (rows["stage"] == "03_multi_scale_attention")]
    single = maps[maps["variant"] == Variant.TEACHER].assign(x=lambda table: table["scale"])
    fused = maps[(maps["variant"] == Variant.TEACHER_FUSED) & (maps["fusion"] == "sum")].assign(x=FUSED)
    both = pd.concat([single, fused])
    return [
        (SIZES, line, str(x), group[column].mean(), group[column].std())
        for line, column in ((ALL, "mIoU"), *((f"{size} objects", size) for size in SIZE_COLORS))
        for x, group in both.groupby("x", sort=False)
        if column in group
    ]


def _photos(rows: pd.DataFrame) -> list[tuple[str, str, str, float, float]]:
    found = []
    for variant, line in MASKS.items():
        split = "val" if variant == Variant.SEGMENTATION else "train"
        of = rows[(rows["variant"] == variant) & (rows["split"] == split)]
        for kind, number in (("photos 100", "100"), ("photos 300", "300"), ("chain", "900")):
            values = of.loc[of["kind"] == kind, "mIoU"]
            if len(values):
                found.append((PHOTOS, line, number, values.mean(), values.std()))
    return found


def _gain(rows: pd.DataFrame) -> list[tuple[str, str, str, float, float]]:
    found = []
    for kind, line in KINDS.items():
        of_kind = rows[(rows["kind"] == kind) & (rows["split"] == "train")]
        of = {variant: group.set_index("seed")["mIoU"] for variant, group in of_kind.groupby("variant")}
        if {Variant.TEACHER_FUSED_REFINED, Variant.PSEUDO_MASKS} <= set(of):
            both = pd.concat([of[Variant.TEACHER_FUSED_REFINED], of[Variant.PSEUDO_MASKS]], axis=1).dropna()
            found += [(GAIN, line, f"{teacher:.3f}", ours - teacher, float("nan")) for teacher, ours in both.to_numpy()]
    return found


def draw(points: pd.DataFrame) -> Figure:
    """One row of three panels."""
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.6), layout="constrained")
    plt.close(figure)
    _draw_lines(axes[0], points[points["panel"] == SIZES])
    axes[0].set(title="teacher's attention maps by object size", xlabel="scale", ylabel="mean IoU in %")
    _draw_lines(axes[1], points[points["panel"] == PHOTOS])
    axes[1].set(title="number of photos", xlabel="photos that are learned from", ylabel="mIoU in %")
    for number, (line, group) in enumerate(points[points["panel"] == GAIN].groupby("line", sort=False)):
        look = {"color": line_style(number)["color"], "marker": "osD^"[number]}
        axes[2].scatter(group["x"].astype(float), group["mean"], label=str(line), **look)
    axes[2].axhline(0, color="grey", linewidth=0.8)
    axes[2].set(title="what self-training gains, a dot per seed")
    axes[2].set(xlabel="mIoU of the teacher's masks in %", ylabel="student's minus teacher's")
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    return figure


def _draw_lines(axis: Axes, points: pd.DataFrame) -> None:
    """Error bars over the seeds; what is fused is no point on the axis of scales, so no line leads there."""
    places = {x: place for place, x in enumerate(points["x"].unique())}
    for number, (line, group) in enumerate(points.groupby("line", sort=False)):
        color = SIZE_COLORS.get(str(line).partition(" ")[0], "black" if line == ALL else line_style(number)["color"])
        style = line_style(number) | {"color": color, "marker": ".", "capsize": 2}
        of_scales = group["x"] != FUSED
        for part, label in ((group[of_scales], str(line)), (group[~of_scales], None)):
            if len(part):
                axis.errorbar(part["x"].map(places), part["mean"], part["sd"].fillna(0), label=label, **style)
    axis.set_xticks(list(places.values()), list(places))
    axis.set_ylim(bottom=0)


def digest(points: pd.DataFrame) -> str:
    """Of what is drawn."""
    return hashlib.sha256(points.round(3).to_csv(index=False).encode()).hexdigest()


def write_curves(path: Path, rows: pd.DataFrame) -> None:
    """Draw a PNG, unless it shows these numbers already: another matplotlib would change its bytes for nothing."""
    points = curves(rows)
    if path.exists() and shown_digest(path) == digest(points):
        return
    with replacing(path) as temporary:
        draw(points).savefig(temporary, dpi=110, metadata={NUMBERS: digest(points)})


def shown_digest(path: Path) -> str:
    """Of what a PNG of :func:`write_curves` shows."""
    with Image.open(path) as picture:
        return str(picture.info.get(NUMBERS, ""))

"""Draw docs/voc12_small.png, the curves of docs/results.md, from docs/voc12_small.json: ``make curves``."""

from __future__ import annotations

import json

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from smaflib.config import Variant
from smaflib.files import PROJECT_ROOT, replacing
from smaflib.report.palette import SIZE_COLORS, line_style

NUMBERS = PROJECT_ROOT / "docs" / "voc12_small.json"
TARGET = PROJECT_ROOT / "docs" / "voc12_small.png"
PHOTOS = {"photos 100": 100, "photos 300": 300, "chain": 900}
MASKS = {
    Variant.TEACHER_FUSED_REFINED: "teacher's masks",
    Variant.PSEUDO_MASKS: "pseudo masks",
    Variant.SEGMENTATION: "segmentation network, on the 200",
}
GAINS = {"chain": "900 photos", "plain": "900, no saliency maps", "photos 300": "300", "photos 100": "100"}


def all_rows() -> pd.DataFrame:
    """Concatenate the results tables of all runs: kind, seed, stage, variant, split, scale, fusion, mIoU in %."""
    runs = json.loads(NUMBERS.read_text(encoding="utf-8"))["runs"].values()
    return pd.DataFrame([{"kind": run["kind"], "seed": run["seed"]} | row for run in runs for row in run["rows"]])


def draw(rows: pd.DataFrame) -> Figure:
    """IoU by object size over scale; mIoU over the number of photos; the student's gain over its teacher."""
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.6), layout="constrained")
    plt.close(figure)
    _draw_sizes(axes[0], rows)
    _draw_photos(axes[1], rows)
    _draw_gains(axes[2], rows)
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    return figure


def _draw_sizes(axis: Axes, rows: pd.DataFrame) -> None:
    maps = rows[(rows["kind"] == "chain") & (rows["split"] == "train") & (rows["stage"] == "03_multi_scale_attention")]
    single = maps[maps["variant"] == Variant.TEACHER].groupby("scale", sort=False)
    fused = maps[(maps["variant"] == Variant.TEACHER_FUSED) & (maps["fusion"] == "sum")]
    lines = {"all objects": "mIoU"} | {f"{size} objects": size for size in SIZE_COLORS}
    for number, (line, column) in enumerate(lines.items()):
        style = line_style(number) | {"color": SIZE_COLORS.get(column, "black"), "marker": ".", "capsize": 2}
        means, spreads = single[column].mean(), single[column].std()
        axis.errorbar(range(len(means)), means, spreads, label=line, **style)
        axis.errorbar([len(means)], [fused[column].mean()], [fused[column].std()], **style)
    scales = [f"{float(str(scale)):g}" for scale in single.groups]
    axis.set_xticks(range(len(scales) + 1), [*scales, "fused"])
    axis.set(title="teacher's attention maps by object size", xlabel="scale", ylabel="mean IoU in %", ylim=(0, None))


def _draw_photos(axis: Axes, rows: pd.DataFrame) -> None:
    for number, (variant, line) in enumerate(MASKS.items()):
        split = "val" if variant == Variant.SEGMENTATION else "train"
        chosen = rows[(rows["variant"] == variant) & (rows["split"] == split) & rows["kind"].isin(PHOTOS)]
        by_number = chosen.groupby(chosen["kind"].map(PHOTOS))["mIoU"]
        spreads = by_number.std().fillna(0)
        style = line_style(number) | {"marker": ".", "capsize": 2}
        axis.errorbar([str(photos) for photos in spreads.index], by_number.mean(), spreads, label=line, **style)
    axis.set(title="number of photos", xlabel="training photos", ylabel="mIoU in %", ylim=(0, None))


def _draw_gains(axis: Axes, rows: pd.DataFrame) -> None:
    masks = rows[(rows["split"] == "train") & rows["variant"].isin(list(MASKS))]
    for number, (kind, line) in enumerate(GAINS.items()):
        seeds = masks[masks["kind"] == kind].pivot(index="seed", columns="variant", values="mIoU").dropna()
        teacher = seeds[Variant.TEACHER_FUSED_REFINED]
        look = {"color": line_style(number)["color"], "marker": "osD^"[number]}
        axis.scatter(teacher, seeds[Variant.PSEUDO_MASKS] - teacher, label=line, **look)
    axis.axhline(0, color="grey", linewidth=0.8)
    axis.set(title="gain of self-training, one dot per seed", xlabel="mIoU of the teacher's masks in %")
    axis.set_ylabel("student's minus teacher's")


if __name__ == "__main__":
    with replacing(TARGET) as temporary:
        draw(all_rows()).savefig(temporary, dpi=110)

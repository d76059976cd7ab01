"""Does the confidence of ``masks.csv`` tell good masks from bad ones? ``smaf masks`` where the true masks are known.

    python -m benchmarks.confidence COCO_SMALL VOC12_SMALL choose
    python -m benchmarks.confidence COCO_SMALL VOC12_SMALL final

Both folders are in VOC's layout. Signs and their weights were chosen on the ``choose`` folds of
:mod:`benchmarks.own_photos`; ``final`` reports on its held-out folds, and on VOC's ``val`` list of 200
photos. A fold is the folder of one user. Results go to results/confidence.json, a record per fold; existing records are
not computed again: delete the file after a change of the recipe.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from scipy.stats import spearmanr

from benchmarks.own_photos import PRESET, make_folder, read_rows, split
from smaflib import files
from smaflib.apps.confidence import Signs
from smaflib.apps.masks import make_masks
from smaflib.config import load_config
from smaflib.data.masks import MaskFiles
from smaflib.evaluation import confusion_matrix, intersection_over_union
from smaflib.files import PROJECT_ROOT
from smaflib.runs.environment import git_state

RESULTS = Path(__file__).parent / "results" / "confidence.json"
TUNED = "photos/labels.csv"  # beside COCO_SMALL: what earlier choices of recipes have seen
NUM_VOC = 200


def folds_of(coco: Path, voc: Path) -> dict[str, tuple[Path, list[dict[str, str]]]]:
    """Photos and rows of each fold by name."""
    tuned = coco.parent / TUNED
    seen = [row["image"] for row in read_rows(tuned)] if tuned.is_file() else []
    folds = {name: (coco, rows) for name, rows in split(read_rows(coco / "labels.csv"), seen).items()}
    row_of = {Path(row["image"]).stem: row for row in read_rows(voc / "labels.csv")}
    val = (voc / "ImageSets" / "Segmentation" / "val.txt").read_text(encoding="utf-8").split()[:NUM_VOC]
    return folds | {f"final voc {NUM_VOC}": (voc, [row_of[image_id] for image_id in val])}


def judged(out: Path, truth: Path) -> tuple[pd.DataFrame, float]:
    """A row per photo and label of a folder of ``smaf masks``: confidence, signs, IoU with the true mask; the mIoU."""
    record = files.read_json(out / "made.json", {})
    names = record["learned"]["class_names"]
    confidence = {
        (Path(row["image"]).stem, row["label"]): float(row["confidence"]) for row in read_rows(out / "masks.csv")
    }
    rows, counts = [], torch.zeros(len(names) + 1, len(names) + 1)
    for image, photo in record["photos"].items():
        mask, true = MaskFiles([out / "masks" / f"{image}.png", truth / f"{image}.png"])
        counts += (matrix := confusion_matrix(mask, true, len(names)))
        iou = intersection_over_union(matrix).tolist()
        for label, sign in zip(photo["labels"], photo["signs"], strict=True):
            found = {"image": image, "label": label, "iou": iou[1 + names.index(label)]}
            rows.append(found | {"confidence": confidence[image, label]} | Signs(*sign)._asdict())
    # A label without a true and a made pixel has no IoU.
    return pd.DataFrame(rows).dropna(), float(intersection_over_union(counts).nanmean())


def measure(table: pd.DataFrame) -> dict[str, Any]:
    """Rank correlations with the IoU, and mean IoU in % of all objects and of the more confident half."""
    half = table.sort_values("confidence", ascending=False)[: len(table) // 2]
    rank = {name: round(float(spearmanr(table[name], table["iou"])[0]), 3) for name in ("confidence", *Signs._fields)}
    ious = {
        name: round(100 * float(each["iou"].mean()), 1) for name, each in (("all", table), ("confident half", half))
    }
    return {"objects": len(table), "rank correlation": rank, "mean IoU": ious}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("coco", metavar="COCO_SMALL", type=Path)
    parser.add_argument("voc", metavar="VOC12_SMALL", type=Path)
    parser.add_argument("purpose", choices=["choose", "final"])
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", dest="settings")
    parser.add_argument("--scratch", type=Path, default=PROJECT_ROOT / "build" / "confidence")
    given = parser.parse_args()
    for fold, (photos, rows) in folds_of(given.coco, given.voc).items():
        kept = files.read_json(RESULTS, {"records": []})["records"]
        key = {"fold": fold, "settings": given.settings}
        if not fold.startswith(given.purpose) or any(key.items() <= record.items() for record in kept):
            continue
        folder = given.scratch / fold.replace(" ", "_")
        settings = make_folder(photos, rows, folder)
        begun = time.monotonic()
        make_masks(load_config(PRESET, [*settings, *given.settings]), folder / "out")
        seconds = round(time.monotonic() - begun)
        found, miou = judged(folder / "out", folder / "masks")
        facts = {"photos": len(rows), "seconds": seconds, "mIoU": round(100 * miou, 1)}
        record = key | facts | measure(found) | git_state()
        files.write_json(RESULTS, {"records": [*kept, record]})
        print(fold, record["mIoU"], record["rank correlation"], record["mean IoU"])


if __name__ == "__main__":
    main()

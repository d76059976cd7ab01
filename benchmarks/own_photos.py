"""Which recipe makes the best masks of a few custom photos? ``configs/custom.yaml``, by folds.

    python -m benchmarks.own_photos PHOTOS choose "today:" "finer: attention.scales=[0.5,0.75,1.0]"
    python -m benchmarks.own_photos PHOTOS final "today:" "chosen: ..."
    python -m benchmarks.own_photos PHOTOS curve "today:"

PHOTOS is a folder in VOC's layout: ``JPEGImages``, ``SegmentationClass`` with VOC's values, ``labels.csv``, and maybe
``saliency``, which recipes with a ``saliency_weight`` use. Each fold
of about 40 photos stands for one user's folder: its classes are the names in its labels, its masks serve evaluation
only. ``choose`` compares recipes, each a name, a colon and settings, on :data:`FOLDS` folds. ``final`` evaluates on
:data:`HELD_OUT` folds whose photos ``choose`` never sees; photos in ``--tuned TABLE`` are never held out. ``curve``
evaluates on folders of 5 to 200 photos. A recipe named ``teacher ...`` trains no student; where ImageNet's classifier
knows all classes, no recipe trains, and the student's numbers are those of its maps. Results go to
results/own_photos.json, a record per recipe and fold; existing records are not computed again.
"""

from __future__ import annotations

import argparse
import csv
import shutil
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from smaflib import files
from smaflib.config import load_config
from smaflib.data.classes import VOC_CLASSES, VOID_LABEL
from smaflib.data.sample import Samples
from smaflib.evaluation import evaluate, sweep_thresholds
from smaflib.files import PROJECT_ROOT
from smaflib.pipeline import self_train_rounds, train_teacher, write_maps, write_masks
from smaflib.runs.environment import git_state
from smaflib.workspace import Workspace

RESULTS = Path(__file__).parent / "results" / "own_photos.json"
PRESET = PROJECT_ROOT / "configs" / "custom.yaml"
FOLDS, HELD_OUT = 4, 2
CURVE = {5: 3, 20: 2, 40: 2, 100: 1, 200: 1}  # photos in a folder: number of folders
HEAD = {"image": "image", "labels": "labels"}
NETWORKS = ("teacher", "student")


def split(rows: Sequence[dict[str, str]], tuned: Iterable[str] = ()) -> dict[str, list[dict[str, str]]]:
    """Deal the rows of a table out to folds: ``choose 0`` ... and ``final 0`` ...

    Args:
        rows: of ``labels.csv``.
        tuned: names of images that an earlier choice has seen: in no held-out fold.

    Returns:
        Disjoint folds that hold all rows; those of one purpose differ by one row at most.
    """
    seen = set(tuned)
    new = [row for row in rows if row["image"] not in seen]
    number = len(rows) * HELD_OUT // (FOLDS + HELD_OUT)
    held = [new[k] for k in np.linspace(0, len(new) - 1, number).astype(int)]
    names = {row["image"] for row in held}
    others = [row for row in rows if row["image"] not in names]
    final = {f"final {k}": held[k::HELD_OUT] for k in range(HELD_OUT)}
    return {f"choose {k}": others[k::FOLDS] for k in range(FOLDS)} | final


def grow(folds: dict[str, list[dict[str, str]]]) -> dict[str, list[dict[str, str]]]:
    """Folders of growing size, ``curve 5 0`` ...: the photos that no choice has seen come first."""
    rows = [row for name in sorted(folds, reverse=True) for row in folds[name]]
    return {f"curve {size} {k}": rows[k * size :][:size] for size, number in CURVE.items() for k in range(number)}


def make_folder(photos: Path, rows: Sequence[dict[str, str]], folder: Path) -> list[str]:
    """Write the table and the masks of one fold, as its user would have them: with the classes of its labels alone.

    Args:
        photos: in VOC's layout.
        rows: of the fold.
        folder: takes ``labels.csv`` and ``masks``.

    Returns:
        Settings that name them.
    """
    names = sorted({name for row in rows for name in row["labels"].split(";")})
    value_of = np.full(256, VOID_LABEL, dtype=np.uint8)  # what a photo shows and no label of the fold names is void
    value_of[0] = 0
    for value, name in enumerate(names, start=1):
        value_of[1 + VOC_CLASSES.index(name)] = value
    files.write_text(folder / "labels.csv", "".join(f"{row['image']},{row['labels']}\n" for row in [HEAD, *rows]))
    for row in rows:
        name = Path(row["image"]).with_suffix(".png").name
        mask = np.asarray(Image.open(photos / "SegmentationClass" / name))
        files.save_image(folder / "masks" / name, Image.fromarray(value_of[mask]))
    paths = {"images": photos / "JPEGImages", "labels": folder / "labels.csv", "masks": folder / "masks"}
    if (photos / "saliency").is_dir():
        paths["saliency"] = photos / "saliency"
    settings = [f"data.{key}={files.absolute(path)}" for key, path in paths.items()]
    return ["data.kind=folder", f"data.class_names=[{','.join(names)}]", *settings]


def measure(name: str, settings: Sequence[str], data: Sequence[str], folder: Path) -> dict[str, Any]:
    """Train by a recipe on one fold, where it trains, and evaluate teacher and student."""
    work = Workspace(folder, load_config(PRESET, [*data, *settings]))
    samples = work.samples().annotated
    begun = time.monotonic()
    networks = ["teacher"] if name.startswith("teacher") else ["student"] if work.untrained else [*NETWORKS]
    if "teacher" in networks:
        train_teacher(work)
    if networks == [*NETWORKS]:
        write_maps(work, "teacher")
        self_train_rounds(work)
    write_maps(work, networks[-1])
    seconds = round(time.monotonic() - begun)
    return {"seconds": seconds} | {network: score(work, network, samples) for network in networks}


def score(work: Workspace, network: str, samples: Samples) -> dict[str, Any]:
    """mIoU in % of the fused maps at their oracle threshold, and of the masks at the run's own."""
    true, names = samples.ground_truth or [], samples.class_names
    sweep = sweep_thresholds(work.denoised(network, samples), true, names, work.config.evaluation)
    shutil.rmtree(work.path("masks"), ignore_errors=True)
    masks = evaluate(write_masks(work, network), true, names, work.config.evaluation)
    return {
        "fused": {"mIoU": 100 * max(each.miou for each in sweep.values())},
        "refined_auto": {"mIoU": 100 * masks.miou},
    }


def evaluate_recipes(photos: Path, purpose: str, recipes: Sequence[str], tuned: Path | None, scratch: Path) -> None:
    """Measure each recipe on each fold of a purpose, and keep the records as they come."""
    folds = split(read_rows(photos / "labels.csv"), (row["image"] for row in read_rows(tuned)) if tuned else ())
    folds |= grow(folds)
    for text in recipes:
        name, _, settings = (part.strip() for part in text.partition(":"))
        for fold, rows in folds.items():
            kept = files.read_json(RESULTS, {"records": []})["records"]
            key = {"recipe": name, "settings": settings.split(), "fold": fold}
            if not fold.startswith(purpose) or any(key.items() <= record.items() for record in kept):
                continue
            slug = f"{name} {fold}".replace(" ", "_")
            data = make_folder(photos, rows, scratch / fold.replace(" ", "_"))
            record = key | {"photos": len(rows)} | measure(name, settings.split(), data, scratch / slug) | git_state()
            files.write_json(RESULTS, {"records": [*kept, record]})
            print(name, fold, {n: (record[n]["fused"], record[n]["refined_auto"]) for n in NETWORKS if n in record})


def read_rows(table: Path) -> list[dict[str, str]]:
    with table.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def table(records: Sequence[dict[str, Any]]) -> str:
    """Mean and standard deviation over folds, a row per purpose and recipe; mIoU in %."""
    rows = [
        {"purpose": record["fold"].rpartition(" ")[0], "recipe": record["recipe"], "minutes": record["seconds"] / 60}
        | {f"{network}, fused": record[network]["fused"]["mIoU"] for network in NETWORKS if network in record}
        | {f"{network}, masks": record[network]["refined_auto"]["mIoU"] for network in NETWORKS if network in record}
        for record in records
    ]
    folds = pd.DataFrame(rows).groupby(["purpose", "recipe"], sort=False)
    return (folds.mean().map("{:.1f}".format) + " ± " + folds.std().map("{:.1f}".format)).to_string()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", metavar="PHOTOS", type=Path)
    parser.add_argument("purpose", choices=["choose", "final", "curve"])
    parser.add_argument("recipes", nargs="*", metavar="NAME:SETTINGS")
    parser.add_argument("--tuned", type=Path, metavar="TABLE", help="photos that an earlier choice has seen")
    parser.add_argument("--scratch", type=Path, default=PROJECT_ROOT / "build" / "own_photos")
    given = parser.parse_intermixed_args()
    evaluate_recipes(given.photos, given.purpose, given.recipes, given.tuned, given.scratch)
    print(table(files.read_json(RESULTS, {"records": []})["records"]))


if __name__ == "__main__":
    main()

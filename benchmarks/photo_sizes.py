"""Do photos of any size get the same masks, in the same time and memory? ``smaf masks`` on three photos at many sizes.

    python -m benchmarks.photo_sizes VOC_FOLDER OUT [--set data.longest_side=null]

VOC_FOLDER holds ``JPEGImages``, ``SegmentationClass`` and ``labels.csv``. Three photos are taken: the first of each of
:data:`CLASSES` with no other label, whose object covers 15 to 50 % of it. Each is enlarged or shrunk (Lanczos, JPEG of
quality 95), its true mask with it; the panorama repeats the photo in mirror images. IoU is that of the object, at the
photo's own size.
"""

from __future__ import annotations

import argparse
import csv
import multiprocessing
import resource
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from smaflib.apps.masks import make_masks
from smaflib.config import load_config

CLASSES = ("cat", "bus", "horse")
SIZES = {f"{side} px": side for side in (64, 250, 500, 1000, 2000, 4000)} | {"panorama of 8000 x 600": 0}


def choose(folder: Path) -> dict[str, str]:
    """Names of the photos, without extension, and their class."""
    chosen: dict[str, str] = {}
    with (folder / "labels.csv").open(encoding="utf-8") as table:
        for row in csv.DictReader(table):
            name, label = Path(row["image"]).stem, row["labels"]
            mask = np.array(Image.open(folder / "SegmentationClass" / f"{name}.png"))
            if label in CLASSES and label not in chosen.values() and 0.15 < ((mask > 0) & (mask < 255)).mean() < 0.5:
                chosen[name] = label
    return chosen


def resize(picture: Image.Image, side: int, how: Image.Resampling) -> Image.Image:
    """The long side at ``side`` pixels; 0: a panorama of 8000 x 600."""
    factor = (side or 800) / max(picture.size)
    resized = picture.resize((round(picture.width * factor), round(picture.height * factor)), how)
    if side:
        return resized
    pixels = np.array(resized.resize((resized.width, 600), how))
    wide = np.pad(pixels, [(0, 0), (0, 8000 - pixels.shape[1])] + [(0, 0)] * (pixels.ndim - 2), mode="symmetric")
    return Image.fromarray(wide)


def measure(folder: Path, out: Path, side: int, settings: list[str]) -> tuple[float, float, float]:
    """Mean IoU of the objects, seconds and peak memory in GB of ``smaf masks``."""
    photos = choose(folder)
    (out / "photos").mkdir(parents=True)
    for name in photos:
        picture = Image.open(folder / "JPEGImages" / f"{name}.jpg")
        resize(picture, side, Image.Resampling.LANCZOS).save(out / "photos" / f"{name}.jpg", quality=95)
    rows = "".join(f"{name}.jpg,{label}\n" for name, label in photos.items())
    (out / "labels.csv").write_text(f"image,labels\n{rows}")
    named = [f"data.images={out / 'photos'}", f"data.labels={out / 'labels.csv'}", *settings]
    started = time.monotonic()
    make_masks(load_config("configs/custom.yaml", named), out / "made")
    seconds, scores = time.monotonic() - started, []
    for name in photos:
        truth = Image.open(folder / "SegmentationClass" / f"{name}.png")
        true = np.array(resize(Image.fromarray(np.array(truth)), side, Image.Resampling.NEAREST))
        made, counted = np.array(Image.open(out / "made" / "masks" / f"{name}.png")) > 0, true != 255
        true = (true > 0) & counted
        scores.append((made & true).sum() / ((made & counted) | true).sum())
    usage = [resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return float(np.mean(scores)), seconds, max(usage) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--set", dest="settings", action="append", default=[])
    parser.add_argument("--sizes", nargs="*", default=list(SIZES), choices=SIZES)
    given = parser.parse_args()
    print("| photos | IoU | seconds | GB |\n|---|---|---|---|")
    for size in given.sizes:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as alone:  # its memory is that of one size
            out = given.out.absolute() / size.replace(" ", "_")
            iou, seconds, memory = alone.submit(
                measure, given.folder.absolute(), out, SIZES[size], given.settings
            ).result()
        print(f"| {size} | {iou:.2f} | {seconds:.0f} | {memory:.1f} |", flush=True)


if __name__ == "__main__":
    main()

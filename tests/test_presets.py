"""Every preset but mini, run through its notebooks for a few iterations on tiny data of the format it is for."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from smaflib.config import load_config
from smaflib.data.masks import save_mask
from smaflib.files import PROJECT_ROOT
from smaflib.runs import find_run
from smaflib.runs.manifest import read_manifest
from smaflib.runs.stages import STAGES

SIZE = 48
COLORS = {"bird": (210, 40, 40), "car": (40, 40, 210)}
TRAIN, VAL = [f"2007_{number:06}" for number in range(4)], [f"2007_{number:06}" for number in range(4, 6)]
LISTS = PROJECT_ROOT / "configs" / "lists"
SMALL_TRAIN = (LISTS / "voc12_small_train.txt").read_text().split()[:6]
SMALL_VAL = (LISTS / "voc12_small_val.txt").read_text().split()[:6]
SMALL = (
    "device=cpu",
    "num_threads=1",
    "data.num_workers=0",
    *(f"{stage}.iterations=2" for stage in ("classifier", "self_training", "segmentation")),
    *(f"{stage}.batch_size=2" for stage in ("classifier", "self_training", "segmentation")),
    *(f"{stage}.crop_size={SIZE}" for stage in ("classifier", "self_training", "segmentation")),
    *(f"{stage}.resize_range=[{SIZE}, {SIZE + 8}]" for stage in ("classifier", "self_training", "segmentation")),
    "segmentation.test_scales=[0.5, 1.0]",
    "pseudo_masks.num_workers=1",
)


def draw(number: int) -> tuple[Image.Image, np.ndarray, str]:
    """A picture with one coloured square, where it is, and what it shows."""
    name = list(COLORS)[number % 2]
    pixels = np.random.default_rng(number).integers(80, 130, (SIZE, SIZE, 3), dtype=np.uint8)
    there = np.zeros((SIZE, SIZE), dtype=bool)
    there[8 + number : 30 + number, 12:36] = True
    pixels[there] = COLORS[name]
    return Image.fromarray(pixels), there, name


def make_voc(root: Path, train: list[str] = TRAIN, val: list[str] = VAL) -> None:
    """VOC 2012 as its archive unpacks, with masks for a part of train_aug only, and saliency maps beside it."""
    for folder in ("JPEGImages", "Annotations", "ImageSets/Segmentation", "SegmentationClass", "saliency"):
        (root / folder).mkdir(parents=True)
    values = {"bird": 3, "car": 7}
    for number, image_id in enumerate(train + val):
        image, there, name = draw(number)
        image.save(root / "JPEGImages" / f"{image_id}.jpg", quality=95)
        xml = f"<annotation><object><name>{name}</name></object></annotation>"
        (root / "Annotations" / f"{image_id}.xml").write_text(xml)
        Image.fromarray((255 * there).astype(np.uint8)).save(root / "saliency" / f"{image_id}.png")
        if image_id != train[-1]:
            save_mask(root / "SegmentationClass" / f"{image_id}.png", values[name] * there)
    (root / "ImageSets/Segmentation/train_aug.txt").write_text("\n".join(train))
    (root / "ImageSets/Segmentation/train.txt").write_text("\n".join(train))
    (root / "ImageSets/Segmentation/val.txt").write_text("\n".join(val))


def make_coco(root: Path) -> None:
    """COCO 2014 as its archives unpack, and saliency maps beside it."""
    (root / "annotations").mkdir(parents=True)
    (root / "saliency").mkdir()
    categories = [{"id": 3, "name": "car"}, {"id": 16, "name": "bird"}]
    for name, numbers in {"train2014": range(4), "val2014": range(4, 6)}.items():
        (root / name).mkdir()
        images, instances = [], []
        for number in numbers:
            image, there, label = draw(number)
            file = f"COCO_{name}_{number:012}.jpg"
            image.save(root / name / file, quality=95)
            Image.fromarray((255 * there).astype(np.uint8)).save(root / "saliency" / file.replace(".jpg", ".png"))
            rows, columns = np.nonzero(there)
            left, top, right, bottom = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
            polygon = [int(x) for x in (left, top, right, top, right, bottom, left, bottom)]
            category = 3 if label == "car" else 16
            instances.append(
                {"id": number + 1, "image_id": number, "category_id": category, "area": int(there.sum()), "iscrowd": 0}
                | {"segmentation": [polygon], "bbox": [0, 0, 1, 1]}
            )
            images.append({"id": number, "file_name": file, "width": SIZE, "height": SIZE})
        content = {"images": images, "annotations": instances, "categories": categories}
        (root / "annotations" / f"instances_{name}.json").write_text(json.dumps(content))


def make_photos(root: Path) -> None:
    """A folder of photos and a table."""
    root.mkdir()
    rows = ["image,labels"]
    for number in range(4):
        image, _, name = draw(number)
        image.save(root / f"photo{number}.jpg")
        rows.append(f"photo{number}.jpg,{name}")
    (root / "labels.csv").write_text("\n".join(rows))


def settings_of(preset: str, data: Path) -> list[str]:
    """What must be set for the tiny data; everything else is the preset's."""
    if preset == "custom":
        return [f"data.images={data}/photos", f"data.labels={data}/photos/labels.csv"]
    if preset == "coco14":
        # voc12 is run with the wide ResNet38; twice would only cost minutes.
        small = ["model.backbone=slim", "segmentation.model.backbone=resnet18", "segmentation.model.weights=null"]
        return [f"data.root={data}/coco", f"data.saliency={data}/coco/saliency", "model.weights=null", *small]
    if preset == "voc12":
        paths = [f"data.root={data}/voc", f"data.saliency={data}/voc/saliency"]
        # Behind frozen BatchNorms a deep network of random weights overflows, and the CRF refuses what is not a number.
        random = ["model.weights=null", "segmentation.model.weights=null", "segmentation.model.freeze_batch_norm=false"]
        return [*paths, *random]
    if preset in ("voc12-small", "voc12-laptop"):  # with the network and the weights of the preset
        few = [f"data.root={data}/small", f"data.saliency={data}/small/saliency", f"data.max_images={len(SMALL_TRAIN)}"]
        return few if preset == "voc12-small" else [*few, "classifier.pretraining=plain"]
    return [f"data.root={data}/voc", "model.weights=null", "model.backbone=resnet18"]


Runs = tuple[Path, dict[str, subprocess.CompletedProcess[str]]]
PRESETS = ("voc12", "coco14", "voc12-resnet50", "voc12-small", "voc12-laptop", "custom")


@pytest.fixture(scope="module")
def runs(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[Path, dict[str, subprocess.CompletedProcess[str]]]]:
    """All presets, two at a time, by the command that users give."""
    folder = tmp_path_factory.mktemp("presets")
    make_voc(folder / "voc")
    make_voc(folder / "small", SMALL_TRAIN, SMALL_VAL)
    make_coco(folder / "coco")
    make_photos(folder / "photos")
    # Stage 00 draws its own images and is the same for every config: not run four times more.
    script = """if True:
        import sys
        from pathlib import Path
        from smaflib.runs.runner import run_notebooks
        from smaflib.runs.stages import STAGES
        run_notebooks(sys.argv[1], sys.argv[2], sys.argv[4:], runs=Path(sys.argv[3]), stages=STAGES[1:])
    """

    def run(preset: str) -> subprocess.CompletedProcess[str]:
        config = PROJECT_ROOT / "configs" / f"{preset}.yaml"
        small = [setting for setting in SMALL if preset != "custom" or "classifier" not in setting]
        command = [sys.executable, "-c", script, str(config), preset, str(folder / "runs")]
        return subprocess.run(
            [*command, *small, *settings_of(preset, folder)],
            capture_output=True,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            timeout=900,
        )

    with ThreadPoolExecutor(2) as pool:
        done = dict(zip(PRESETS, pool.map(run, PRESETS), strict=True))
    yield folder / "runs", done
    shutil.rmtree(folder)  # ResNet38's checkpoints have 420 MB each


@pytest.mark.parametrize("preset", PRESETS)
def test_preset_runs_through_all_notebooks(preset: str, runs: Runs) -> None:
    folder, done = runs
    assert done[preset].returncode == 0, done[preset].stderr[-3000:]
    run = find_run(str(folder / preset))
    stages = read_manifest(run.folder)["stages"]
    assert {name for name, entry in stages.items() if entry["status"] == "complete"} == {s.name for s in STAGES[1:]}
    assert len(list(run.path("masks").glob("*.png"))) == (6 if preset in ("voc12-small", "voc12-laptop") else 4)
    assert run.path("index.html").is_file()


def test_voc_is_evaluated_on_the_images_that_have_masks(runs: Runs) -> None:
    metrics = pd.read_json(runs[0] / "voc12" / "metrics.json")
    evaluated = metrics[(metrics.metric == "iou") & (metrics.class_name == "mean") & (metrics.object_size == "all")]
    assert {"teacher_fused", "teacher_fused_refined", "pseudo_masks", "segmentation"} <= set(evaluated.variant)
    assert evaluated.value.between(0, 1).all()
    notebook = (runs[0] / "voc12" / "08_results.html").read_text()
    assert "72.4" in notebook and "below" in notebook  # two iterations do not reach the paper


@pytest.mark.parametrize("preset", PRESETS)
def test_preset_reads_as_a_config(preset: str) -> None:
    assert load_config(PROJECT_ROOT / "configs" / f"{preset}.yaml").seed == 0


def test_every_config_has_a_test() -> None:
    assert {path.stem for path in (PROJECT_ROOT / "configs").glob("*.yaml")} == {*PRESETS, "mini"}

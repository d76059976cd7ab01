"""Every preset but mini, run for a few iterations on tiny data of its format."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from smaflib.config import Config, load_config
from smaflib.data.masks import save_mask
from smaflib.files import PROJECT_ROOT
from smaflib.pipeline import (
    check_networks,
    self_train_rounds,
    train_segmentation,
    train_teacher,
    write_maps,
    write_masks,
    write_segmentation,
)
from smaflib.runs.manifest import read_manifest
from smaflib.runs.runner import run_notebooks
from smaflib.runs.stages import STAGES
from smaflib.workspace import Workspace

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
    """A picture with one coloured square, its mask, and its class."""
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


CHANGES = {
    "voc12": (
        *("data.root={}/voc", "data.saliency={}/voc/saliency", "model.backbone=slim", "model.weights=null"),
        *("segmentation.model.backbone=resnet18", "segmentation.model.weights=null"),
        "segmentation.model.freeze_batch_norm=false",  # frozen, random weights overflow
    ),
    "coco14": (
        *("data.root={}/coco", "data.saliency={}/coco/saliency", "model.backbone=slim", "model.weights=null"),
        *("segmentation.model.backbone=resnet18", "segmentation.model.weights=null"),
    ),
    "voc12-resnet50": ("data.root={}/voc", "model.weights=null", "model.backbone=resnet18"),
    "voc12-small": ("data.root={}/small", "data.saliency={}/small/saliency", "data.max_images=6"),
    "voc12-laptop": ("data.root={}/voc", "data.saliency=null", "classifier.pretraining=plain"),
    "custom": ("data.images={}/photos", "data.labels={}/photos/labels.csv"),
}
"""What the tiny data need; everything else is the preset's."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    make_voc(folder / "voc")
    make_voc(folder / "small", SMALL_TRAIN, SMALL_VAL)
    make_coco(folder / "coco")
    make_photos(folder / "photos")
    return folder


def overrides(preset: str, data: Path) -> list[str]:
    small = [setting for setting in SMALL if preset != "custom" or not setting.startswith("classifier")]
    return [*small, *(change.format(data) for change in CHANGES[preset])]


def tiny(preset: str, data: Path) -> Config:
    return load_config(PROJECT_ROOT / "configs" / f"{preset}.yaml", overrides(preset, data))


def test_every_config_has_a_test() -> None:
    assert {path.stem for path in (PROJECT_ROOT / "configs").glob("*.yaml")} == {*CHANGES, "mini"}


@pytest.mark.parametrize("preset", [preset for preset in CHANGES if preset not in ("voc12", "custom")])
def test_preset_runs_from_images_to_masks(preset: str, data: Path, tmp_path: Path) -> None:
    config = tiny(preset, data)
    check_networks(config)
    work = Workspace(tmp_path, config)
    train_teacher(work)
    write_maps(work, "teacher")
    self_train_rounds(work)
    assert len(write_masks(work)) == len(work.samples()) > 0
    train_segmentation(work)
    assert len(write_segmentation(work)) == len(work.samples("val")) > 0


@pytest.mark.parametrize("preset", ["voc12", "custom"])  # with ground truth and the paper's results, and without
def test_preset_runs_through_all_notebooks(preset: str, data: Path, tmp_path: Path) -> None:
    config = PROJECT_ROOT / "configs" / f"{preset}.yaml"
    run = run_notebooks(config, preset, overrides(preset, data), runs=tmp_path, stages=STAGES[1:])
    stages = read_manifest(run.folder)["stages"]
    assert {name for name, entry in stages.items() if entry["status"] == "complete"} == {s.name for s in STAGES[1:]}
    assert len(list(run.path("masks").glob("*.png"))) == 4 and run.path("index.html").is_file()
    if preset == "voc12":
        metrics = run.metrics().query("metric == 'iou' and class_name == 'mean' and object_size == 'all'")
        assert {"teacher_fused", "teacher_fused_refined", "pseudo_masks", "segmentation"} <= set(metrics.variant)
        assert "72.4" in (run.folder / "08_results.html").read_text()

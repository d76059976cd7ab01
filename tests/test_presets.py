"""Every preset but mini, run for a few iterations on tiny data."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from helpers import execute_here
from PIL import Image

from smaflib.config import load_config
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
from smaflib.report.tables import paper_table
from smaflib.runs.kernel import NotebookKernel
from smaflib.runs.manifest import read_manifest
from smaflib.runs.runner import run_notebooks
from smaflib.runs.stages import STAGES
from smaflib.workspace import Workspace

CONFIGS = PROJECT_ROOT / "configs"
SIZE = 48
CLASSES = {"bird": (3, (210, 40, 40)), "car": (7, (40, 40, 210))}  # number in VOC's masks, colour
TINY = {"iterations": 2, "batch_size": 2, "crop_size": SIZE, "resize_range": [SIZE, SIZE + 8]}
COMMON = (
    "device=cpu",
    "num_threads=1",
    "data.num_workers=0",
    *(f"{stage}.{key}={value}" for stage in ("self_training", "segmentation") for key, value in TINY.items()),
    "segmentation.test_scales=[0.5, 1.0]",
    "pseudo_masks.num_workers=1",
)
CLASSIFIER = tuple(f"classifier.{key}={value}" for key, value in TINY.items())
VOC = ("data.kind=voc", "data.root={}/voc", "data.train_split=train", "data.val_split=val", *CLASSIFIER)
SALIENCY = "data.saliency={}/voc/saliency"
SMALL_NETWORKS = (
    *("model.backbone=slim", "model.weights=null"),
    *("segmentation.model.backbone=resnet18", "segmentation.model.weights=null"),
    "segmentation.model.freeze_batch_norm=false",  # frozen, random weights overflow
)
# CLIP's weights are not here, so the attention of this preset comes from ImageNet's classifier.
STAND_IN = ("attention.source=imagenet", "attention.caa=null", *SMALL_NETWORKS[2:])
CHANGES = {
    "voc12": (*VOC, SALIENCY, *SMALL_NETWORKS),
    "coco14": (*VOC, SALIENCY, *SMALL_NETWORKS),
    "voc12-resnet50": (*VOC, "model.weights=null", "model.backbone=resnet18"),
    "voc12-small": (*VOC, SALIENCY),
    "voc12-laptop": (*VOC, "data.saliency=null", "classifier.pretraining=plain"),
    "voc12-clip-es": (*VOC, "model.backbone=slim", "model.weights=null", "model.freeze_batch_norm=false", *STAND_IN),
    "custom": ("data.images={}/voc/JPEGImages", "data.labels={}/labels.csv", "data.longest_side=64"),
}
"""What the tiny data need; everything else is the preset's."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six images of one coloured square, as VOC and as photos with a table; two are for validation."""
    folder = tmp_path_factory.mktemp("data")
    root, rows = folder / "voc", ["image,labels"]
    for name in ("JPEGImages", "Annotations", "ImageSets/Segmentation", "SegmentationClass", "saliency"):
        (root / name).mkdir(parents=True)
    for number in range(6):
        name = list(CLASSES)[number % 2]
        value, colour = CLASSES[name]
        pixels = np.random.default_rng(number).integers(80, 130, (SIZE, SIZE, 3), dtype=np.uint8)
        square = np.zeros((SIZE, SIZE), dtype=np.uint8)
        square[8 + number : 30 + number, 12:36] = 1
        pixels[square > 0] = colour
        Image.fromarray(pixels).save(root / "JPEGImages" / f"{number}.jpg", quality=95)
        xml = f"<annotation><object><name>{name}</name></object></annotation>"
        (root / "Annotations" / f"{number}.xml").write_text(xml)
        Image.fromarray(255 * square).save(root / "saliency" / f"{number}.png")
        save_mask(root / "SegmentationClass" / f"{number}.png", value * square)
        rows.append(f"{number}.jpg,{name}")
    (root / "ImageSets/Segmentation/train.txt").write_text("0\n1\n2\n3")
    (root / "ImageSets/Segmentation/val.txt").write_text("4\n5")
    (folder / "labels.csv").write_text("\n".join(rows))
    return folder


def overrides(preset: str, data: Path) -> list[str]:
    return [*COMMON, *(change.format(data) for change in CHANGES[preset])]


def test_every_config_has_a_test() -> None:
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == {*CHANGES, "mini"}


@pytest.mark.parametrize("preset", [preset for preset in CHANGES if preset not in ("voc12", "custom")])
def test_preset_runs_from_images_to_masks(preset: str, data: Path, tmp_path: Path) -> None:
    config = load_config(CONFIGS / f"{preset}.yaml", overrides(preset, data))
    work = Workspace(tmp_path, config)
    check_networks(config, work.samples().class_names)
    train_teacher(work)
    write_maps(work, "teacher")
    self_train_rounds(work)
    assert len(write_masks(work)) == len(work.samples()) == 4
    train_segmentation(work)
    assert len(write_segmentation(work)) == 2


@pytest.mark.parametrize("preset", ["voc12", "custom"])  # with ground truth and the paper's results, and without
def test_preset_runs_through_all_notebooks(
    preset: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cell by cell in this process; kernels are those of :mod:`test_notebooks`."""
    monkeypatch.setattr(NotebookKernel, "execute", execute_here)
    run = run_notebooks(CONFIGS / f"{preset}.yaml", preset, overrides(preset, data), runs=tmp_path, stages=STAGES[1:])
    stages = read_manifest(run.folder)["stages"]
    assert {name for name, entry in stages.items() if entry["status"] == "complete"} == {s.name for s in STAGES[1:]}
    assert run.path("index.html").is_file()
    if preset == "custom":
        assert len(list(run.path("masks").glob("*.png"))) == 6
    else:
        metrics = run.metrics()
        measured = metrics.query("metric == 'iou' and class_name == 'mean' and object_size == 'all'")
        assert {"teacher_fused", "teacher_fused_refined", "pseudo_masks", "segmentation"} <= set(measured.variant)
        assert "72.4" in paper_table(metrics, run.config.evaluation.paper_results).to_string()

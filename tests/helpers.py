"""Tiny samples and networks that the tests of several modules share. Nothing is read from the disk."""

from __future__ import annotations

import contextlib
import html
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from smaflib.classifier import train_classifier
from smaflib.config import Config, check_settings
from smaflib.data.sample import Sample, SampleFiles, Samples
from smaflib.models.networks import AttentionNetwork, Network, SegmentationNetwork
from smaflib.pseudo_masks import pseudo_mask
from smaflib.runtime import Runtime, derive_seed, seeded
from smaflib.segmentation import train_segmenter
from smaflib.self_training import self_train
from smaflib.training import History
from smaflib.workspace import Workspace


def network_references(page: str) -> list[str]:
    """Addresses that a page of HTML loads by itself; links that a reader may click do not count."""
    text = page + html.unescape(page)  # a page inside a frame's srcdoc is escaped
    loads = r"""<(?!a\s)\w+\s[^>]*?\b(?:src|srcset|href|poster|data|action)=["']?\s*((?:https?:)?//[^\s"'>]+)"""
    in_css = r"""(?:@import|url\()\s*["']?((?:https?:)?//[^\s"')]+)"""
    scripts = " ".join(re.findall(r"<script\b.*?</script>", text, re.DOTALL))
    return [*re.findall(loads, text), *re.findall(in_css, text), *re.findall(r"https?://[^\s\"')]+", scripts)]


def mask_at(work: Workspace, image_id: str, bg_score: float) -> Tensor:
    """An image's pseudo mask at a background threshold, uint8 (H, W), from the student's maps."""
    samples = work.samples()
    index = samples.image_ids.index(image_id)
    maps = work.mask_maps("student", samples)[index]
    return pseudo_mask(samples[index].image, maps, bg_score, work.config.pseudo_masks)


def execute_here(kernel: Any, notebook: Path, target: Path, parameters: dict[str, Any], cwd: Path) -> Any:
    """In place of ``NotebookKernel.execute``: the cells in this process, which has torch loaded already."""
    import nbformat
    from IPython.display import display
    from matplotlib import pyplot

    document = nbformat.read(notebook, as_version=4)
    document.metadata.papermill = {}
    scope: dict[str, Any] = {"display": display}
    with patch("smaflib.report.exercises.solution", contextlib.nullcontext):  # folds what a kernel displays
        for cell in document.cells:
            if cell.cell_type == "code":
                exec(cell.source, scope)
                scope |= parameters if "parameters" in cell.metadata.get("tags", []) else {}
                pyplot.close("all")
    return document


CLASSES = ("red", "green", "blue")


TRAINING = {
    "iterations": 4,
    "batch_size": 2,
    "crop_size": 32,
    "resize_range": [32, 48],
    "color_jitter": [0, 0, 0, 0],
    "head_multiplier": 1,
    "bias_multiplier": 1,
    "optimizer": "adamw",
    "schedule": "onecycle",
    "weight_decay": 0.01,
    "learning_rate": 0.004,
}
"""Settings of a training that takes well below a second."""


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_samples(
    num: int = 5,
    size: tuple[int, int] = (32, 40),
    saliency: bool = True,
    ground_truth: bool = True,
    split: str = "train",
) -> Samples:
    """Grey noise with one rectangle of pure colour per image: class ``i % 3`` in image ``i``."""

    def read(files: SampleFiles, num_classes: int) -> Sample:
        index = int(files.image_id.removeprefix("image"))
        height, width = size
        image = torch.randint(90, 120, (3, height, width), dtype=torch.uint8, generator=generator(index))
        top, left = height // 4 + index % 3, width // 4 - index % 3
        window = (slice(top, top + height // 2), slice(left, left + width // 2))
        mask = torch.zeros(height, width, dtype=torch.uint8)
        image_label = torch.zeros(num_classes)
        for number in files.labels:
            image[(slice(None), *window)] = 0
            image[(number, *window)] = 255
            mask[window] = number + 1
            image_label[number] = 1
        grey = (mask > 0).float() if files.saliency else None
        return Sample(files.image_id, image, image_label, grey, mask if files.mask else None)

    files = tuple(
        SampleFiles(
            f"image{index}",
            Path(f"image{index}.jpg"),
            (index % len(CLASSES),),
            Path("saliency.png") if saliency else None,
            Path("mask.png") if ground_truth else None,
        )
        for index in range(num)
    )
    return Samples(files, CLASSES, split, read)


def tiny_config(**groups: dict[str, Any]) -> Config:
    """A run on the slim network with tiny trainings; ``tiny_config(attention={"scales": [1]})`` overrides."""
    settings: dict[str, Any] = {
        "data": {"kind": "mini"},
        "model": {"backbone": "slim", "freeze_batch_norm": False},
        "classifier": dict(TRAINING),
        "attention": {"scales": [0.5, 1.0]},
        "self_training": dict(TRAINING),
        "segmentation": TRAINING | {"aspp_dilations": [1, 2]},
    }
    for name, group in groups.items():
        settings[name] = settings.get(name, {}) | group
    return check_settings(settings)


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    """Bit for bit, buffers included."""
    left, right = one.state_dict(), other.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def slim_network(background: bool = True) -> AttentionNetwork:
    """The slim network for three classes, weights from seed 0."""
    torch.manual_seed(0)
    return AttentionNetwork(tiny_config().model, 3, background)


class PixelNetwork(nn.Module):
    """Logit maps that are a function of the pixel alone: the image, averaged over cells, times a matrix.

    What it gives for an image can be worked out by hand. The normalisation of the image is undone first.
    """

    def __init__(self, matrix: Tensor, stride: int = 1, bias: Tensor | None = None) -> None:
        super().__init__()
        self.matrix = nn.Parameter(matrix.float())  # (channels, 3)
        self.bias = bias
        self.stride = stride

    def forward(self, images: Tensor) -> Tensor:  # (B, 3, H, W) -> (B, channels, H/stride, W/stride)
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        pixels = images * std[:, None, None] + mean[:, None, None]
        pixels = nn.functional.avg_pool2d(pixels, self.stride)
        logits = torch.einsum("kc,bchw->bkhw", self.matrix, pixels)
        return logits if self.bias is None else logits + self.bias[:, None, None]

    def attention(self, logits: Tensor) -> Tensor:
        return logits.relu()


def new_teacher(config: Config, num_classes: int, runtime: Runtime) -> AttentionNetwork:
    """The untrained network that stage 1 begins with."""
    with seeded(derive_seed(runtime.seed, "initial weights")):
        return AttentionNetwork(config.model, num_classes, config.classifier.pretraining == "eps").to(runtime.device)


def new_segmenter(config: Config, num_classes: int, runtime: Runtime) -> SegmentationNetwork:
    """The untrained network that stage 6 begins with."""
    model = config.segmentation.model or config.model
    with seeded(derive_seed(runtime.seed, "segmenter's initial weights")):
        return SegmentationNetwork(model, config.segmentation, num_classes).to(runtime.device)


def train_teacher(
    samples: Samples, config: Config, runtime: Runtime, checkpoint: Path | None = None
) -> tuple[AttentionNetwork, History]:
    """Stage 1 with the settings of a config."""
    options: dict[str, Any] = {"attention": config.attention, "checkpoint": checkpoint}
    return train_classifier(samples, config.model, config.classifier, runtime, **options)


def train_student(
    teacher: Network,
    samples: Samples,
    denoised: Sequence[Tensor],
    config: Config,
    runtime: Runtime,
    checkpoint: Path | None = None,
) -> tuple[Network, History]:
    """Stage 4 with the settings of a config."""
    assert config.attention.bg_score != "auto"
    settings, bg_score = config.self_training, config.attention.bg_score
    return self_train(teacher, samples, denoised, settings, bg_score, runtime, checkpoint=checkpoint)


def train_segmentation(
    samples: Samples,
    masks: Sequence[Tensor],
    config: Config,
    runtime: Runtime,
    checkpoint: Path | None = None,
    student: AttentionNetwork | None = None,
) -> tuple[SegmentationNetwork, History]:
    """Stage 6 with the settings of a config."""
    options: dict[str, Any] = {"checkpoint": checkpoint, "student": student}
    return train_segmenter(samples, masks, config.model, config.segmentation, runtime, **options)

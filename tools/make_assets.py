"""The networks that come with the package, and the README's picture of the scales: ``make assets`` makes them."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch

from smaflib.data import load_samples, make_data
from smaflib.files import replacing
from smaflib.models.pretrained import ASSETS, CONFIG_FILE, pretrained_network, short_config
from smaflib.models.weights import read_weights, write_weights
from smaflib.pipeline import attend
from smaflib.pseudo_masks import pseudo_mask
from smaflib.workspace import Workspace


def export_networks(run_folder: Path, assets: Path = ASSETS) -> None:
    """Write teacher and student of a finished run in half precision, with the run's settings."""
    assets.mkdir(parents=True, exist_ok=True)
    for role in ("teacher", "student"):
        state = read_weights(run_folder / "checkpoints" / f"{role}.safetensors")
        halved = {name: value.half() if value.dtype == torch.float32 else value for name, value in state.items()}
        write_weights(assets / f"mini_{role}.safetensors", halved)
    (assets / CONFIG_FILE.name).write_text((run_folder / "config.yaml").read_text(encoding="utf-8"), encoding="utf-8")


def draw_scales(target: Path, image_index: int = 4) -> None:
    """Draw a small and a large object at every scale, by the pretrained teacher.

    Args:
        target: a PNG file.
        image_index: which of the images that notebook 00 draws.
    """
    from smaflib.report.plots import show_scales

    with tempfile.TemporaryDirectory() as folder:
        config = short_config(Path(folder) / "data")
        make_data(config, Path(folder))
        samples = load_samples(config, "train").with_ground_truth()
        sample = samples[image_index]
    bg_score = Workspace(Path(), config).bg_score
    teacher = attend(pretrained_network("teacher"), sample.image, sample.image_label, config.attention, bg_score)
    mask = pseudo_mask(sample.image, teacher.denoised, bg_score, config.pseudo_masks)
    parts = (sample.image, teacher.cams, teacher.fused, mask, config.attention.scales)
    numbers = sample.image_label.nonzero()[:, 0].tolist()
    figure = show_scales(*parts, numbers, sample.mask, bg_score=bg_score, class_names=samples.class_names)
    with replacing(target) as temporary:
        figure.savefig(temporary, bbox_inches="tight")


if __name__ == "__main__":
    export_networks(Path(sys.argv[1]))
    if len(sys.argv) > 2:
        draw_scales(Path(sys.argv[2]))

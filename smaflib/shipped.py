"""The two small networks that come with the package: teacher and student of the mini data set's reference run.

They let notebook 00 and the explorer show real attention maps right after installation. ``make assets`` makes them
anew from a run of ``configs/mini.yaml``: half precision, weights only; with them, the picture of the chain.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Literal

import torch

from smaflib.cams import fuse_cams, multi_scale_cams
from smaflib.config import Config, load_config
from smaflib.data import load_samples, make_data
from smaflib.data.mini import CLASS_NAMES
from smaflib.files import replacing
from smaflib.models.networks import AttentionNetwork, load_attention_network
from smaflib.models.weights import read_weights, write_weights
from smaflib.pseudo_masks import pseudo_mask
from smaflib.reactivation import denoise, reactivate

ASSETS = Path(__file__).parent / "assets"
CONFIG_FILE = ASSETS / "mini.yaml"

UNSEEN_SEED = 2024
"""Draws images that the shipped networks were not trained on."""

Role = Literal["teacher", "student"]


def shipped_config() -> Config:
    """The settings of the run that the shipped networks come from."""
    return load_config(CONFIG_FILE)


def shipped_network(role: Role) -> AttentionNetwork:
    """The shipped teacher or student, in eval mode; its classes are :data:`smaflib.data.mini.CLASS_NAMES`."""
    return load_attention_network(ASSETS / f"mini_{role}.safetensors", shipped_config().model, len(CLASS_NAMES))


def short_config(data_folder: Path) -> Config:
    """The shipped settings with a few images and trainings of a few seconds, for notebook 00.

    Args:
        data_folder: where the images are drawn.
    """
    config = shipped_config()
    changes = {
        "data": {"root": data_folder, "num_train": 20, "num_val": 10},
        "self_training": {"iterations": 40},
        "segmentation": {"iterations": 80},
    }
    groups = {group: getattr(config, group).model_copy(update=change) for group, change in changes.items()}
    return config.model_copy(update=groups | {"seed": UNSEEN_SEED})


def export_networks(run_folder: Path, assets: Path = ASSETS) -> None:
    """Write teacher and student of a finished run in half precision, with the run's settings."""
    assets.mkdir(parents=True, exist_ok=True)
    for role in ("teacher", "student"):
        state = read_weights(run_folder / "checkpoints" / f"{role}.safetensors")
        halved = {name: value.half() if value.dtype == torch.float32 else value for name, value in state.items()}
        write_weights(assets / f"mini_{role}.safetensors", halved)
    (assets / CONFIG_FILE.name).write_text((run_folder / "config.yaml").read_text(encoding="utf-8"), encoding="utf-8")


def draw_chain(target: Path, image_index: int = 4) -> None:
    """Draw the README's picture of the chain: one image from its label to a mask, by the shipped networks.

    Args:
        target: a PNG file.
        image_index: which of the images that notebook 00 draws.
    """
    from smaflib.plots import at_size, overlay_map, overlay_mask, picture, plot_chain, strongest_map

    with tempfile.TemporaryDirectory() as folder:
        config = short_config(Path(folder) / "data")
        make_data(config, Path(folder))
        samples = load_samples(config, "train").with_truth()
        sample = samples[image_index]
    attention, label = config.attention, sample.image_label
    size = (sample.image.shape[1], sample.image.shape[2])
    assert sample.mask is not None
    cams = multi_scale_cams(shipped_network("teacher"), sample.image, attention.scales)
    fused = fuse_cams(cams, size, attention.fusion, attention.scales)
    clean = denoise(fused, label)
    of_student = multi_scale_cams(shipped_network("student"), sample.image, attention.scales)
    clean_student = denoise(fuse_cams(of_student, size, attention.fusion, attention.scales), label)
    mask = pseudo_mask(sample.image, clean_student, attention.settled_bg_score, config.pseudo_masks.crf)
    labels = [name for name, there in zip(samples.class_names, label, strict=True) if there]
    scales = [torch.stack([at_size(cam[k], size) for k in label.nonzero()[:, 0]]).amax(dim=0) for cam in cams]
    maps = [strongest_map(m) for m in (fused, clean, reactivate(clean, attention.settled_bg_score)[1:], clean_student)]
    shown = [overlay_map(sample.image, m) for m in [*scales, *maps]]
    steps = {
        f"an image and its label\n“{', '.join(labels)}”": [picture(sample.image)],
        "the teacher's attention\nat several scales": shown[: len(scales)],
        "fused\nall classes, each peaks at 1": [shown[-4]],
        "denoised\nabsent classes are zero": [shown[-3]],
        "reactivated\nthe winner of each pixel is 1": [shown[-2]],
        "the student, which has\nlearned such targets, fused": [shown[-1]],
        "pseudo mask\nstrongest class, dense CRF": [overlay_mask(sample.image, mask)],
        "(the truth, which\nno step has seen)": [overlay_mask(sample.image, sample.mask)],
    }
    figure = plot_chain(steps)
    with replacing(target) as temporary:
        figure.savefig(temporary, dpi=110, bbox_inches="tight")


if __name__ == "__main__":
    export_networks(Path(sys.argv[1]))
    if len(sys.argv) > 2:
        draw_chain(Path(sys.argv[2]))

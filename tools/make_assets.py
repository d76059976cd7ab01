"""The networks that come with the package, and the README's picture of the chain: ``make assets`` makes them."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch

from smaflib.cams import at_size
from smaflib.data import load_samples, make_data
from smaflib.files import replacing
from smaflib.models.pretrained import ASSETS, CONFIG_FILE, ROLES, pretrained_network, short_config
from smaflib.models.weights.files import read_weights, write_weights
from smaflib.pipeline import Workspace, attend
from smaflib.pseudo_masks import pseudo_mask


def export_networks(run_folder: Path, assets: Path = ASSETS) -> None:
    """Write teacher and student of a finished run in half precision, with the run's settings."""
    assets.mkdir(parents=True, exist_ok=True)
    for role in ("teacher", "student"):
        state = read_weights(run_folder / "checkpoints" / f"{role}.safetensors")
        halved = {name: value.half() if value.dtype == torch.float32 else value for name, value in state.items()}
        write_weights(assets / f"mini_{role}.safetensors", halved)
    (assets / CONFIG_FILE.name).write_text((run_folder / "config.yaml").read_text(encoding="utf-8"), encoding="utf-8")


def draw_chain(target: Path, image_index: int = 4) -> None:
    """Draw the README's picture of the chain: one image from its label to a mask, by the pretrained networks.

    Args:
        target: a PNG file.
        image_index: which of the images that notebook 00 draws.
    """
    from smaflib.report.plots import overlay_map, overlay_mask, picture, plot_chain, strongest_map

    with tempfile.TemporaryDirectory() as folder:
        config = short_config(Path(folder) / "data")
        make_data(config, Path(folder))
        samples = load_samples(config, "train").with_masks()
        sample = samples[image_index]
    label, size = sample.image_label, (sample.image.shape[1], sample.image.shape[2])
    bg_score = Workspace(Path(), config).bg_score
    assert sample.mask is not None
    teacher, student = (
        attend(pretrained_network(role), sample.image, label, config.attention, bg_score) for role in ROLES
    )
    mask = pseudo_mask(sample.image, student.denoised, bg_score, config.pseudo_masks)
    labels = [name for name, there in zip(samples.class_names, label, strict=True) if there]
    scales = [torch.stack([at_size(cam[k], size) for k in label.nonzero()[:, 0]]).amax(dim=0) for cam in teacher.cams]
    steps = (teacher.fused, teacher.denoised, teacher.target[1:], student.denoised)
    maps = [strongest_map(step) for step in steps]
    shown = [overlay_map(sample.image, m) for m in [*scales, *maps]]
    titled = {
        f"an image and its label\n“{', '.join(labels)}”": [picture(sample.image)],
        "the teacher's attention\nat several scales": shown[: len(scales)],
        "fused\nall classes, each peaks at 1": [shown[-4]],
        "denoised\nabsent classes are zero": [shown[-3]],
        "reactivated\nthe winner of each pixel is 1": [shown[-2]],
        "the student, which has\nlearned such targets, fused": [shown[-1]],
        "pseudo mask\nstrongest class, dense CRF": [overlay_mask(sample.image, mask, samples.class_names)],
        "(the ground truth, which\nno step has seen)": [overlay_mask(sample.image, sample.mask, samples.class_names)],
    }
    figure = plot_chain(titled)
    with replacing(target) as temporary:
        figure.savefig(temporary, dpi=110, bbox_inches="tight")


if __name__ == "__main__":
    export_networks(Path(sys.argv[1]))
    if len(sys.argv) > 2:
        draw_chain(Path(sys.argv[2]))

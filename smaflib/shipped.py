"""The two small networks that come with the package: teacher and student of the mini data set's reference run.

They let notebook 00 and the explorer show real attention maps right after installation. ``make assets`` makes them
anew from a run of ``configs/mini.yaml``: half precision, weights only.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Literal

import torch

from smaflib.config import Config, load_config
from smaflib.data.mini import CLASS_NAMES
from smaflib.models.networks import AttentionNetwork, load_attention_network
from smaflib.models.weights import read_weights, write_weights

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


if __name__ == "__main__":
    export_networks(Path(sys.argv[1]))

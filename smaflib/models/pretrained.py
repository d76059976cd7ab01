"""The two small networks in the package: teacher and student of the mini data set's reference run.

With them notebook 00 and the explorer show real attention maps right after installation. ``make assets`` exports them
from a run of ``configs/mini.yaml``, in half precision.
"""

import json
from pathlib import Path
from typing import Literal, get_args

from minidata.dataset import CLASS_NAMES
from smaflib.config import Config, load_config
from smaflib.data import Samples, load_samples, make_data
from smaflib.files import absolute
from smaflib.models.networks import AttentionNetwork, load_attention_network

ASSETS = Path(__file__).parent / "assets"
CONFIG_FILE = ASSETS / "mini.yaml"

UNSEEN_SEED = 2024  # draws images that the pretrained networks were not trained on

Role = Literal["teacher", "student"]
ROLES: tuple[Role, ...] = get_args(Role)


def pretrained_config() -> Config:
    """The settings of the run that trained the networks."""
    return load_config(CONFIG_FILE)


def pretrained_network(role: Role) -> AttentionNetwork:
    """The pretrained teacher or student, in eval mode; its classes are those of the mini data set."""
    return load_attention_network(ASSETS / f"mini_{role}.safetensors", pretrained_config().model, len(CLASS_NAMES))


def short_config(data_folder: Path) -> Config:
    """The pretrained settings with few images, drawn into a folder, and trainings of a few seconds, for notebook 00."""
    few = ["data.num_train=20", "data.num_val=10", "self_training.iterations=40", "segmentation.iterations=80"]
    root = json.dumps(str(data_folder.absolute()))  # a path may look like YAML
    return load_config(CONFIG_FILE, [f"seed={UNSEEN_SEED}", f"data.root={root}", *few])


def drawn_samples(folder: str | Path) -> Samples:
    """20 images that the networks were not trained on, drawn into a folder on first use."""
    config = short_config(absolute(folder))
    make_data(config, absolute(folder))
    return load_samples(config, "train")

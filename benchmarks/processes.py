"""How much faster several processes are than one, on the cores of a CPU.

    python benchmarks/processes.py [--repeats 3]

Attention maps, dense CRF and training steps of a pretrained-size network with random weights on drawn images of 320
pixels. A figure is the cost of one more image, mask or step, so the start of the processes does not count; medians.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import torch

from smaflib import pipeline
from smaflib.config import Config, check_settings
from smaflib.data import make_data
from smaflib.models.networks import AttentionNetwork
from smaflib.models.weights import write_weights
from smaflib.workspace import Workspace

WAYS = {"1 process, 1 thread": (1, 1), "1 process, 2 threads": (1, 2), "2 processes, 1 thread each": (2, 1)}
"""(processes, threads of each)."""

TRAINING = {"batch_size": 4, "crop_size": 192, "resize_range": [192, 256]}


def config_of(processes: int, threads: int) -> Config:
    return check_settings(
        {
            "device": "cpu",
            "processes": processes,
            "num_threads": threads,
            "data": {"kind": "mini", "num_train": 24, "num_val": 1, "image_size": 320, "cache": True},
            "model": {"backbone": "timm/tf_efficientnet_lite0", "output_stride": 16},
            "classifier": TRAINING,
            "self_training": TRAINING,
            "segmentation": TRAINING,
            "pseudo_masks": {"num_workers": 1, "bg_score": 0.3},
        }
    )


def seconds(call: Callable[[], object]) -> float:
    start = time.monotonic()
    with contextlib.redirect_stderr(io.StringIO()):
        call()
    return time.monotonic() - start


def cost_of_file(folder: Path, call: Callable[[], object], few: int = 4, many: int = 24) -> float:
    """Milliseconds of one more file that a call makes; it skips those that exist."""
    call()
    times = []
    for number in (few, many):
        for path in sorted(folder.iterdir())[:number]:
            path.unlink()
        times.append(seconds(call))
    return 1000 * (times[1] - times[0]) / (many - few)


def cost_of_step(work: Workspace, few: int = 3, many: int = 15) -> float:
    times = []
    for steps in (few, many):
        classifier = work.config.classifier.model_copy(update={"iterations": steps})
        data = work.config.data.model_copy(update={"root": work.folder / "data"})
        config = work.config.model_copy(update={"classifier": classifier, "data": data})
        other = Workspace(work.folder / f"steps{steps}", config)
        times.append(seconds(lambda: pipeline.train_teacher(other)))  # noqa: B023
    return 1000 * (times[1] - times[0]) / (many - few)


def measure(folder: Path, processes: int, threads: int) -> dict[str, float]:
    work = Workspace(folder, config_of(processes, threads))
    seconds(lambda: make_data(work.config, work.folder))
    torch.manual_seed(0)
    network = AttentionNetwork(work.config.model, len(work.samples().class_names), background=False)
    write_weights(work.checkpoint("teacher"), network.state_dict(), iteration=0, history=[])
    maps = cost_of_file(work.path("cams", "teacher"), lambda: pipeline.write_maps(work, "teacher"))
    shutil.copytree(work.path("cams", "teacher"), work.path("cams", "student"))
    masks = cost_of_file(work.path("masks"), lambda: pipeline.write_masks(work))
    return {"maps, ms an image": maps, "dense CRF, ms a mask": masks, "training, ms a step": cost_of_step(work)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    repeats = parser.parse_args().repeats
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in WAYS}
    for _ in range(repeats):
        for name, (processes, threads) in WAYS.items():
            with tempfile.TemporaryDirectory() as folder:
                rows[name].append(measure(Path(folder), processes, threads))
    medians = {name: pd.DataFrame(found).median() for name, found in rows.items()}
    print(pd.DataFrame(medians).T.round().to_string())


if __name__ == "__main__":
    main()

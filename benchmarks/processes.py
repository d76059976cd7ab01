"""Several processes against one: how far their weights are apart, how much faster they are, and what a kill does.

    python benchmarks/processes.py [--only equality speed kills]

Everything runs on the CPU, on drawn images. *equality*: trainings of 50 steps in 1, 2 and 3 processes, and as a control
in one process whose first weights were moved by 1e-7, a float32's rounding. *speed*: maps, dense CRF and training steps
in one process and in two, what an image costs beyond the start of the processes. *kills*: one of two processes is
killed at a random moment, ten times, and every byte compared. Results go to results/processes.json, the tables to
docs/processes.md; what ``--only`` leaves out stays as it is.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import os
import random
import shutil
import signal
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

import smaflib.training
from smaflib import files, pipeline
from smaflib.config import Config, check_settings
from smaflib.data import make_data
from smaflib.pipeline import Workspace
from smaflib.report.markdown import fill_page, markdown_table
from smaflib.runs.environment import git_state

RESULTS = Path(__file__).parent / "results" / "processes.json"
PAGE = files.PROJECT_ROOT / "docs" / "processes.md"
PARTS = ("equality", "speed", "kills")
SIZES, STEPS, MOVED = (2, 3), 50, 1e-7
TRAINING = {"iterations": STEPS, "batch_size": 6, "crop_size": 64, "resize_range": [64, 96], "checkpoint_every": 10}
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "sgd": {"optimizer": "sgd", "learning_rate": 0.01},
    "adamw": {"optimizer": "adamw", "learning_rate": 0.001, "weight_decay": 0.01},
}
KILLS, SEED = 10, 0


def tiny_config(optimizer: str, frozen: bool, pretraining: str) -> Config:
    """A network of 0.8 million weights on a dozen drawn images."""
    training = TRAINING | OPTIMIZERS[optimizer] | {"color_jitter": [0, 0, 0, 0]}
    return check_settings(
        {
            "device": "cpu",
            "num_threads": 1,
            "data": {"kind": "mini", "num_train": 12, "num_val": 2, "image_size": 96, "cache": True},
            "model": {"backbone": "slim", "freeze_batch_norm": frozen},
            "classifier": training | {"pretraining": pretraining},
            "attention": {"scales": [0.5, 1.0]},
            "self_training": training,
            "segmentation": training | {"aspp_dilations": [1, 2]},
        }
    )


def workspace(folder: Path, config: Config, processes: int) -> Workspace:
    work = Workspace(folder, config.model_copy(update={"processes": processes}))
    quietly(make_data, work.config, work.data_folder)
    return work


def quietly(function: Callable[..., Any], *arguments: Any) -> Any:
    with contextlib.redirect_stderr(io.StringIO()):
        return function(*arguments)


# ------------------------------------------------------------------------------------------------------------ equality


@contextlib.contextmanager
def moved_weights() -> Iterator[None]:
    """Trainings begin with every weight moved by a share of :data:`MOVED`, up or down."""
    make = smaflib.training.make_optimizer

    def move(network: torch.nn.Module, config: Any) -> torch.optim.Optimizer:
        generator = torch.Generator().manual_seed(SEED)
        with torch.no_grad():
            for weights in network.parameters():
                weights.mul_(1 + MOVED * torch.randn(weights.shape, generator=generator).sign())
        return make(network, config)

    smaflib.training.make_optimizer = move
    try:
        yield
    finally:
        smaflib.training.make_optimizer = make


def learn(folder: Path, config: Config, processes: int, start: Path | None = None) -> Workspace:
    """The teacher; with EPS also student and segmentation network, of what one process's teacher and student say."""
    work = workspace(folder, config, processes)
    quietly(pipeline.train_teacher, work)
    if config.classifier.pretraining == "plain":
        return work
    if start is None:
        quietly(pipeline.write_maps, work, "teacher")
    else:  # what one process taught, so that each training is compared by itself
        work.checkpoint("teacher").rename(work.checkpoint("own_teacher"))
        for part in ("checkpoints/teacher.safetensors", "cams", "masks", "bg_scores"):
            source, target = start / part, folder / part
            (shutil.copytree if source.is_dir() else shutil.copyfile)(source, target)
    quietly(pipeline.train_student, work)
    if start is None:
        quietly(pipeline.write_maps, work, "student")
        quietly(pipeline.write_masks, work)
    quietly(pipeline.train_segmentation, work)
    if start is not None:
        work.checkpoint("own_teacher").replace(work.checkpoint("teacher"))
    return work


def apart(one: Path, other: Path) -> float:
    """The largest difference of a weight, in parts of the largest weight of its tensor."""
    left, right = load_file(one), load_file(other)
    return max(
        float((left[name].float() - right[name].float()).abs().max() / left[name].float().abs().max().clamp(min=1e-3))
        for name in left
    )


def equality(folder: Path) -> list[dict[str, Any]]:
    rows = []
    for optimizer, kind, pretraining in itertools.product(OPTIMIZERS, ("frozen", "learned"), ("plain", "eps")):
        if optimizer == "adamw" and (kind, pretraining) != ("frozen", "eps"):
            continue  # what it adds shows in one of the four
        config, home = tiny_config(optimizer, kind == "frozen", pretraining), folder / f"{optimizer}{kind}{pretraining}"
        one = learn(home / "1", config, 1)
        others = {f"{size} processes": learn(home / str(size), config, size, one.folder) for size in SIZES}
        with moved_weights():
            others["control"] = learn(home / "moved", config, 1, one.folder)
        for network in ("teacher", "student", "segmenter") if pretraining == "eps" else ("teacher",):
            own = one.checkpoint(network)
            found = {name: apart(own, work.checkpoint(network)) for name, work in others.items()}
            name = f"{network}, {pretraining}" if network == "teacher" else network
            rows.append({"training": name, "optimizer": optimizer, "batch_norm": kind} | found)
            print(rows[-1], flush=True)
    return rows


# --------------------------------------------------------------------------------------------------------------- speed


def photo_config() -> Config:
    """Images of 320 pixels and the network of the preset for photos, with random weights."""
    training = {"batch_size": 4, "crop_size": 192, "resize_range": [192, 256]}
    return check_settings(
        {
            "device": "cpu",
            "data": {"kind": "mini", "num_train": 24, "num_val": 1, "image_size": 320, "cache": True},
            "model": {"backbone": "timm/tf_efficientnet_lite0", "output_stride": 16},
            "classifier": training,
            "self_training": training,
            "segmentation": training,
            "pseudo_masks": {"num_workers": 1, "bg_score": 0.3},
        }
    )


def speed(folder: Path, repeats: int = 3) -> list[dict[str, Any]]:
    """Median seconds that an image, a mask or a step costs more, with as many threads in all as the two cores."""
    ways = {"1 process, 1 thread": (1, 1), "1 process, 2 threads": (1, 2), "2 processes, 1 thread each": (2, 1)}
    config, times = photo_config(), {name: {what: [] for what in ("maps", "crf", "training")} for name in ways}
    for repeat in range(repeats):
        for name, (processes, threads) in ways.items():
            home = folder / f"{repeat}{processes}{threads}"
            work = workspace(home, config.model_copy(update={"num_threads": threads}), processes)
            for what, cost in (("maps", maps_cost), ("crf", crf_cost), ("training", training_cost)):
                times[name][what].append(cost(work))
            print(name, {what: round(values[-1], 3) for what, values in times[name].items()}, flush=True)
            shutil.rmtree(home)
    return [{"way": name} | {what: statistics.median(found) for what, found in times[name].items()} for name in ways]


def beyond_start(few: tuple[int, float], many: tuple[int, float]) -> float:
    """Seconds of one more: (number, seconds) of a short and of a long call."""
    return (many[1] - few[1]) / (many[0] - few[0])


def maps_cost(work: Workspace) -> float:
    from smaflib.models.networks import AttentionNetwork
    from smaflib.models.weights import write_weights

    torch.manual_seed(SEED)
    network = AttentionNetwork(work.config.model, len(work.samples().class_names), background=False)
    write_weights(work.checkpoint("teacher"), network.state_dict(), iteration=0, history=[])
    return beyond_start(*(per_image(work, number, "cams/teacher", ".npz", "write_maps") for number in (4, 24)))


def crf_cost(work: Workspace) -> float:
    shutil.copytree(work.path("cams", "teacher"), work.path("cams", "student"))
    pipeline.resolve_mask_bg_score(work)
    return beyond_start(*(per_image(work, number, "masks", ".png", "write_masks") for number in (4, 24)))


def per_image(work: Workspace, missing: int, folder: str, ending: str, function: str) -> tuple[int, float]:
    """Make the files of some images anew; all the others are there."""
    whole = [work.path(folder, f"{image_id}{ending}") for image_id in work.samples().image_ids]
    if not all(path.is_file() for path in whole):
        run_once(work, function)
    for path in whole[:missing]:
        path.unlink()
    begun = time.monotonic()
    run_once(work, function)
    return missing, time.monotonic() - begun


def run_once(work: Workspace, function: str) -> None:
    arguments = ("teacher",) if function == "write_maps" else ()
    quietly(getattr(pipeline, function), work, *arguments)


def training_cost(work: Workspace) -> float:
    found = []
    for steps in (3, 15):
        settings = work.config.classifier.model_copy(update={"iterations": steps})
        changed = Workspace(work.folder / f"steps{steps}", work.config.model_copy(update={"classifier": settings}))
        quietly(make_data, changed.config, changed.data_folder)
        begun = time.monotonic()
        quietly(pipeline.train_teacher, changed)
        found.append((steps, time.monotonic() - begun))
    return beyond_start(*found)


# --------------------------------------------------------------------------------------------------------------- kills


def kills(folder: Path, number: int) -> list[dict[str, Any]]:
    """Teacher and maps in two processes; undisturbed, then with one of them killed at a random moment."""
    config = tiny_config("sgd", True, "eps")

    def make(home: Path) -> dict[str, bytes]:
        work = workspace(home, config, 2)
        quietly(pipeline.train_teacher, work)
        quietly(pipeline.write_maps, work, "teacher")
        made = [*work.path("checkpoints").iterdir(), *work.path("cams").rglob("*.npz")]
        return {str(path.relative_to(home)): path.read_bytes() for path in made}

    begun = time.monotonic()
    expected = make(folder / "calm")
    seconds, rows, chance = time.monotonic() - begun, [], random.Random(SEED)
    for attempt in range(number):
        moment, hit = chance.uniform(0, seconds), threading.Event()
        thread = threading.Thread(target=kill_one, args=(moment, chance.random(), hit))
        thread.start()
        same = make(folder / str(attempt)) == expected
        thread.join()
        rows.append({"after_s": round(moment, 1), "killed": hit.is_set(), "same_bytes": same, "left": len(workers())})
        print(rows[-1], flush=True)
    return rows


def kill_one(after: float, which: float, hit: threading.Event) -> None:
    """Kill one of the workers that are there after some seconds, or the first that comes."""
    time.sleep(after)
    end = time.monotonic() + 60
    while not hit.is_set() and time.monotonic() < end:
        if found := workers():
            with contextlib.suppress(ProcessLookupError):
                os.kill(found[int(which * len(found))], signal.SIGKILL)
                hit.set()
        time.sleep(0.05)


def workers() -> list[int]:
    table = subprocess.run(["ps", "-ewwo", "pid=,args="], capture_output=True, text=True, check=True).stdout
    rows = [line.split(None, 1) for line in table.splitlines()]
    return [int(pid) for pid, words in rows if "smaflib.distributed.worker" in words and "distributed.run" not in words]


# --------------------------------------------------------------------------------------------------------------- table


def tables(results: dict[str, Any]) -> dict[str, str]:
    """The page's tables by name."""
    rows = results.get("equality", [])
    columns = [f"{size} processes" for size in SIZES] + ["control"]
    lines = [
        [row["training"], row["optimizer"], row["batch_norm"], *(f"{row[name]:.0e}" for name in columns)]
        for row in rows
    ]
    found = {"equality": markdown_table(["training", "optimizer", "BatchNorm", *columns], lines)}
    rows, whats = results.get("speed", []), ("maps", "crf", "training")
    lines = [
        [row["way"], *(f"{1000 * row[what]:.0f} ({rows[0][what] / row[what]:.2f} x)" for what in whats)] for row in rows
    ]
    found["speed"] = markdown_table(["way", "maps, ms an image", "dense CRF, ms a mask", "training, ms a step"], lines)
    rows = results.get("kills", [])
    same, killed, left = (sum(row[name] for row in rows) for name in ("same_bytes", "killed", "left"))
    found["kills"] = (
        f"{killed} of {len(rows)} kills hit a working process; {same} of {len(rows)} runs ended with the same bytes; "
        f"{left} processes stayed behind."
    )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="the others stay as they are")
    parser.add_argument("--page", action="store_true", help="write the tables of what was measured, measure nothing")
    arguments = parser.parse_args()
    results = files.read_json(RESULTS, {})
    parts: dict[str, Callable[[Path], Any]] = {
        "equality": equality,
        "speed": speed,
        "kills": lambda folder: kills(folder, KILLS),
    }
    for name in () if arguments.page else arguments.only:
        with tempfile.TemporaryDirectory(prefix="smaf-processes-") as folder:
            results[name] = parts[name](Path(folder))
        files.write_json(RESULTS, results | git_state())
    fill_page(PAGE, "benchmarks/processes.py", tables(results))


if __name__ == "__main__":
    main()

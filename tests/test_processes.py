"""Several processes of a stage: the same numbers as one, whatever happens to one of them."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import TRAINING, make_samples, tiny_config
from ranks import end_second
from safetensors.torch import load_file
from torch import Tensor

from smaflib import pipeline
from smaflib.classifier import train_classifier
from smaflib.config import Config
from smaflib.data import make_data
from smaflib.errors import ConfigError, RunError
from smaflib.pipeline import check_networks, train_student, train_teacher, write_maps, write_masks
from smaflib.processes import barrier, num_processes, rank, run_in_processes
from smaflib.runtime import Runtime
from smaflib.segmentation import train_segmenter
from smaflib.self_training import self_train
from smaflib.training import load_history
from smaflib.workspace import Workspace

LONG: dict[str, Any] = TRAINING | {"iterations": 10, "batch_size": 5, "optimizer": "sgd", "learning_rate": 0.01}
"""Not AdamW: where a gradient is next to zero, its first steps are as long as elsewhere, with a rounding's sign."""

FROZEN = {"freeze_batch_norm": True}


def train_all(folder: Path) -> None:
    """Teachers, student and segmentation network, in batches of five: the parts differ in size."""
    torch.set_num_threads(1)
    samples, runtime = make_samples(7), Runtime()
    masks: list[Tensor] = [sample.mask for sample in samples.with_ground_truth()]  # type: ignore[misc]
    masks[0][:, :20] = 255  # so that the parts differ in the pixels that count
    for kind in ("plain", "eps"):
        config = tiny_config(model=FROZEN, classifier=LONG | {"pretraining": kind})
        path = folder / f"{kind}.safetensors"
        teacher, _ = train_classifier(samples, config.model, config.classifier, runtime, checkpoint=path)
    config = tiny_config(model=FROZEN, self_training=LONG, segmentation=LONG)
    maps = [torch.rand(3, 32, 40, generator=torch.Generator().manual_seed(n)) for n in range(7)]
    path = folder / "student.safetensors"
    self_train(teacher, samples, maps, config.self_training, 0.3, runtime, checkpoint=path)
    path = folder / "segmenter.safetensors"
    train_segmenter(samples, masks, config.model, config.segmentation, runtime, checkpoint=path)


def make_all(work: Workspace) -> None:
    """Maps, student and masks of a teacher; the maps of the masks are the teacher's."""
    write_maps(work, "teacher")
    train_student(work)
    if rank() == 0:
        shutil.copytree(work.path("cams", "teacher"), work.path("cams", "student"))
    barrier()
    write_masks(work)


def train_and_make_all(folder: Path, work: Workspace) -> None:
    train_all(folder)
    make_all(work)


def workspace(folder: Path, number: int, **groups: Any) -> Workspace:
    data = {"num_train": 7, "num_val": 3, "image_size": 64, "cache": True}
    trainings = {name: LONG | {"iterations": 6} for name in ("classifier", "self_training")}
    for name, group in groups.items():
        trainings[name] = trainings.get(name, {}) | group
    config = tiny_config(data=data, model=FROZEN, segmentation={"enabled": False}, **trainings)
    own = {"processes": number, "num_threads": 1, "device": "cpu"}
    work = Workspace(folder, config.model_copy(update=own))
    make_data(work.config, work.folder)
    return work


def test_two_processes_learn_and_make_what_one_does(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Networks up to rounding; given the same weights, maps and masks are the same bytes."""
    one, two = (workspace(tmp_path / name, 2, self_training={"refine": "crf"}) for name in ("one", "two"))
    asked: list[tuple[int, str]] = []
    with monkeypatch.context() as alone:
        alone.setattr(pipeline, "run_in_processes", lambda n, call, *_, **__: asked.append((n, call.__name__)))
        train_teacher(one)
        two.checkpoint("teacher").parent.mkdir()
        shutil.copy(one.checkpoint("teacher"), two.checkpoint("teacher"))
        train_all(tmp_path / "one_all")
        capfd.readouterr()
        run_in_processes(2, train_and_make_all, tmp_path / "two_all", two)
        assert "classifier:" in capfd.readouterr().err  # the progress bar of rank 0
        make_all(one)
    assert asked == [(2, name) for name in ("train_teacher", "write_maps", "train_student", "write_masks")]
    for name in ("plain", "eps", "student", "segmenter"):
        assert_close(tmp_path / "one_all" / f"{name}.safetensors", tmp_path / "two_all" / f"{name}.safetensors")
    assert_close(one.checkpoint("student"), two.checkpoint("student"), 1e-4)
    made = [bytes_in(work, "cams", "masks") for work in (one, two)]
    assert made[0] == made[1] and len(made[0]) == 7 + 7 + 7


def assert_close(one: Path, other: Path, tolerance: float = 1e-5) -> None:
    expected, found = load_file(one), load_file(other)
    assert expected.keys() == found.keys()
    for key, value in expected.items():
        difference = float((found[key].float() - value.float()).abs().max())
        assert difference <= tolerance * max(float(value.float().abs().max()), 1e-2), (one.name, key)
    for left, right in zip(load_history(one), load_history(other), strict=True):
        assert right == pytest.approx(left, rel=1e-4)


def bytes_in(work: Workspace, *folders: str) -> dict[Path, bytes]:
    paths = [path for folder in folders for path in work.path(folder).rglob("*.*") if path.is_file()]
    return {path.relative_to(work.folder): path.read_bytes() for path in paths}


def children_of(pid: int) -> list[int]:
    """The processes that run_in_processes has started."""
    table = subprocess.run(["ps", "-ewwo", "pid=,ppid=,args="], capture_output=True, text=True, check=True).stdout
    rows = [line.split(None, 2) for line in table.splitlines()]
    return [int(row[0]) for row in rows if row[1] == str(pid) and "multiprocessing.spawn" in row[2]]


def test_a_training_of_which_a_process_was_killed_resumes_with_another_number(tmp_path: Path) -> None:
    """After its first checkpoint one of the two is killed; alone it ends as an undisturbed training."""
    settings = LONG | {"iterations": 60, "checkpoint_minutes": 0, "momentum": 0.9}
    calm, hit = (workspace(tmp_path / str(number), number, classifier=settings) for number in (1, 2))
    path = hit.checkpoint("teacher")

    def kill() -> None:
        while not path.is_file():
            time.sleep(0.01)
        os.kill(children_of(os.getpid())[-1], signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    with pytest.raises(RunError, match="process . terminated with signal SIGKILL"):
        train_teacher(hit)
    thread.join()
    assert "optimizer.0.momentum_buffer" in load_file(path) and not children_of(os.getpid())
    resumed, _ = train_teacher(Workspace(hit.folder, calm.config))
    whole, _ = train_teacher(calm)
    for left, right in zip(resumed.state_dict().values(), whole.state_dict().values(), strict=True):
        assert torch.allclose(left.float(), right.float(), rtol=1e-4, atol=1e-6)


def test_what_a_process_raises_is_told_here(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"Process 1 (.|\n)*end_second(.|\n)*No space left on device"):
        run_in_processes(2, end_second, tmp_path)
    assert not children_of(os.getpid())


def test_processes_end_with_the_one_that_waits(tmp_path: Path) -> None:
    code = "import sys, pathlib, ranks, smaflib.processes\n"
    code += "smaflib.processes.run_in_processes(2, ranks.wait, pathlib.Path(sys.argv[1]))"
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], env=env)
    try:
        while len(workers := [int(path.stem) for path in tmp_path.glob("*.pid")]) < 2:
            assert process.poll() is None
            time.sleep(0.05)
        assert sorted(children_of(process.pid)) == sorted(workers)
    finally:
        process.kill()
        process.wait()
    while any(Path(f"/proc/{pid}").exists() for pid in workers):
        time.sleep(0.05)


def test_number_of_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    def config(number: int | str, **update: Any) -> Config:
        return tiny_config(**{name: {"batch_size": 8} for name in ("classifier", "segmentation")}).model_copy(
            update={"processes": number} | update
        )

    assert num_processes(config("auto", device="cpu")) == 1
    assert num_processes(config(2, device="cpu")) == 2
    assert num_processes(config(3, device="cpu")) == 2  # images of the smallest batch
    with pytest.raises(ConfigError, match="batch norm cannot learn its statistics in several processes on a CPU; set"):
        check_networks(config(2, device="cpu"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    assert num_processes(config("auto")) == 2

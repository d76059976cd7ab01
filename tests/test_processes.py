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
from safetensors.torch import load_file
from torch import Tensor

from smaflib import processes
from smaflib.classifier import train_classifier
from smaflib.config import Config, dump_config
from smaflib.data import make_data
from smaflib.errors import ConfigError, RunError
from smaflib.pipeline import (
    check_networks,
    train_student,
    train_teacher,
    write_maps,
    write_masks,
)
from smaflib.processes import barrier, num_processes, rank, run_in_processes
from smaflib.runtime import Runtime
from smaflib.segmentation import train_segmenter
from smaflib.self_training import self_train
from smaflib.training import load_history
from smaflib.workspace import Workspace

LONG: dict[str, Any] = TRAINING | {"iterations": 50, "batch_size": 5, "optimizer": "sgd", "learning_rate": 0.01}
"""Not AdamW: where a gradient is next to zero, its first steps are as long as elsewhere, with a rounding's sign."""

FROZEN = {"freeze_batch_norm": True}


def train_all(folder: Path) -> None:
    """Teachers, student and segmentation network after 25 steps, in batches of five: the parts differ in size."""
    torch.set_num_threads(1)
    samples, runtime = make_samples(7), Runtime()
    masks: list[Tensor] = [sample.mask for sample in samples.with_ground_truth()]  # type: ignore[misc]
    masks[0][:, :20] = 255  # so that the parts differ in the pixels that count
    settings = LONG | {"iterations": 25}
    for kind in ("plain", "eps"):
        config = tiny_config(model=FROZEN, classifier=settings | {"pretraining": kind})
        path = folder / f"{kind}.safetensors"
        teacher, _ = train_classifier(samples, config.model, config.classifier, runtime, checkpoint=path)
    config = tiny_config(model=FROZEN, self_training=settings, segmentation=settings)
    maps = [torch.rand(3, 32, 40, generator=torch.Generator().manual_seed(n)) for n in range(7)]
    path = folder / "student.safetensors"
    self_train(teacher, samples, maps, config.self_training, 0.3, runtime, checkpoint=path)
    path = folder / "segmenter.safetensors"
    train_segmenter(samples, masks, config.model, config.segmentation, runtime, checkpoint=path)


def test_several_processes_learn_what_one_learns(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    one, three = tmp_path / "one", tmp_path / "three"
    train_all(one)
    capfd.readouterr()
    run_in_processes(3, train_all, three)
    assert "classifier:" in capfd.readouterr().err  # the progress bar of rank 0
    names = sorted(path.name for path in one.iterdir())
    assert len(names) == 4
    for name in names:
        expected, found = load_file(one / name), load_file(three / name)
        assert expected.keys() == found.keys()
        for key, value in expected.items():
            difference = float((found[key].float() - value.float()).abs().max())
            assert difference <= 1e-5 * float(value.float().abs().max()), (name, key)
        for left, right in zip(load_history(one / name), load_history(three / name), strict=True):
            assert right == pytest.approx(left, rel=1e-4)


def test_a_training_resumes_with_another_number_of_processes(tmp_path: Path) -> None:
    path = tmp_path / "teacher.safetensors"
    with pytest.raises(RunError, match="stopped half way"):
        run_in_processes(2, stop_half_way, path)
    assert "optimizer.0.momentum_buffer" in load_file(path)
    samples, config = make_samples(7), half_way()
    finished, _ = train_classifier(samples, config.model, config.classifier, Runtime(), checkpoint=path)
    whole, _ = train_classifier(samples, config.model, config.classifier, Runtime())
    for left, right in zip(finished.state_dict().values(), whole.state_dict().values(), strict=True):
        assert torch.allclose(left.float(), right.float(), rtol=1e-4, atol=1e-6)


def half_way() -> Config:
    settings = LONG | {"iterations": 20, "checkpoint_minutes": 0, "momentum": 0.9}
    return tiny_config(model=FROZEN, classifier=settings)


def stop_half_way(path: Path) -> None:
    import smaflib.training

    save = smaflib.training._save_unfinished

    def save_and_stop(*arguments: Any, **metadata: Any) -> None:
        save(*arguments, **metadata)
        if metadata["iteration"] == 10:
            raise RuntimeError("stopped half way")

    smaflib.training._save_unfinished = save_and_stop
    config = half_way()
    train_classifier(make_samples(7), config.model, config.classifier, Runtime(), checkpoint=path)


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


def test_maps_targets_and_masks_of_two_processes_are_those_of_one(tmp_path: Path) -> None:
    """Given the same weights, the same bytes."""
    one, two = (workspace(tmp_path / str(number), number, self_training={"refine": "crf"}) for number in (1, 2))
    train_teacher(one)
    two.checkpoint("teacher").parent.mkdir()
    shutil.copy(one.checkpoint("teacher"), two.checkpoint("teacher"))
    for work in (one, two):
        write_maps(work, "teacher")
    student, curve = train_student(two)
    assert curve == load_history(two.checkpoint("student")) and len(curve) == 6
    alone, _ = train_student(one)
    for left, right in zip(student.state_dict().values(), alone.state_dict().values(), strict=True):
        assert torch.allclose(left.float(), right.float(), rtol=1e-4, atol=1e-4)
    shutil.copy(two.checkpoint("student"), one.checkpoint("student"))
    for work in (one, two):
        shutil.copytree(work.path("cams", "teacher"), work.path("cams", "student"))
        write_masks(work)
    made = [bytes_in(work, "cams", "masks") for work in (one, two)]
    assert made[0] == made[1] and len(made[0]) == 7 + 7 + 7


def bytes_in(work: Workspace, *folders: str) -> dict[Path, bytes]:
    paths = [path for folder in folders for path in work.path(folder).rglob("*.*") if path.is_file()]
    return {path.relative_to(work.folder): path.read_bytes() for path in paths}


def children_of(pid: int) -> list[int]:
    """The processes that run_in_processes has started."""
    table = subprocess.run(["ps", "-ewwo", "pid=,ppid=,args="], capture_output=True, text=True, check=True).stdout
    rows = [line.split(None, 2) for line in table.splitlines()]
    return [int(row[0]) for row in rows if row[1] == str(pid) and "multiprocessing.spawn" in row[2]]


def test_a_killed_process_is_started_again(tmp_path: Path) -> None:
    """After its first checkpoint one of the two is killed; the result is that of an undisturbed training."""
    settings = LONG | {"iterations": 60, "checkpoint_minutes": 0}
    calm, hit = (workspace(tmp_path / str(number), number, classifier=settings) for number in (1, 2))
    killed: list[int] = []

    def kill() -> None:
        while not hit.checkpoint("teacher").is_file():
            time.sleep(0.01)
        killed.append(children_of(os.getpid())[-1])
        os.kill(killed[0], signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    several, _ = train_teacher(hit)
    thread.join()
    alone, _ = train_teacher(calm)
    assert killed and not children_of(os.getpid())
    for left, right in zip(several.state_dict().values(), alone.state_dict().values(), strict=True):
        assert torch.allclose(left.float(), right.float(), rtol=1e-5, atol=1e-6)


def end_second(folder: Path, how: str) -> None:
    (folder / f"{rank()}.{time.monotonic_ns()}").touch()
    if rank() == 1:
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        raise OSError(28, "No space left on device")
    barrier()


def test_processes_that_are_killed_again_and_again_are_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "RESTARTS", 1)
    with pytest.raises(RunError, match=r"2 processes of end_second ended 2 times, at last with exit code .*-9.*memory"):
        run_in_processes(2, end_second, tmp_path, "killed")
    assert len(list(tmp_path.glob("1.*"))) == 2


def test_what_a_process_raises_is_told_here(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"Process 1 (.|\n)*end_second(.|\n)*No space left on device"):
        run_in_processes(2, end_second, tmp_path, "OSError")
    assert len(list(tmp_path.glob("1.*"))) == 1  # not started again
    assert not children_of(os.getpid())


def test_processes_end_with_the_one_that_waits(tmp_path: Path) -> None:
    work = workspace(tmp_path, 2, classifier=LONG | {"iterations": 1000, "checkpoint_minutes": 0})
    (tmp_path / "config.yaml").write_text(dump_config(work.config), encoding="utf-8")
    code = "import sys; from pathlib import Path; from smaflib import config, pipeline, workspace\n"
    code += "folder = Path(sys.argv[1]); "
    code += "pipeline.train_teacher(workspace.Workspace(folder, config.load_config(folder / 'config.yaml')))"
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stderr=subprocess.DEVNULL)
    try:
        while not work.checkpoint("teacher").is_file():
            assert process.poll() is None
            time.sleep(0.05)
        workers = children_of(process.pid)
        assert len(workers) == 2
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

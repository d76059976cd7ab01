"""Several processes of a stage: the same numbers as one, whatever happens to one of them."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from helpers import TRAINING, compile_without_compiler, fill_disk, make_samples, same_weights, tiny_config
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn
from torchvision.ops import StochasticDepth

from smaflib import files
from smaflib.classifier import train_classifier
from smaflib.config import Config, dump_config
from smaflib.config_reads import SETTINGS_FILE, follow, recorded_settings, recording_where_asked
from smaflib.data import make_data
from smaflib.data.masks import read_mask
from smaflib.distributed import launch
from smaflib.distributed.launch import RESTARTS, num_processes
from smaflib.distributed.layers import see_whole_batch
from smaflib.distributed.ranks import Ranks, gather_parts, ranks_here, sum_gradients, sum_over_ranks, wait_for_all
from smaflib.errors import ConfigError, RunError
from smaflib.pipeline import (
    Workspace,
    check_networks,
    resolve_bg_score,
    train_student,
    train_teacher,
    write_maps,
    write_masks,
)
from smaflib.runtime import Runtime, cpu_runtime, is_compiled
from smaflib.segmentation import train_segmenter
from smaflib.self_training import self_train
from smaflib.training import load_history

LONG: dict[str, Any] = TRAINING | {"iterations": 50, "batch_size": 5, "optimizer": "sgd", "learning_rate": 0.01}
"""Not AdamW: where a gradient is next to zero, its first steps are as long as elsewhere, with a rounding's sign."""


# --- parts ------------------------------------------------------------------------------------------------------------


@given(st.integers(0, 40), st.integers(1, 9))
def test_parts_are_disjoint_and_complete(num: int, size: int) -> None:
    parts = [Ranks(rank, size).part(range(num)) for rank in range(size)]
    assert sorted(item for part in parts for item in part) == list(range(num))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_a_process_that_torchrun_did_not_start_is_alone() -> None:
    layer, value = nn.Dropout(), torch.ones(2)
    assert ranks_here() == Ranks(0, 1) and ranks_here().alone and ranks_here().first
    assert sum_over_ranks(value) is value and gather_parts([1, 2]) == [1, 2]
    forward = layer.forward
    assert see_whole_batch(layer, 4) is layer and layer.forward == forward
    wait_for_all()


# --- inside the processes ---------------------------------------------------------------------------------------------


def in_processes(function: Callable[[Path], None], size: int, folder: Path) -> None:
    """Call a function in several processes that know of one another."""
    spawn(_join, (function, size, folder), nprocs=size)


def _join(rank: int, function: Callable[[Path], None], size: int, folder: Path) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting{size}", rank=rank, world_size=size
    )
    function(folder)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def train_all(folder: Path) -> None:
    """Teachers, student and segmentation network of frozen statistics after 25 steps; with learned ones after 2."""
    folder = folder / str(ranks_here().size)
    samples, runtime = make_samples(7), cpu_runtime()
    masks: list[Tensor] = [sample.mask for sample in samples.with_masks()]  # type: ignore[misc]
    masks[0][:, :20] = 255  # so that parts differ in the pixels that count
    for name, frozen in (("frozen", True), ("learned", False)):
        steps = 25 if frozen else 2
        for kind in ("plain", "eps"):
            settings = LONG | {"pretraining": kind, "iterations": steps, "checkpoint_every": 10}
            config = tiny_config(model={"freeze_batch_norm": frozen}, classifier=settings)
            path = folder / f"{name}_{kind}.safetensors"
            teacher, _ = train_classifier(samples, config.model, config.classifier, runtime, checkpoint=path)
        own = LONG | {"iterations": steps}
        config = tiny_config(model={"freeze_batch_norm": frozen}, self_training=own, segmentation=own)
        maps = [torch.rand(3, 32, 40, generator=torch.Generator().manual_seed(n)) for n in range(7)]
        path = folder / f"{name}_student.safetensors"
        self_train(teacher, samples, maps, config.self_training, 0.3, runtime, checkpoint=path)
        path = folder / f"{name}_segmenter.safetensors"
        train_segmenter(samples, masks, config.model, config.segmentation, runtime, checkpoint=path)
    if not ranks_here().alone:
        check_layers()


def check_layers() -> None:
    """Each layer's output for this process's rows is that of one process for all rows."""
    ranks = ranks_here()
    whole = torch.randn(6, 4, 5, 5, generator=torch.Generator().manual_seed(1))
    kinds: list[Callable[[], nn.Module]] = [partial(nn.Dropout, 0.4), partial(nn.Dropout2d, 0.4)]
    kinds += [partial(StochasticDepth, 0.4, mode) for mode in ("row", "batch")]
    for order in (torch.contiguous_format, torch.channels_last):
        images = whole.contiguous(memory_format=order)
        for make in kinds:
            torch.manual_seed(3)
            expected = make()(images)
            layer = list(see_whole_batch(nn.Sequential(nn.Conv2d(1, 1, 1), make()), 6).children())[1]
            torch.manual_seed(3)
            seen = layer(images[ranks.rank :: ranks.size].contiguous(memory_format=order))
            assert torch.equal(seen, expected[ranks.rank :: ranks.size])
    alone, shared = nn.BatchNorm2d(4, momentum=None), nn.Sequential(nn.BatchNorm2d(4, momentum=None))
    expected, images = whole.clone().requires_grad_(), whole[ranks.rank :: ranks.size].clone().requires_grad_()
    weights = torch.randn(6, 4, 5, 5, generator=torch.Generator().manual_seed(2))
    (alone(expected) * weights).sum().backward()
    (see_whole_batch(shared, 6)(images) * weights[ranks.rank :: ranks.size]).sum().backward()
    sum_gradients(shared.parameters())
    close: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-5}
    assert torch.allclose(images.grad, expected.grad[ranks.rank :: ranks.size], **close)  # type: ignore[arg-type, index]
    for left, right in zip(alone.parameters(), shared.parameters(), strict=True):
        assert torch.allclose(left.grad, right.grad, **close)  # type: ignore[arg-type]
    for name, value in alone.state_dict().items():
        assert torch.allclose(shared.state_dict()[f"0.{name}"].float(), value.float(), **close)
    shared.load_state_dict({f"0.{name}": value for name, value in alone.state_dict().items()})
    assert torch.equal(shared.eval()(whole), alone.eval()(whole))  # eval mode is what it always is
    assert gather_parts(ranks.part(range(7))) == list(range(7))
    assert sum_over_ranks(torch.tensor([1.0, float(ranks.rank)])).tolist() == [ranks.size, sum(range(ranks.size))]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process learns."""
    folder = tmp_path_factory.mktemp("ranks")
    train_all(folder)
    return folder


def test_several_processes_learn_what_one_learns(trained: Path) -> None:
    """Batches of five images, so that the parts differ in size.

    With statistics that are learned, a rounding is enough for a pixel to end on the other side of a ReLU: one process
    whose first weights are moved by 1e-7 ends as far from itself (benchmarks/processes.py).
    """
    in_processes(train_all, 3, trained)
    names = sorted(path.name for path in (trained / "1").iterdir())
    assert len(names) == 9
    for name in names:
        one, several = (load_file(trained / str(number) / name) for number in (1, 3))
        assert one.keys() == several.keys()
        for key, value in one.items():
            largest = float(value.float().abs().max())
            difference = float((several[key].float() - value.float()).abs().max())
            bound = 1e-5 * largest if name.startswith("frozen") else 1e-4 * max(largest, 0.1)
            assert difference <= bound, (name, key)
        curves = [load_history(trained / str(number) / name) for number in (1, 3)]
        for left, right in zip(*curves, strict=True):
            assert right == pytest.approx(left, rel=1e-4)


def train_compiled(folder: Path) -> None:
    """A training whose BatchNorm and dropout ask the other process inside of a compiled network."""
    nn.Module.compile = compile_without_compiler  # type: ignore[method-assign]
    config = tiny_config(model={"freeze_batch_norm": False}, classifier=LONG | {"iterations": 3})
    teachers = []
    for compiled in (False, True):
        runtime = Runtime(torch.device("cpu"), compile=compiled)
        teachers.append(train_classifier(make_samples(7), config.model, config.classifier, runtime)[0])
    assert [is_compiled(teacher) for teacher in teachers] == [False, True]
    assert same_weights(*teachers)
    (folder / f"done{ranks_here().rank}").touch()


def test_compiled_networks_ask_the_other_processes(tmp_path: Path) -> None:
    in_processes(train_compiled, 2, tmp_path)
    assert len(list(tmp_path.glob("done*"))) == 2


def test_a_training_goes_on_with_another_number_of_processes(trained: Path, tmp_path: Path) -> None:
    """Stopped in two processes, finished in one."""
    in_processes(stop_half_way, 2, tmp_path)
    path = tmp_path / "teacher.safetensors"
    samples, config = make_samples(7), half_way()
    assert "optimizer.0.momentum_buffer" in load_file(path)
    finished, _ = train_classifier(samples, config.model, config.classifier, cpu_runtime(), checkpoint=path)
    whole, _ = train_classifier(samples, config.model, config.classifier, cpu_runtime())
    for left, right in zip(finished.state_dict().values(), whole.state_dict().values(), strict=True):
        assert torch.allclose(left.float(), right.float(), rtol=1e-4, atol=1e-6)


def half_way() -> Config:
    settings = LONG | {"iterations": 20, "checkpoint_every": 10, "momentum": 0.9}
    return tiny_config(model={"freeze_batch_norm": True}, classifier=settings)


def stop_half_way(folder: Path) -> None:
    import smaflib.training

    save = smaflib.training._save

    def save_and_stop(*arguments: Any) -> None:
        save(*arguments)
        raise KeyboardInterrupt

    smaflib.training._save = save_and_stop  # type: ignore[assignment]
    config = half_way()
    path = folder / "teacher.safetensors"
    try:
        train_classifier(make_samples(7), config.model, config.classifier, cpu_runtime(), checkpoint=path)
    except (KeyboardInterrupt, RuntimeError):  # the second: the other process has stopped
        os._exit(0)


# --- torchrun ---------------------------------------------------------------------------------------------------------


def workspace(folder: Path, processes: int, **groups: Any) -> Workspace:
    data = {"num_train": 7, "num_val": 3, "image_size": 64, "cache": True}
    trainings = {name: LONG | {"iterations": 6, "checkpoint_every": 2} for name in ("classifier", "self_training")}
    for name, group in groups.items():
        trainings[name] = trainings.get(name, {}) | group
    config = tiny_config(data=data, **trainings)
    own = {"processes": processes, "num_threads": 1, "device": "cpu"}
    work = Workspace(folder, config.model_copy(update=own))
    make_data(work.config, work.data_folder)
    return work


def test_maps_targets_and_masks_of_two_processes_are_those_of_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given the same weights, the same bytes."""
    one, two = (workspace(tmp_path / str(number), number, self_training={"refine": "crf"}) for number in (1, 2))
    train_teacher(one)
    two.checkpoint("teacher").parent.mkdir()
    shutil.copy(one.checkpoint("teacher"), two.checkpoint("teacher"))
    for work in (one, two):
        write_maps(work, "teacher")
        resolve_bg_score(work)
    monkeypatch.setenv(SETTINGS_FILE, str(tmp_path / "settings"))
    with recording_where_asked():
        follow(two.config)
        student, curve = train_student(two)
    assert curve == load_history(two.checkpoint("student")) and len(curve) == 6
    read = recorded_settings(tmp_path / "settings", two.config)
    # What only the processes read counts as well, and nothing that nobody read.
    assert {"self_training.learning_rate", "self_training.momentum"} <= read.keys()
    assert any(name.startswith("pseudo_masks.crf") for name in read)
    assert not {"processes", "", "segmentation", "segmentation.iterations", "classifier.eps_tau"} & read.keys()
    alone, _ = train_student(one)
    for left, right in zip(student.state_dict().values(), alone.state_dict().values(), strict=True):
        assert torch.allclose(left.float(), right.float(), rtol=1e-4, atol=1e-4)
    shutil.copy(two.checkpoint("student"), one.checkpoint("student"))
    for work in (one, two):
        shutil.copytree(work.path("cams", "teacher"), work.path("cams", "student"))
        write_masks(work)
    made = [{path.relative_to(work.folder): path.read_bytes() for path in made_by(work)} for work in (one, two)]
    assert made[0] == made[1] and len(made[0]) == 7 + 7 + 7
    assert read_mask(one.path("masks", f"{one.samples().image_ids[0]}.png")).shape == (64, 64)


def made_by(work: Workspace) -> list[Path]:
    return sorted(path for folder in ("cams", "masks") for path in work.path(folder).rglob("*.*"))


def test_a_killed_process_is_started_again(tmp_path: Path) -> None:
    """After its first checkpoint one of the two is killed; the end is that of a training that nobody disturbed."""
    settings = LONG | {"iterations": 60, "checkpoint_every": 5}
    calm = workspace(tmp_path / "calm", 1, classifier=settings, model={"freeze_batch_norm": True})
    hit = workspace(tmp_path / "hit", 2, classifier=settings, model={"freeze_batch_norm": True})
    killed: list[int] = []

    def kill() -> None:
        while not hit.checkpoint("teacher").is_file():
            time.sleep(0.01)
        killed.append(workers_of(os.getpid())[-1])
        os.kill(killed[0], signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    several, _ = train_teacher(hit)
    thread.join()
    alone, _ = train_teacher(calm)
    assert killed and not workers_of(os.getpid())
    for left, right in zip(several.state_dict().values(), alone.state_dict().values(), strict=True):
        assert torch.allclose(left.float(), right.float(), rtol=1e-5, atol=1e-6)


def workers_of(pid: int) -> list[int]:
    """The processes that torchrun has started for a process."""
    table = subprocess.run(["ps", "-ewwo", "pid=,ppid=,args="], capture_output=True, text=True, check=True).stdout
    rows = [line.split(None, 2) for line in table.splitlines()]
    launchers = {row[0] for row in rows if row[1] == str(pid) and "torch.distributed.run" in row[2]}
    return [int(row[0]) for row in rows if row[1] in launchers and "smaflib.distributed.worker" in row[2]]


def test_what_a_process_raises_is_raised_here_and_nothing_stays(tmp_path: Path) -> None:
    work = workspace(tmp_path, 2, classifier=LONG | {"learning_rate": 100.0, "weight_decay": 100.0})
    with pytest.raises(FloatingPointError, match="no longer finite.*lower the learning rate"):
        train_teacher(work)
    assert not workers_of(os.getpid())


def test_processes_that_die_again_and_again_are_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("smaflib.distributed.launch.RESTARTS", 1)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "sitecustomize.py").write_text("import os, sys\nif 'RANK' in os.environ: sys.exit('dead')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "broken"))
    with pytest.raises(RunError, match=r"(?s)2 processes of train_teacher ended 2 times.*dead"):
        train_teacher(workspace(tmp_path / "run", 2))
    assert RESTARTS == 3


def test_process_that_never_comes_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It hangs before it meets the others, and again when torchrun starts it anew."""
    monkeypatch.setattr(launch, "MEETING_SECONDS", 3.0)
    monkeypatch.setattr(launch, "FAILED_SECONDS", 3.0)
    (tmp_path / "hanging").mkdir()
    hang = "import os, time\nif os.environ.get('RANK') == '1': time.sleep(3600)\n"
    (tmp_path / "hanging" / "sitecustomize.py").write_text(hang)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "hanging"))
    begun = time.monotonic()
    with pytest.raises(RunError, match="rank 1 of 2 processes did not come within 3 s, before any work began"):
        train_teacher(workspace(tmp_path / "run", 2))
    assert time.monotonic() - begun < 100
    assert not workers_of(os.getpid()) and not (tmp_path / "run" / "checkpoints").exists()


def test_port_in_use_is_no_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun takes a free one, whatever an environment says; the processes meet in a file."""
    with contextlib.ExitStack() as stack:
        for port in (29400, 29500):  # what torchrun and torch.distributed take where nobody says
            taken = stack.enter_context(socket.socket())
            with contextlib.suppress(OSError):  # then somebody else has it
                taken.bind(("127.0.0.1", port))
                taken.listen()
        monkeypatch.setenv("MASTER_PORT", "29500")
        _, curve = train_teacher(workspace(tmp_path, 2))
    assert len(curve) == 6


@pytest.mark.parametrize("work_of", [train_teacher, partial(write_maps, network="teacher")], ids=["training", "maps"])
def test_full_disk_ends_all_processes_and_loses_nothing(
    tmp_path: Path, small_disk: Path, work_of: Callable[[Workspace], object]
) -> None:
    calm, full = (workspace(folder, 2) for folder in (tmp_path / "calm", small_disk / "run"))
    for work in (calm, full):
        work.checkpoint("teacher").parent.mkdir()
    train_teacher(calm)
    if work_of is not train_teacher:
        shutil.copy(calm.checkpoint("teacher"), full.checkpoint("teacher"))
    work_of(calm)
    other = fill_disk(small_disk, room=2 * 4096)  # for two files of maps, and for no checkpoint
    before = {path: path.read_bytes() for path in full.folder.rglob("*.*") if path.is_file()}
    with pytest.raises(OSError, match="No space left on device"):
        work_of(full)
    assert not workers_of(os.getpid()) and not list(full.folder.rglob(f"{files.PARTIAL}*"))
    assert {path: path.read_bytes() for path in before} == before
    other.unlink()
    work_of(full)
    made = [{path.relative_to(work.folder): path.read_bytes() for path in products(work)} for work in (calm, full)]
    assert made[0] == made[1] and len(made[0]) >= 1


def products(work: Workspace) -> list[Path]:
    return [path for folder in ("checkpoints", "cams") for path in work.path(folder).rglob("*.*") if path.is_file()]


def test_folders_of_killed_processes_are_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    names = {name: tmp_path / f"{launch.PREFIX}{name}" for name in ("dead", "young", "at_work", "of_another_version")}
    for name, folder in names.items():
        folder.mkdir()
        (folder / "torchrun.log").touch()
        if name != "of_another_version":  # nobody knows whether it is at work
            (folder / launch.LOCK).touch()
    with FileLock(names["at_work"] / launch.LOCK), contextlib.ExitStack() as stack:
        for name in ("dead", "at_work"):  # begun an hour ago
            os.utime(names[name] / launch.LOCK, 2 * (time.time() - 3600,))
        own = stack.enter_context(launch._shared_folder())
        left = [path.name for path in tmp_path.iterdir()]
        assert sorted(left) == sorted([own.name, *(folder.name for name, folder in names.items() if name != "dead")])
        with launch._shared_folder():  # another process's start
            assert own.is_dir()
    assert not own.exists()


def test_processes_end_with_the_one_that_waits(tmp_path: Path) -> None:
    """Killed, it can end nothing itself."""
    settings = LONG | {"iterations": 1000, "checkpoint_every": 20}
    work = workspace(tmp_path, 2, classifier=settings)
    (tmp_path / "config.yaml").write_text(dump_config(work.config), encoding="utf-8")
    code = "import sys; from pathlib import Path; from smaflib import config, pipeline; folder = Path(sys.argv[1]); "
    code += "pipeline.train_teacher(pipeline.Workspace(folder, config.load_config(folder / 'config.yaml')))"
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stderr=subprocess.DEVNULL)
    try:
        while not work.checkpoint("teacher").is_file():
            assert process.poll() is None
            time.sleep(0.05)
        workers = workers_of(process.pid)
        assert len(workers) == 2
    finally:
        process.kill()
        process.wait()
    while any(Path(f"/proc/{pid}").exists() for pid in workers):
        time.sleep(0.05)


# --- how many ---------------------------------------------------------------------------------------------------------


def test_number_of_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    def config(processes: int | str, **update: Any) -> Config:
        return tiny_config().model_copy(update={"processes": processes} | update)

    assert num_processes(config("auto", device="cpu")) == 1
    assert num_processes(config(3, device="cpu")) == 3
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    assert num_processes(config("auto")) == 2  # images of the smallest batch
    assert num_processes(config(8)) == 8 and num_processes(config("auto", device="cpu")) == 1
    with pytest.raises(ConfigError, match="processes is 9, but there are 8 GPUs here; set processes=auto"):
        num_processes(config(9))


def test_batches_smaller_than_the_number_of_processes_are_refused() -> None:
    config = tiny_config(classifier={"batch_size": 4}).model_copy(update={"processes": 3, "device": "cpu"})
    with pytest.raises(ConfigError, match=r"self_training\.batch_size is 2, too few images for 3 processes"):
        check_networks(config)

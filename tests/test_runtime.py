"""Device, precision, seeds and progress."""

from __future__ import annotations

import io
from collections.abc import Iterator

import pytest
import torch
from helpers import tiny_config

from smaflib.config import Config
from smaflib.errors import ConfigError
from smaflib.runtime import PROGRESS_FILE, Runtime, derive_seed, fastest_precision, make_runtime, num_cores, progress


@pytest.fixture
def torch_settings() -> Iterator[None]:
    threads, cudnn = torch.get_num_threads(), torch.backends.cudnn
    deterministic = cudnn.deterministic
    yield
    torch.set_num_threads(threads)
    cudnn.deterministic = deterministic


def with_settings(**settings: object) -> Config:
    return tiny_config().model_copy(update=settings)


@pytest.fixture
def bf16_circuits(monkeypatch: pytest.MonkeyPatch) -> dict[str, bool]:
    """What torch says of this CPU; to be changed."""
    flags = {"avx512_bf16": True}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: flags, raising=False)
    return flags


def test_runtime_follows_the_config(torch_settings: None, bf16_circuits: dict[str, bool]) -> None:
    runtime = make_runtime(with_settings(device="cpu", precision="bf16", seed=7, num_threads=1))
    assert runtime == Runtime(torch.device("cpu"), "bf16", 7)
    assert torch.get_num_threads() == 1
    make_runtime(with_settings(device="cpu", num_threads=0))
    assert torch.get_num_threads() == num_cores() >= 1
    assert torch.backends.cudnn.deterministic and not torch.backends.cudnn.benchmark


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_device_that_is_not_there_is_refused(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: None)
    with pytest.raises(ConfigError, match=f"device is '{device}', but torch finds no .*device=auto or device=cpu"):
        make_runtime(with_settings(device=device))


@pytest.mark.parametrize(
    ("flags", "precision"),
    [
        ({"avx512_bf16": False, "amx_bf16": True}, "bf16"),
        ({"avx512_f": True, "avx512_bf16": False, "amx_bf16": False}, "float32"),  # would emulate it
        ({"neon": True, "bf16": True}, "float32"),  # ARM: not measured
    ],
)
def test_cpu_takes_bf16_where_it_multiplies_in_it(
    flags: dict[str, bool], precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: flags, raising=False)
    assert fastest_precision(torch.device("cpu")) == precision
    assert fastest_precision(torch.device("mps")) == "float32"
    monkeypatch.delattr(torch.cpu, "get_capabilities")  # of an older torch
    assert fastest_precision(torch.device("cpu")) == "float32"


def test_derived_seed_is_the_same_in_every_process() -> None:
    # Worked out with: printf '0/classifier/3' | b2sum -l 64, read as little-endian, halved.
    assert derive_seed(0, "classifier", 3) == 5339080801387294889


def test_progress_in_a_notebook_is_not_shown_as_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stream = type("OutStream", (io.StringIO,), {"__module__": "ipykernel.iostream"})()
    monkeypatch.delenv(PROGRESS_FILE, raising=False)
    with monkeypatch.context() as kernel:
        kernel.setattr("sys.stderr", stream)
        assert list(progress("abc", total=3, desc="letters")) == ["a", "b", "c"]
    assert "letters: 100%" in capsys.readouterr().out and stream.getvalue() == ""
    monkeypatch.setenv("JPY_PARENT_PID", "1")  # of a kernel and the processes that it starts
    assert list(progress("abc", total=3, desc="letters")) == ["a", "b", "c"]
    assert "letters: 100%" in capsys.readouterr().out

"""Device, precision, threads, seeds and progress: what a computation needs beside its inputs."""

import contextlib
import ctypes
import hashlib
import itertools
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeVar

import torch
from torch import nn
from tqdm import tqdm

from smaflib.config import Config
from smaflib.errors import ConfigError

Item = TypeVar("Item")
Network = TypeVar("Network", bound=nn.Module)
CPU = torch.device("cpu")

PROGRESS_FILE = "SMAF_PROGRESS_FILE"
"""Environment variable: the terminal for the progress bars of a notebook that ``smaf run`` executes."""

LOCAL_RANK, LOCAL_SIZE = "LOCAL_RANK", "LOCAL_WORLD_SIZE"
"""Environment variables: number of this process among those that share a stage's work, and how many there are."""


@dataclass(frozen=True)
class Runtime:
    """Where and how tensors are computed; by default in float32 on the CPU."""

    device: torch.device = CPU
    precision: str = "float32"
    seed: int = 0
    num_workers: int = 0  # loader processes of a training

    def place(self, network: Network) -> Network:
        """Move a network to the device, channels last: on CPUs convolutions take about 0.7 times as long."""
        return network.to(device=self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """bf16 inside convolutions and matrix products, where the config asks for it."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16")


def make_runtime(config: Config) -> Runtime:
    """Choose device and precision, and set the number of torch's threads; ConfigError if this machine lacks them."""
    found = torch.accelerator.current_accelerator(check_available=True)
    device = (found or CPU) if config.device == "auto" else torch.device(config.device)
    if device.type not in ("cpu", found.type if found else "cpu"):
        what = f"only {found.type}" if found else "no accelerator"
        raise ConfigError(f"device is {device.type!r}, but torch finds {what} here; set device=auto or device=cpu")
    if device.type == "cuda" and LOCAL_RANK in os.environ:
        device = torch.device("cuda", int(os.environ[LOCAL_RANK]))
        torch.cuda.set_device(device)
    # torch's own default counts hyper-threads and ignores CPU limits of containers.
    torch.set_num_threads(config.num_threads or num_cores())
    torch.backends.cudnn.deterministic = True
    keep_freed_memory()
    precision = fastest_precision(device) if config.precision == "auto" else config.precision
    return Runtime(device, precision, config.seed, config.data.num_workers)


def fastest_precision(device: torch.device) -> Literal["float32", "bf16"]:
    """bf16 where the device has instructions for it, else float32.

    On two cores of an AMD EPYC with avx512_bf16 EfficientNet-Lite2 takes half the time in bf16; CPUs without such
    instructions are slower than in float32.
    """
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    # Older versions of torch have no get_capabilities.
    flags: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)() if device.type == "cpu" else {}
    return "bf16" if flags.get("avx512_bf16") or flags.get("amx_bf16") else "float32"


def keep_freed_memory() -> None:
    """Let glibc keep the memory that torch frees, for the output of the next layer.

    By default it returns blocks above 32 MB to the kernel, which has to zero them again for the next layer.
    """
    if mallopt := _glibc("mallopt"):
        mallopt(-4, 0)  # M_MMAP_MAX
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def release_freed_memory() -> None:
    """Return what :func:`keep_freed_memory` has kept: the blocks of a training do not fit the maps that follow it."""
    if trim := _glibc("malloc_trim"):
        trim(0)


def _glibc(name: str) -> Any:
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None


def device_of(module: nn.Module) -> torch.device:
    """The device of a module's weights."""
    return next(itertools.chain(module.parameters(), module.buffers())).device


def num_cores() -> int:
    """CPU cores that this process may use; its part of them where several processes share a stage's work."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get(LOCAL_SIZE, "1")))


def derive_seed(*parts: object) -> int:
    """A seed in [0, 2**63) that depends on every part, such as ``derive_seed(config.seed, "classifier", iteration)``.

    Neighbouring seeds give independent random streams. Python's own ``hash`` differs between processes.
    """
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@contextlib.contextmanager
def memory_advice(advice: str) -> Iterator[None]:
    """ConfigError with advice, such as the settings to lower, when the device's memory is full inside the block."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ConfigError(f"out of memory; {advice}") from error


@contextlib.contextmanager
def seeded(seed: int, device: torch.device = CPU) -> Iterator[None]:
    """Seed torch's global generators inside the block: initial weights and dropout take no generator."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def progress(items: Iterable[Item], total: int, desc: str) -> Iterator[Item]:
    """Iterate with a progress bar: as text in a terminal and in JupyterLab, and in that of ``smaf run``.

    Of several processes only the first shows its bar. ``tqdm.auto`` would leave dead widgets in saved notebooks.
    """
    if os.environ.get(LOCAL_RANK, "0") != "0" or total == 0:
        yield from items
        return
    bar = partial(tqdm, items, total=total, desc=desc, mininterval=0.3)
    if terminal := os.environ.get(PROGRESS_FILE):
        with open(terminal, "w", encoding="utf-8") as file:
            yield from bar(file=file, position=1, leave=False, dynamic_ncols=True)  # below the runner's
        return
    # JupyterLab shows stderr in red, as it shows errors; the variable tells a process that a kernel has started.
    in_notebook = type(sys.stderr).__module__.startswith("ipykernel.") or "JPY_PARENT_PID" in os.environ
    yield from bar(file=sys.stdout if in_notebook else sys.stderr)

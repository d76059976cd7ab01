"""Device, precision, threads, seeds and progress: what a computation needs beside its inputs."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

from smaflib.config import Config
from smaflib.errors import ConfigError

Item = TypeVar("Item")
Result = TypeVar("Result")
Network = TypeVar("Network", bound=nn.Module)
PROGRESS_FILE = "SMAF_PROGRESS_FILE"
"""Environment variable: a file for the state of the progress bar, which the headless runner shows."""

LOCAL_RANK, LOCAL_SIZE = "LOCAL_RANK", "LOCAL_WORLD_SIZE"
"""Environment variables: number of this process among those that share a stage's work, and how many there are."""

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Runtime:
    """Where and how tensors are computed."""

    device: torch.device
    precision: str = "float32"
    seed: int = 0

    def place(self, network: Network) -> Network:
        """Move a network to the device, its weights in the memory format that convolutions run fastest in.

        On CPUs channels last takes about 0.7 times as long.
        """
        return network.to(device=self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    @property
    def computes_behind(self) -> bool:
        """Whether the host goes on while the device computes, as beside a GPU: a value that is read is waited for."""
        return self.device.type != "cpu"

    def pinned(self, tensor: Tensor) -> Tensor:
        """A tensor for the device; for a GPU in pinned memory, from which it is copied while the GPU computes."""
        return tensor.pin_memory() if self.device.type == "cuda" else tensor

    def host_threads(self, workers: int | None = None) -> HostThreads:
        """Threads that work ahead of the device; by default none beside a CPU, whose cores compute."""
        return HostThreads(0 if workers is None and not self.computes_behind else workers)

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """bf16 inside convolutions and matrix products, where the config asks for it."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16")


def make_runtime(config: Config) -> Runtime:
    """Choose device and precision, and set the number of torch's threads.

    Raises:
        ConfigError: if this machine lacks the device, or the device would only emulate bf16.
    """
    found = torch.accelerator.current_accelerator(check_available=True)
    device = (found or CPU) if config.device == "auto" else torch.device(config.device)
    if device.type not in ("cpu", found.type if found else "cpu"):
        raise ConfigError(
            f"device is {device.type!r}, but torch finds {'only ' + found.type if found else 'no accelerator'} here; "
            "set device=auto or device=cpu"
        )
    if device.type == "cuda" and LOCAL_RANK in os.environ:
        device = torch.device("cuda", int(os.environ[LOCAL_RANK]))
        torch.cuda.set_device(device)
    # torch's own default counts hyper-threads and ignores CPU limits of containers.
    torch.set_num_threads(config.num_threads or num_cores())
    torch.backends.cudnn.deterministic = True
    keep_freed_memory()
    fastest = fastest_precision(device)
    precision = fastest if config.precision == "auto" else config.precision
    if precision == "bf16" and device.type != "mps" and fastest != "bf16":
        what = "this CPU" if device.type == "cpu" else torch.cuda.get_device_name(device)
        raise ConfigError(f"{what} would only emulate precision=bf16; set precision=auto or precision=float32")
    return Runtime(device, precision, config.seed)


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


def memory_of(device: torch.device) -> int | None:
    """All memory of a device in bytes, free or not; of a CPU what the machine or its container has; None: unknown."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    if device.type != "cpu" or not hasattr(os, "sysconf"):
        return None
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    container = Path("/sys/fs/cgroup/memory.max")  # "max", or a number of bytes
    if container.is_file() and (text := container.read_text().strip()).isdigit():
        limits.append(int(text))
    return min(limits)


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


def cpu_runtime(seed: int = 0) -> Runtime:
    """float32 on the CPU."""
    return Runtime(CPU, seed=seed)


def device_of(module: nn.Module) -> torch.device:
    """The device of a module's weights."""
    return next(module.parameters()).device


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
def seeded(seed: int, device: torch.device = CPU) -> Iterator[None]:
    """Seed torch's global generators inside the block, and restore them after it.

    For initial weights and dropout, which take no generator.
    """
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


MOST_THREADS = 8
"""Of :class:`HostThreads`: more wait for Python's lock, and each holds an image's maps (``benchmarks/gpu.py``)."""


class HostThreads:
    """Threads that work ahead of their caller: decode what a GPU takes next, write what it has made.

    For work that leaves Python's lock to others: decoding, resizing, compressing, torch's operators on one image. Each
    thread has one torch thread, so small operators do not wait for each other's parts. Several kinds of work may share
    the threads, so that there are never more of them. Used in a ``with`` block, at whose end they are gone.

    Args:
        workers: threads; None: one per core, :data:`MOST_THREADS` at most; 0: no thread, each item is computed when it
            is asked for.
    """

    def __init__(self, workers: int | None = None) -> None:
        self.workers = min(num_cores(), MOST_THREADS) if workers is None else workers
        # A thread would otherwise pin memory for the first GPU, whichever is its caller's.
        gpu = torch.cuda.current_device() if torch.cuda.is_initialized() else None
        self._pool = ThreadPoolExecutor(self.workers, "ahead", _start_thread, (gpu,)) if self.workers else None

    def __enter__(self) -> HostThreads:
        return self

    def __exit__(self, *error: object) -> None:
        if self._pool:
            self._pool.shutdown(cancel_futures=True)

    def ahead(
        self, function: Callable[[Item], Result], items: Iterable[Item], room: int | None = None
    ) -> Iterator[Result]:
        """Map in order, computed by the threads while the caller works on what came before.

        Args:
            function: of an item; called in a thread.
            items: taken by the caller, as there is room.
            room: results that may wait for the caller, unfinished ones included; None: twice as many as threads.

        Yields:
            The results in the order of the items. What a call raises is raised here, in its place.
        """
        if self._pool is None:
            yield from map(function, items)
            return
        room = 2 * self.workers if room is None else room
        waiting: deque[Future[Result]] = deque()
        try:
            for item in items:
                waiting.append(self._pool.submit(function, item))
                if len(waiting) > room:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:  # whose results nobody takes any more
                future.cancel()


def _start_thread(gpu: int | None) -> None:
    torch.set_num_threads(1)  # of this thread alone; torch's loader does the same in the thread that pins memory
    if gpu is not None:
        torch.cuda.set_device(gpu)


def ahead(
    function: Callable[[Item], Result], items: Iterable[Item], workers: int | None = None, room: int | None = None
) -> Generator[Result, None, None]:
    """:meth:`HostThreads.ahead` with threads of its own."""
    with HostThreads(workers) as threads:
        yield from threads.ahead(function, items, room)


def start_copy(tensors: Sequence[Tensor]) -> Callable[[], list[Tensor]]:
    """Let a GPU copy results to the host once it has computed them, and go on at once.

    Args:
        tensors: on one device.

    Returns:
        A function that waits until they are there, and returns them on the CPU.
    """
    if not any(tensor.is_cuda for tensor in tensors):
        return lambda: [tensor.cpu() for tensor in tensors]
    copies = [tensor.to("cpu", non_blocking=True) for tensor in tensors]  # into pinned memory, as torch does here
    copied = torch.cuda.current_stream(tensors[0].device).record_event()

    def wait() -> list[Tensor]:
        copied.synchronize()
        return copies

    return wait


def progress(items: Iterable[Item], total: int | None = None, desc: str = "", initial: int = 0) -> Iterator[Item]:
    """Iterate with a progress bar: as text in a terminal and in JupyterLab, in a file for the headless runner.

    Of several processes only the first shows its bar. ``tqdm.auto`` would leave dead widgets in saved notebooks.
    """
    if os.environ.get(LOCAL_RANK, "0") != "0" or total == 0:
        yield from items
        return
    if (target := os.environ.get(PROGRESS_FILE)) is None:
        # JupyterLab shows stderr in red, as it shows errors.
        file = sys.stdout if type(sys.stderr).__module__.startswith("ipykernel.") else sys.stderr
        yield from tqdm(items, total=total, desc=desc, initial=initial, file=file, mininterval=0.3)
        return
    if total is None and hasattr(items, "__len__"):
        total = len(items)  # type: ignore[arg-type]
    start, written = time.monotonic(), 0.0
    try:
        for count, item in enumerate(items, start=initial + 1):
            yield item
            now = time.monotonic()
            if now - written > 0.3:
                meter = tqdm.format_meter(count, total or count, now - start, prefix=desc, initial=initial)
                Path(target).write_text(meter, encoding="utf-8")
                written = now
    finally:
        Path(target).unlink(missing_ok=True)

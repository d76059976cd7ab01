"""Device, precision, threads, seeds and progress: what a computation needs beside its inputs."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import importlib.util
import os
import shutil
import sys
import sysconfig
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
"""Environment variable: a file that takes the state of the running progress bar, for the runner's terminal."""


LOCAL_RANK, LOCAL_SIZE = "LOCAL_RANK", "LOCAL_WORLD_SIZE"
"""Environment variables that torchrun sets: a process's number among those on this machine, and how many there are."""

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Runtime:
    """Where and how tensors are computed."""

    device: torch.device
    precision: str = "float32"
    seed: int = 0
    compile: bool = False

    def place(self, network: Network) -> Network:
        """Move a network to the device, its convolutions' weights laid out with the channels last; compile it if asked.

        torch's convolutions follow the layout of their weights; on CPUs this one is about 1.4 times as fast. A compiled
        network is the same object with the same weights under the same names; its next calls take the compiled code.
        """
        placed: Network = network.to(device=self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        if self.compile and not is_compiled(placed):
            placed.compile(options={"fallback_random": True})  # dropout draws what it draws without compilation
        return placed

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
    """Choose device and precision, set torch's threads and how it chooses kernels.

    Raises:
        ConfigError: if the config names a device that this machine does not have, bf16 where the device would only
            emulate it, or compilation where there is no compiler.
    """
    found = torch.accelerator.current_accelerator(check_available=True)
    device = (found or CPU) if config.device == "auto" else torch.device(config.device)
    if device.type not in ("cpu", found.type if found else "cpu"):
        raise ConfigError(
            f"device is {device.type!r}, but torch finds {'only ' + found.type if found else 'no accelerator'} here; "
            "set device=auto or device=cpu"
        )
    if device.type == "cuda" and LOCAL_RANK in os.environ:  # torchrun's word for this process's number on this machine
        device = torch.device("cuda", int(os.environ[LOCAL_RANK]))
        torch.cuda.set_device(device)
    # torch's own default counts hyper-threads and ignores CPU limits of containers.
    torch.set_num_threads(config.num_threads or num_cores())
    choose_kernels(config.tf32, config.deterministic)
    keep_freed_memory()
    fastest = fastest_precision(device)
    precision = fastest if config.precision == "auto" else config.precision
    if precision == "bf16" and device.type != "mps" and fastest != "bf16":
        what = "this CPU" if device.type == "cpu" else torch.cuda.get_device_name(device)
        raise ConfigError(
            f"precision is 'bf16', but {what} has no bf16 arithmetic and would be slower with it; set precision=auto "
            "or precision=float32"
        )
    if config.compile:
        check_compiler(device)
    return Runtime(device, precision, config.seed, config.compile)


def choose_kernels(tf32: bool, deterministic: bool) -> None:
    """Set what the settings of these names say, for all that torch computes in this process."""
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.allow_tf32 = tf32
    # What has no deterministic kernel warns and is computed: an error would end a training of hours.
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    # torch would also fill every new tensor, which finds code that reads what nobody has written, and takes time.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if deterministic:  # cuBLAS reads it when the first product is computed
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def is_compiled(network: nn.Module) -> bool:
    """Whether calls of a network take compiled code."""
    return network._compiled_call_impl is not None


def check_compiler(device: torch.device) -> None:
    """Return if torch.compile has what it needs on a device.

    Raises:
        ConfigError: if it does not: what is missing, and what to do.
    """
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"compile is true, but on {device.type!r} nothing is compiled here; set compile=false")
    missing = []
    if device.type == "cpu":
        compiler = os.environ.get("CXX") or {"win32": "cl", "darwin": "clang++"}.get(sys.platform, "g++")
        if shutil.which(compiler.split()[0]) is None:
            missing.append(f"the C++ compiler {compiler}")
    else:
        if importlib.util.find_spec("triton") is None:
            missing.append("the package triton")
        if not any(map(shutil.which, [os.environ.get("CC") or "gcc", "clang"])):
            missing.append("a C compiler")
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        missing.append("Python's headers (Python.h)")
    if missing:
        raise ConfigError(
            f"compile is true, but torch.compile needs what this machine lacks: {', '.join(missing)}; install it "
            "(Debian: apt install g++ python3-dev), or set compile=false"
        )


def fastest_precision(device: torch.device) -> Literal["float32", "bf16"]:
    """bf16 where the device multiplies bf16 numbers in its own circuits, else float32.

    A CPU without them converts back and forth, which takes longer than float32. For EfficientNet-Lite2 on two cores of
    an AMD EPYC with avx512_bf16, bf16 takes 0.5 times as long (benchmarks/backbones.py).
    """
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    # torch.cpu says so since torch 2.11 or so; an older one means float32.
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


def keep_freed_memory(keep: bool = True) -> bool:
    """Let the C library keep the memory that torch frees, for the next layer's output.

    glibc asks the kernel for every block above 32 MB and gives it back at once, and the kernel fills each with zeros
    anew. A photo's features at scales 1.5 and 2 have several such blocks; ``benchmarks/backbones.py --size 750 1000``
    shows what they cost.

    Args:
        keep: False: glibc's own way again.

    Returns:
        Whether this C library could be told; others are left as they are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        return False
    most_blocks, kept_bytes = (0, 2**31 - 1) if keep else (65536, 2**26)
    # Numbers of malloc.h: M_MMAP_MAX, M_TRIM_THRESHOLD, M_MMAP_THRESHOLD.
    return all([mallopt(-4, most_blocks), mallopt(-1, kept_bytes), mallopt(-3, 2**25)])


def release_freed_memory() -> None:
    """Give what :func:`keep_freed_memory` has kept back to the system: at the end of work of one kind.

    The blocks that a training leaves do not fit the maps that follow it, so both would be held.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def cpu_runtime(seed: int = 0) -> Runtime:
    """A runtime that needs no config: float32 on the CPU."""
    return Runtime(CPU, seed=seed)


def device_of(module: nn.Module) -> torch.device:
    """The device that a module's weights are on."""
    return next(module.parameters()).device


def num_cores() -> int:
    """CPU cores that this process may use: of several that share a stage's work, its part of them."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get(LOCAL_SIZE, "1")))


def derive_seed(*parts: object) -> int:
    """A seed in [0, 2**63) that depends on every part, e.g. ``derive_seed(config.seed, "classifier", iteration)``.

    Neighbouring seeds must not give neighbouring random streams, and Python's own ``hash`` differs between processes.
    """
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@contextlib.contextmanager
def seeded(seed: int, device: torch.device = CPU) -> Iterator[None]:
    """Random numbers that depend on ``seed`` alone inside the block; global random state is untouched outside.

    Initial weights and dropout take no generator of their own in torch: they read the global one.
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
    """Iterate with a progress bar: on the terminal and in JupyterLab as text, headless into the runner's bar.

    ``tqdm.auto`` would leave dead widgets in saved notebooks, so this is the plain one. Of several processes that share
    a stage's work the first shows its own. Where there is nothing to do, nothing is shown.
    """
    if os.environ.get(LOCAL_RANK, "0") != "0" or total == 0:
        yield from items
        return
    target = os.environ.get(PROGRESS_FILE)
    if target is None:
        # JupyterLab shows what comes from stderr in red, as it shows errors.
        in_kernel = type(sys.stderr).__module__.startswith("ipykernel.")
        file = sys.stdout if in_kernel else sys.stderr
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
                # A reader may see a half-written line once; it is redrawn a moment later.
                meter = tqdm.format_meter(count, total or count, now - start, prefix=desc, initial=initial)
                Path(target).write_text(meter, encoding="utf-8")
                written = now
    finally:
        Path(target).unlink(missing_ok=True)

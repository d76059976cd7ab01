"""Several processes on one machine that share the work of a stage.

A *rank* is a process's number among them, from 0 on. All of them must call :func:`barrier`, :func:`gather` and the
sums in the same order. A process that works alone has rank 0 of 1, and nothing is sent.
"""

import datetime
import multiprocessing
import os
import tempfile
import threading
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.spawn import ProcessException, start_processes

from smaflib.config import Config
from smaflib.errors import RunError
from smaflib.runtime import LOCAL_RANK, LOCAL_SIZE

Item = TypeVar("Item")

TIMEOUT = datetime.timedelta(minutes=30)  # for a process that waits: another may take long to refine its masks


def num_processes(config: Config) -> int:
    """How many processes share a stage's work: ``processes``, but not more than the smallest batch has images.

    ``auto`` is one per GPU, and one without a GPU.
    """
    trainings = [config.classifier, config.self_training] + [config.segmentation] * config.segmentation.enabled
    gpus = torch.cuda.device_count() if config.device in ("auto", "cuda") else 0
    wanted = max(1, gpus) if config.processes == "auto" else config.processes
    return min(wanted, *(training.batch_size for training in trainings))


def run_in_processes(number: int, function: Callable[..., object], *arguments: Any, **named: Any) -> None:
    """Call a function in several new processes at once; returns when it has returned in all of them.

    With one process, or inside one of several, nothing is called: the caller does the work. If one ends early, the
    others are ended. They end with the process that started them, however that ends.

    The function is defined at the top of a module, as its arguments must be picklable, and writes its results to files.

    RunError if the function raises, with the traceback of the process, or if a process is killed, with the signal.
    """
    if number == 1 or num_ranks() > 1:
        return
    call = partial(function, *arguments, **named)
    with tempfile.TemporaryDirectory(prefix="smaf-ranks-") as folder:
        group = start_processes(_work, (number, Path(folder, "meeting"), call), number, join=False)
        try:
            while not group.join():
                pass
        except ProcessException as error:
            raise RunError(str(error).strip()) from None
        finally:
            for process in group.processes:
                process.kill()
                process.join()


def _work(rank: int, number: int, meeting: Path, call: Callable[[], object]) -> None:
    end_with_parent()
    os.environ |= {LOCAL_RANK: str(rank), LOCAL_SIZE: str(number)}
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    store = dist.FileStore(str(meeting), number)  # type: ignore[attr-defined]
    dist.init_process_group(backend, store=store, timeout=TIMEOUT, rank=rank, world_size=number)
    call()
    barrier()  # a process that leaves early breaks the connections of the others
    dist.destroy_process_group()


def end_with_parent() -> None:
    """End this process at once when the process that started it through ``multiprocessing`` is gone."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def rank() -> int:
    """This process's number, from 0 on."""
    return dist.get_rank() if num_ranks() > 1 else 0


def num_ranks() -> int:
    """How many processes share the work here and now."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def part(items: Sequence[Item]) -> Sequence[Item]:
    """This process's share of the items: item n belongs to rank ``n % num_ranks()``."""
    return items[rank() :: num_ranks()]


def missing_files(folder: Path, image_ids: Sequence[str], ending: str = ".png") -> list[int]:
    """The numbers of the images whose file this process has to make: its part of them, without existing files."""
    there = set(os.listdir(folder)) if folder.is_dir() else set()
    return [number for number in part(range(len(image_ids))) if f"{image_ids[number]}{ending}" not in there]


def barrier() -> None:
    """Return once every process is here."""
    sum_over_ranks(torch.zeros(1))  # dist.barrier would take a GPU for it


def sum_over_ranks(value: Tensor) -> Tensor:
    """The sum of a tensor over all processes, without gradient: the same bits in each; alone the tensor itself."""
    if num_ranks() == 1:
        return value
    total = value.detach().clone()
    dist.all_reduce(total)
    return total


def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace every gradient by its sum over all processes, sent as one message."""
    if num_ranks() == 1:
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    total = sum_over_ranks(torch.cat([gradient.flatten() for gradient in gradients]))
    for gradient, summed in zip(gradients, total.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(summed.view(gradient.shape))


def gather(items: Sequence[Item]) -> list[Item]:
    """The whole of which every process holds its :func:`part`, in order, in every process."""
    if num_ranks() == 1:
        return list(items)
    parts: list[list[Item]] = [[] for _ in range(num_ranks())]
    dist.all_gather_object(parts, list(items))
    return [parts[number % len(parts)][number // len(parts)] for number in range(sum(map(len, parts)))]

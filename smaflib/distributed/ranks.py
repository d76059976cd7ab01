"""Which of several processes this one is, and what they tell each other. Alone, every function does nothing.

A *rank* is a process's number among the ``size`` processes that share a stage's work, from 0 on (torch.distributed's
word). All of them must call the collective functions here in the same order.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from smaflib.files import names_there

Item = TypeVar("Item")


@dataclass(frozen=True)
class Ranks:
    """This process's place.

    Attributes:
        rank: its number, from 0 on.
        size: of the group of processes.
    """

    rank: int = 0
    size: int = 1

    @property
    def alone(self) -> bool:
        """Whether there are no others."""
        return self.size == 1

    @property
    def first(self) -> bool:
        """Whether this process writes what all of them have in common."""
        return self.rank == 0

    def part(self, items: Sequence[Item]) -> Sequence[Item]:
        """This process's share: item n belongs to rank ``n % size``."""
        return items[self.rank :: self.size]


def ranks_here() -> Ranks:
    """This process's place; a process that torchrun did not start is alone."""
    if dist.is_available() and dist.is_initialized():
        return Ranks(dist.get_rank(), dist.get_world_size())
    return Ranks()


def missing_here(folder: Path, names: Sequence[str]) -> list[int]:
    """The numbers of the files of a folder that are this process's to make, and are not there yet."""
    there = names_there(folder, names)
    return [number for number in ranks_here().part(range(len(names))) if names[number] not in there]


def wait_for_all() -> None:
    """Return once every process is here."""
    if not ranks_here().alone:
        dist.barrier()


def sum_over_ranks(value: Tensor) -> Tensor:
    """The sum of a tensor over all processes, the same bits in each; alone the tensor itself.

    Args:
        value: of the same shape and type in every process; without gradient.
    """
    if ranks_here().alone:
        return value
    total = value.detach().clone()
    dist.all_reduce(total)
    return total


def sum_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Replace every gradient by its sum over all processes.

    In one flat buffer, so that it is one message: of a step of a tenth of a second and more it is a small part, and
    torch's DistributedDataParallel, which would send while it computes, averages over processes what has to be
    averaged over images or pixels.

    Args:
        parameters: those that learn; a parameter without a gradient in any process must have none in all.
    """
    if ranks_here().alone:
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
    dist.all_reduce(flat)
    parts = flat.split([gradient.numel() for gradient in gradients])
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view(gradient.shape))


def gather_parts(items: Sequence[Item]) -> list[Item]:
    """The whole of which every process holds its :meth:`Ranks.part`, in order, in every process."""
    ranks = ranks_here()
    if ranks.alone:
        return list(items)
    parts: list[list[Item]] = [[] for _ in range(ranks.size)]
    dist.all_gather_object(parts, list(items))
    whole: list[Item] = [parts[0][0]] * sum(map(len, parts)) if parts[0] else []
    for rank, part in enumerate(parts):
        whole[rank :: ranks.size] = part
    return whole

"""Layers whose result depends on the whole batch, when each process holds a part of it.

BatchNorm measures the batch, and dropout draws a mask over it. Without what is done here a network would learn
something else in two processes than in one.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from smaflib.distributed.ranks import Ranks, ranks_here, sum_over_ranks
from smaflib.runtime import is_compiled

CHANNELS_LAST = torch.channels_last


def see_whole_batch(network: nn.Module, batch_size: int) -> nn.Module:
    """Let a network in training mode treat its part of a batch as one process would treat the whole.

    BatchNorm layers that learn their statistics measure them over all processes: torch's SyncBatchNorm on a GPU, the
    same in torch.distributed's operations on a CPU, for which torch has none. Dropout, a channel's dropout and
    torchvision's stochastic depth draw the mask of the whole batch, of which each process takes its rows: so the random
    numbers are those of one process, too.

    Args:
        network: on its device; its layers are changed in place. In eval mode they do what they always do.
        batch_size: images of the whole batch.

    Returns:
        The network; alone the one that was given, unchanged.
    """
    ranks = ranks_here()
    if ranks.alone:
        return network
    # What talks to other processes stays outside of compiled code.
    outside: Callable[[Any], Any] = torch.compiler.disable if is_compiled(network) else lambda function: function
    for layer in network.modules():
        if isinstance(layer, (nn.Dropout, nn.Dropout2d, StochasticDepth)):
            _replace_forward(layer, outside(_whole_dropout(layer, batch_size, ranks)))
        elif isinstance(layer, nn.BatchNorm2d) and not next(network.parameters()).is_cuda:
            _replace_forward(layer, outside(partial(_batch_norm_over_ranks, layer, batch_size)))
    if next(network.parameters()).is_cuda:
        return nn.SyncBatchNorm.convert_sync_batchnorm(network)
    return network


def _replace_forward(layer: nn.Module, in_training: Callable[[Tensor], Tensor]) -> None:
    alone: Any = layer.forward
    layer.forward = lambda x: in_training(x) if layer.training else alone(x)


def _whole_dropout(
    layer: nn.Dropout | nn.Dropout2d | StochasticDepth, batch_size: int, ranks: Ranks
) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:  # (b, ...), rows rank::size of the batch
        shape = _mask_shape(layer, (batch_size, *x.shape[1:]))
        # torch fills a mask in the order of its memory, which is that of the input.
        last = shape == (batch_size, *x.shape[1:]) and x.dim() == 4 and x.is_contiguous(memory_format=CHANNELS_LAST)
        options: Any = {"memory_format": CHANNELS_LAST} if last and not x.is_contiguous() else {}
        kept = 1 - layer.p
        noise = torch.empty(shape, dtype=x.dtype, device=x.device, **options).bernoulli_(kept)
        if kept > 0:
            noise.div_(kept)
        return x * (noise if shape[0] == 1 else noise[ranks.rank :: ranks.size])

    return forward


def _mask_shape(layer: nn.Module, whole: tuple[int, ...]) -> tuple[int, ...]:
    """Of the random numbers that a layer draws for a batch of shape (B, ...)."""
    ones = (1,) * (len(whole) - 1)
    if isinstance(layer, nn.Dropout2d):
        return (*whole[:2], *ones[1:])
    if isinstance(layer, StochasticDepth):
        return (whole[0] if layer.mode == "row" else 1, *ones)
    return whole


class _SumOverRanks(torch.autograd.Function):
    """A sum over all processes: each one's part moves the results of all, so the gradient is a sum as well."""

    @staticmethod
    def forward(ctx: Any, part: Tensor) -> Tensor:
        return sum_over_ranks(part)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return sum_over_ranks(gradient)


def _batch_norm_over_ranks(layer: nn.BatchNorm2d, batch_size: int, x: Tensor) -> Tensor:
    """BatchNorm's training mode, (b, C, h, w): mean and variance over the parts of all processes, in float32."""
    values, count = x.float(), batch_size * x.shape[2] * x.shape[3]
    mean = _SumOverRanks.apply(values.sum(dim=(0, 2, 3))) / count
    centered = values - mean[:, None, None]
    variance = _SumOverRanks.apply(centered.square().sum(dim=(0, 2, 3))) / count
    if layer.track_running_stats and layer.running_mean is not None and layer.running_var is not None:
        with torch.no_grad():
            assert layer.num_batches_tracked is not None
            layer.num_batches_tracked += 1
            share = 1 / float(layer.num_batches_tracked) if layer.momentum is None else layer.momentum
            layer.running_mean.lerp_(mean, share)
            layer.running_var.lerp_(variance * (count / max(1, count - 1)), share)
    normalized = centered * (variance + layer.eps).rsqrt()[:, None, None]
    if layer.affine:
        normalized = normalized * layer.weight[:, None, None] + layer.bias[:, None, None]
    return normalized.to(x.dtype)

"""How much memory a network will take, found before it is tried: a forward pass of shapes without numbers.

torch's device ``meta`` computes shapes only, so a batch of a million images costs no more than one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from smaflib.errors import ConfigError, PluginError
from smaflib.runtime import Runtime, memory_of

Shape = tuple[int, int, int]
"""Of a batch: (B, H, W)."""


def training_bytes(network: nn.Module, shape: Shape) -> int:
    """What a training step keeps: inputs of layers for the way back, weights, gradients and the optimizer's state.

    Args:
        network: (B, 3, H, W) to anything; stays as it is.
        shape: of the batch.

    Returns:
        Bytes in float32, with AdamW's two moments.
    """
    shadow, kept = _shadow(network), dict[int, int]()
    weights = {id(parameter) for parameter in shadow.parameters()}

    def note(tensor: Tensor) -> Tensor:
        if id(tensor) not in weights:
            storage = tensor.untyped_storage()
            kept[storage._cdata] = storage.nbytes()
            alive.append(tensor)  # else the next tensor may take its address
        return tensor

    alive: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        shadow(torch.empty(shape[0], 3, *shape[1:], device="meta"))
    learned = sum(parameter.nbytes for parameter in shadow.parameters() if parameter.requires_grad)
    return sum(kept.values()) + sum(tensor.nbytes for tensor in shadow.state_dict().values()) + 3 * learned


def forward_bytes(network: nn.Module, shape: Shape) -> int:
    """What a forward pass without gradients holds at once: the largest layer's inputs and outputs, and the weights.

    Arguments as of :func:`training_bytes`.
    """
    shadow, largest = _shadow(network), [0]

    def note(layer: nn.Module, given: tuple[Any, ...], made: Any) -> None:
        tensors = [tensor for tensor in (*given, made) if isinstance(tensor, Tensor)]
        largest.append(sum(tensor.nbytes for tensor in tensors))

    for layer in shadow.modules():
        if not any(layer.children()):
            layer.register_forward_hook(note)
    with torch.no_grad():
        shadow(torch.empty(shape[0], 3, *shape[1:], device="meta"))
    return max(largest) + sum(tensor.nbytes for tensor in shadow.state_dict().values())


def refuse_what_does_not_fit(
    measure: Callable[[nn.Module, Shape], int], network: nn.Module, shape: Shape, runtime: Runtime, what: str, cure: str
) -> None:
    """Compare what a network will take with what the device has.

    Args:
        measure: :func:`training_bytes` or :func:`forward_bytes`.
        network: what will run.
        shape: of its largest batch.
        runtime: device and precision; with bf16 half the bytes are counted, so that nothing is refused that would fit.
        what: begins the message: what would take the memory, such as ``"classifier.batch_size=8"``.
        cure: ends it.

    Raises:
        ConfigError: if it is more than the device has altogether.
    """
    there = memory_of(runtime.device)
    if there is None:
        return
    try:
        needed = measure(network, shape) // (2 if runtime.precision == "bf16" else 1)
    except (RuntimeError, NotImplementedError, TypeError, PluginError):
        return  # somebody's network that computes with more than shapes
    if needed > there:
        raise ConfigError(
            f"{what} needs about {needed / 1e9:,.1f} GB of memory ({shape[0]} images of {shape[2]} x {shape[1]} "
            f"pixels), but {runtime.device} has {there / 1e9:,.1f} GB; {cure}"
        )


def _shadow(network: nn.Module) -> nn.Module:
    """The network without numbers. Weights are not copied on the way."""
    memo: dict[int, Any] = {}
    for tensor in (*network.parameters(), *network.buffers()):
        shadow = torch.empty_like(tensor, device="meta")
        kind = nn.Parameter(shadow, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else shadow
        memo[id(tensor)] = kind
    return copy.deepcopy(network, memo)

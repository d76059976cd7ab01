"""Weights from files, without ever running a pickle's code."""

from __future__ import annotations

import json
import os
import pickle
import re
from pathlib import Path
from typing import Any, Literal

import torch
import torchvision.models
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from smaflib.errors import ConfigError, WeightsError
from smaflib.files import replacing
from smaflib.models.weights.mxnet import is_mxnet_params, read_mxnet_params, resnet38_from_mxnet

CLASSIFIERS = ("classifier.", "fc.", "head.", "fc8.", "cov_feat.", "bn.")
"""Beginnings of the names of what follows the features, in torchvision's models and in ResNet38's checkpoints."""


def classifier_prefixes(model: nn.Module) -> tuple[str, ...]:
    """Beginnings of the names that a backbone cuts off, so that weights may lack them.

    SqueezeNet's classifier is part of its features (:class:`~smaflib.models.backbones.TorchvisionBackbone`).
    """
    return () if isinstance(model, torchvision.models.SqueezeNet) else CLASSIFIERS


SEGMENTATION_HEAD = re.compile(r"(scale\.|base\.)*(aspp\.|layer5\.|conv2d_list\.|aux_classifier\.|classifier\.)")
"""Beginnings of the names of a segmentation network's head: of DeepLab's usual codes and of torchvision."""


def has_segmentation_head(state: dict[str, Tensor]) -> bool:
    """Whether weights belong to a segmentation network. A classification network's ``classifier.`` is no such head."""
    heads = {name for name in state if SEGMENTATION_HEAD.match(name)}
    own = {name for name in heads if name.startswith("classifier.")}
    return bool(heads - own) or (bool(own) and any(name.startswith("backbone.") for name in state))


def fill(module: nn.Module, state: dict[str, Tensor], source: str, optional: tuple[str, ...] = ()) -> None:
    """Copy a state dict into a module, converting to its float type.

    Args:
        module: takes the values, in place.
        state: names to tensors.
        source: where the values come from, for messages.
        optional: prefixes that may be missing, superfluous or of another shape (classifiers).

    Raises:
        WeightsError: lists the names that are missing, superfluous or of another shape.
    """
    check_weights(module, state, type(module).__name__, source, optional)
    own = {name for name in module.state_dict() if not name.startswith(optional)}
    taken = {name: value for name, value in state.items() if name in own}
    module.load_state_dict(module.state_dict() | taken)


def check_weights(
    module: nn.Module, state: dict[str, Tensor], network: str, source: str, optional: tuple[str, ...] = ()
) -> None:
    """Raise a :class:`WeightsError` if a state dict does not fit a network; arguments as of :func:`fill`."""
    missing, superfluous, wrong = mismatches(module, state, optional)
    unknown = [name for name in superfluous if not name.startswith(optional)]
    if missing or unknown or wrong:
        parts = [("missing", missing), ("not known to the network", unknown), ("of another shape", wrong)]
        lines = [f"  {what}: {first_names(names)}" for what, names in parts if names]
        raise WeightsError(f"the weights of {source} do not fit {network}:\n" + "\n".join(lines))
    broken = sorted(name for name, value in state.items() if value.is_floating_point() and not value.isfinite().all())
    if broken:
        raise WeightsError(
            f"the weights of {source} hold values that are no numbers (NaN or infinite) in {first_names(broken)}; "
            "the training that made them has failed, or the file is damaged: take another one"
        )


def mismatches(
    module: nn.Module, state: dict[str, Tensor], optional: tuple[str, ...] = ()
) -> tuple[list[str], list[str], list[str]]:
    """What keeps a state dict from filling a module.

    Args:
        module: the network; only its names and shapes are looked at.
        state: names to tensors.
        optional: prefixes of names that the module gives a value of its own.

    Returns:
        Names that are missing, superfluous (the optional ones, too) and of another shape; the last with both shapes.
    """
    own = {name: value for name, value in module.state_dict().items() if not name.startswith(optional)}
    missing = sorted(name for name in own.keys() - state if not name.endswith("num_batches_tracked"))
    wrong = sorted(
        f"{name} {tuple(state[name].shape)} instead of {tuple(own[name].shape)}"
        for name in own.keys() & state
        if state[name].shape != own[name].shape
    )
    return missing, sorted(state.keys() - own), wrong


def first_names(names: list[str], num: int = 8) -> str:
    """The first few of a list, for a message."""
    return ", ".join(names[:num]) + (" ..." if len(names) > num else "")


def read_weights(path: Path) -> dict[str, Tensor]:
    """The weights in a file as names to tensors; nothing in the file is executed.

    What it is shows in its first bytes, not in its name: safetensors; a PyTorch checkpoint, nested or not, with or
    without ``module.`` before the names (:func:`state_of_checkpoint`); MXNet's ``.params`` of ResNet38, whose names are
    translated.

    Raises:
        ConfigError: if it is not there, not complete, or holds more than weights.
    """
    kind = weights_format(path)
    if kind == "mxnet":
        return resnet38_from_mxnet(read_mxnet_params(path))
    if kind == "torch":
        return state_of_checkpoint(_read_checkpoint(path), path)
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ConfigError(f"{path} is not a complete safetensors file ({error}); fetch or convert it again") from error


OPTIMIZER = "optimizer."
"""How names of the optimizer's state begin, which the checkpoint of an unfinished training holds beside the network."""


def network_state(path: Path) -> dict[str, Tensor]:
    """:func:`read_weights` without the optimizer's state."""
    return {name: value for name, value in read_weights(path).items() if not name.startswith(OPTIMIZER)}


def weights_format(path: Path) -> Literal["safetensors", "torch", "mxnet"]:
    """What kind of weights file this is, by its first bytes; whatever is nothing else is taken for safetensors.

    Raises:
        ConfigError: if there is no such file.
    """
    if not path.is_file():
        raise ConfigError(
            f"there is no weights file {path}; give a .safetensors, .pth or .params file, 'pretrained', 'wheel' or null"
        )
    if is_mxnet_params(path):
        return "mxnet"
    with path.open("rb") as file:
        # A zip archive, or the bare pickle that torch wrote before version 1.6.
        return "torch" if file.read(2) in (b"PK", b"\x80\x02") else "safetensors"


def _read_checkpoint(path: Path) -> Any:
    try:
        # weights_only: an unpickler that knows tensors and containers, and refuses to import or call anything else.
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ConfigError(
            f"{path} holds more than weights, and loading that could run code that someone put there; load it where "
            f"you trust it and save the state dict alone ({str(error).partition(chr(10))[0]:.300})"
        ) from error
    except Exception as error:  # cut or changed bytes raise whatever the unpickler's next step then raises
        raise ConfigError(f"{path} is not a complete PyTorch checkpoint ({error!r:.300}); fetch it again") from error


def state_of_checkpoint(checkpoint: Any, path: Path) -> dict[str, Tensor]:
    """The state dict inside a checkpoint, its names without ``module.``.

    Training scripts wrap it in dictionaries: ``state_dict``, ``model``, or as the reference does
    ``{"Net": {"model_state": ..., "objective_vectors": ...}, "iter": ...}``. The only dictionary of tensors that is
    found, however deep, is the one.

    Raises:
        ConfigError: if there is none, or more than one.
    """
    found: list[tuple[str, dict[str, Tensor]]] = []
    rest: list[tuple[str, Any]] = [("", checkpoint)]
    seen: set[int] = set()  # a dictionary may hold itself, or be nested deeper than functions can be
    while rest:
        where, node = rest.pop()
        if not isinstance(node, dict) or id(node) in seen:
            continue
        seen.add(id(node))
        tensors = {str(name): value for name, value in node.items() if isinstance(value, Tensor)}
        if any("." in name for name in tensors):
            found.append((where, tensors))
        else:
            rest += [(f"{where}/{name}" if where else str(name), child) for name, child in reversed(node.items())]
    if len(found) != 1:
        what = ", ".join(where for where, _ in found)
        raise ConfigError(
            f"{path} holds {f'several networks ({what})' if found else 'no state dict'}; save the one state dict that "
            "you mean into a file of its own"
        )
    return {name.removeprefix("module."): value for name, value in found[0][1].items()}


def attention_state(state: dict[str, Tensor], num_classes: int) -> dict[str, Tensor]:
    """Names and order of channels that :class:`~smaflib.models.networks.AttentionNetwork` has.

    Checkpoints of the reference implementation and of EPS are translated: layers of ResNet38 move into the backbone,
    ``cov_feat``, ``bn`` and ``fc8`` become the head, and the background, their last channel, becomes the first. Weights
    of this library pass through.
    """
    if "fc8.weight" not in state:
        return state
    places = {"cov_feat": "neck.0", "bn": "neck.1", "fc8": "head"}
    translated = {}
    for name, value in state.items():
        layer, _, rest = name.partition(".")
        translated[f"{places[layer]}.{rest}" if layer in places else f"backbone.{name}"] = value
    weight = translated["head.weight"]
    if len(weight) == num_classes + 1:
        translated["head.weight"] = weight.roll(1, dims=0)
    return translated


METADATA_KEY = "smaflib"
"""All metadata lie under one name: safetensors writes several in an order that changes from process to process."""


def read_metadata(path: Path) -> dict[str, str]:
    """The strings stored beside the tensors of a safetensors file."""
    with safe_open(path, framework="pt") as handle:
        stored = handle.metadata() or {}
    return json.loads(stored[METADATA_KEY]) if METADATA_KEY in stored else stored


def write_weights(path: Path, tensors: dict[str, Tensor], **metadata: object) -> None:
    """Write a safetensors file, all or nothing, the same content as the same bytes; metadata values become JSON.

    Raises:
        OSError: if the disk is full, or the folder cannot be written; the old file stays.
    """
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with replacing(path) as temporary:
        values = {name: json.dumps(value) for name, value in sorted(metadata.items())}
        try:
            save_file(whole, temporary, metadata={METADATA_KEY: json.dumps(values)} if values else None)
        except SafetensorError as error:  # says the operating system's number in its text alone
            if found := re.search(r"\(os error (\d+)\)", str(error)):
                raise OSError(int(found[1]), os.strerror(int(found[1])), str(path)) from error
            raise

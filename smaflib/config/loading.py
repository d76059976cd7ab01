"""Reading settings: a YAML file, overrides on top, everything checked before anything starts."""

from __future__ import annotations

import difflib
import reprlib
import types
from pathlib import Path
from typing import Any, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from smaflib.config.presets import PRESET_GROUPS
from smaflib.config.schema import FREE_SETTINGS, NAMED_WEIGHTS, Config, CrfConfig, DataConfig, ModelConfig
from smaflib.errors import ConfigError
from smaflib.files import PROJECT_ROOT
from smaflib.plugins import search_in

MOST_PROBLEMS = 20
"""Lines of an error message; a file may have thousands of wrong settings."""

RENAMED = {"evaluation.anchors": "evaluation.paper_results"}
"""Settings of earlier versions, and what they are called now."""


def load_config(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Read a YAML file, apply ``key=value`` overrides, check everything.

    Args:
        path: a YAML file of nested settings.
        overrides: such as ``"classifier.iterations=100"``; values are YAML, so ``null``, ``true`` and lists work.

    Returns:
        The settings; relative paths of data and weights are taken from the checkout, wherever the caller stands.

    Raises:
        ConfigError: if the file is no YAML mapping, a key does not exist (the nearest one is named) or a value does
            not fit.
        FileNotFoundError: if there is no such file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no config file {path}; the ready ones are in configs/")
    try:
        settings = _read_yaml(path.read_text(encoding="utf-8"), str(path)) or {}
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as UTF-8 text: {error}") from error
    if not isinstance(settings, dict):
        raise ConfigError(f"{path} must hold settings such as 'seed: 0', got a {type(settings).__name__}")
    for override in overrides:
        _apply_override(settings, override)
    config = _resolve_paths(check_settings(settings, source=str(path)))
    if config.plugins:
        search_in(Path.cwd(), path.parent)
    return config


def check_settings(settings: dict[str, Any], source: str = "the settings") -> Config:
    """Nested settings to a checked :class:`Config`; errors as in :func:`load_config`."""
    _refuse_unknown_keys(settings, Config, "", source)
    try:
        return Config.model_validate(settings)
    except ValidationError as error:
        lines = []
        for problem in error.errors():
            # Where there is a choice of types, pydantic adds their names, such as literal['auto'].
            where = ".".join(str(part) for part in problem["loc"] if isinstance(part, int) or part.isidentifier())
            message = problem["msg"].removeprefix("Value error, ")
            given = f", got {_short(problem['input'])}" if where and not isinstance(problem["input"], dict) else ""
            lines.append(f"  {where + ': ' if where else ''}{message}{given}")
        more = [f"  and {len(lines) - MOST_PROBLEMS} more"] if len(lines) > MOST_PROBLEMS else []
        raise ConfigError(f"{source} does not fit:\n" + "\n".join(lines[:MOST_PROBLEMS] + more)) from None


def _read_yaml(text: str, what: str) -> Any:
    try:
        return yaml.safe_load(text)
    # Beside its own errors, those of numbers of 5,000 digits, of dates that do not exist, and of deep nesting.
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{what} is not valid YAML: {_cut(str(error))}") from error


def _cut(message: str) -> str:
    return message if len(message) <= 300 else f"{message[:300]} ..."


def _short(value: Any) -> str:
    """A value for a message: a few hundred characters at most, however large or nested it is."""
    brief = reprlib.Repr()
    brief.maxstring = brief.maxother = brief.maxlong = 120
    brief.maxlevel, brief.maxlist, brief.maxdict, brief.maxtuple = 3, 8, 8, 8
    return brief.repr(value)


def dump_config(config: Config) -> str:
    """The whole configuration as YAML, defaults included; :func:`load_config` reads it back."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, width=100)


def config_differences(ours: Config, theirs: Config) -> list[str]:
    """Each setting that differs, as ``key: ours | theirs``, in the order of the config.

    :data:`~smaflib.config.schema.FREE_SETTINGS` are left out.
    """
    left, right = flat_settings(ours), flat_settings(theirs)
    return [
        f"{key}: {left.get(key)} | {right.get(key)}"
        for key in {**left, **right}
        if key not in FREE_SETTINGS and left.get(key, "-") != right.get(key, "-")
    ]


def flat_settings(config: Config) -> dict[str, Any]:
    """``{"classifier.iterations": 20000, ...}``."""

    def walk(settings: dict[str, Any], prefix: str) -> dict[str, Any]:
        flat: dict[str, Any] = {}
        for key, value in settings.items():
            flat |= walk(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
        return flat

    return walk(config.model_dump(mode="json"), "")


def _resolve_model(model: ModelConfig | None) -> ModelConfig | None:
    if model is None or model.weights in (None, *NAMED_WEIGHTS):
        return model
    return model.model_copy(update={"weights": str(PROJECT_ROOT / model.weights)})


def _resolve_paths(config: Config) -> Config:
    # A command and the kernels that it starts stand in different folders, and must mean the same file.
    names = ("root", "images", "labels", "saliency", "masks")
    beside_paper = {name: PROJECT_ROOT / path for name in names if (path := getattr(config.data, name)) is not None}
    segmentation_model = _resolve_model(config.segmentation.model)
    checkpoint = config.classifier.checkpoint
    return config.model_copy(
        update={
            "data": config.data.model_copy(update=beside_paper),
            "model": _resolve_model(config.model),
            "segmentation": config.segmentation.model_copy(update={"model": segmentation_model}),
            "classifier": config.classifier.model_copy(update={"checkpoint": checkpoint and PROJECT_ROOT / checkpoint}),
        }
    )


def _apply_override(settings: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"an override must look like key=value, got {_short(override)}")
    value = _read_yaml(text, f"the value of {_short(override)}")
    *parents, last = key.strip().split(".")
    node = settings
    for parent in parents:
        if parent in PRESET_GROUPS and isinstance(node.get(parent), str):
            node[parent] = {"preset": node[parent]}  # a preset's name, and now one change to it
        if node.get(parent) is None:  # a group that is switched off with null, as in every stored config.yaml
            node[parent] = {}
        node = node[parent]
        if not isinstance(node, dict):
            raise ConfigError(f"{key!r} cannot be set: {parent!r} is not a group of settings")
    node[last] = value


def _refuse_unknown_keys(settings: dict[str, Any], model: type[BaseModel], prefix: str, source: str) -> None:
    # pydantic would only say "extra inputs are not permitted"; a typo deserves the name it was meant to be.
    for key, value in settings.items():
        if model is CrfConfig and key == "preset":
            continue
        if (new := RENAMED.get(f"{prefix}{key}")) is not None:
            raise ConfigError(f"{source}: {prefix}{key} is called {new} now")
        if key not in model.model_fields:
            hint = _nearest_setting(str(key), prefix, list(model.model_fields))
            raise ConfigError(f"{source}: there is no setting {prefix}{key}; did you mean {hint}?")
        child = _child_model(model.model_fields[key].annotation)
        if child is not None and isinstance(value, dict):
            _refuse_unknown_keys(value, child, f"{prefix}{key}.", source)


def _child_model(annotation: Any) -> type[BaseModel] | None:
    """The settings model behind an annotation such as ``CrfConfig | None``."""
    options = get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)
    return next((option for option in options if isinstance(option, type) and issubclass(option, BaseModel)), None)


def _nearest_setting(key: str, prefix: str, siblings: list[str]) -> str:
    """A sibling with nearly that name, else the same name in another group, else the nearest sibling."""
    if close := difflib.get_close_matches(key, siblings, n=1, cutoff=0.7):
        return prefix + close[0]
    everywhere = flat_settings(Config(data=DataConfig(kind="mini")))
    if namesake := next((full for full in everywhere if full.split(".")[-1] == key), None):
        return namesake
    return prefix + difflib.get_close_matches(key, siblings, n=1, cutoff=0.0)[0]

"""Code of somebody's own behind a name in a config: ``package.module:attribute``, or a name that a package adds.

A built-in name comes first, then an entry point of an installed package, then ``package.module:attribute``. A module is
looked for as Python does, and then in the folders of :data:`FOLDERS`: where the command was called, beside the config
file, and the checkout. What each kind must do stands beside the code that calls it: :class:`smaflib.cams.Fusion`,
:class:`smaflib.models.sources.Source`, :class:`smaflib.models.backbones.BackboneMaker`,
:func:`smaflib.data.load_samples`, :class:`smaflib.refinement.own.Refinement`. :mod:`smaflib.trials` tries each on a
tiny input before a run starts.

Reading a config imports nothing of it: only a command that computes does.
"""

from __future__ import annotations

import ast
import contextlib
import difflib
import functools
import hashlib
import importlib
import importlib.metadata
import importlib.util
import os
import pkgutil
import re
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from smaflib.errors import ConfigError, PluginError
from smaflib.files import PROJECT_ROOT, display_path, file_hash

if TYPE_CHECKING:
    from torch import Tensor

FOLDERS = "SMAF_PLUGIN_FOLDERS"
"""Environment variable: where else modules are looked for. Kernels and worker processes inherit it."""

_NAME = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")


@dataclass(frozen=True)
class Kind:
    """What a config chooses by name.

    Attributes:
        setting: that chooses it.
        what: people call it.
        group: of the entry points by which installed packages add names.
        built_in: names that the library has; of backbones those that are not torchvision's or timm's.
    """

    setting: str
    what: str
    group: str
    built_in: tuple[str, ...] = ()

    def check(self, name: str) -> str:
        """A name as it is, if it is built in, added by a package, or looks like ``package.module:attribute``.

        Raises:
            ValueError: if it is none of these. Nothing is imported.
        """
        if name in self.built_in or _NAME.fullmatch(name) or name in self.added():
            return name
        names = dict.fromkeys([*self.built_in, *self.added()])
        raise ValueError(f"must be {', '.join(names)} or package.module:attribute, code of your own (docs/extend.md)")

    def is_own(self, name: str) -> bool:
        """Whether a name stands for code outside of this library."""
        return name not in self.built_in and (bool(_NAME.fullmatch(name)) or name in self.added())

    def added(self) -> dict[str, importlib.metadata.EntryPoint]:
        """What installed packages add, by name."""
        return _entry_points(self.group)


@functools.cache  # reading what is installed takes a tenth of a second
def _entry_points(group: str) -> dict[str, importlib.metadata.EntryPoint]:
    return {point.name: point for point in importlib.metadata.entry_points(group=group)}


FUSION = Kind("attention.fusion", "fusion rule", "smaflib.fusion", ("sum", "mean", "max", "size_adaptive"))
SOURCE = Kind("attention.source", "source of maps", "smaflib.sources", ("network",))
BACKBONE = Kind("model.backbone", "backbone", "smaflib.backbones", ("slim", "resnet38"))  # and torchvision's, timm's
DATA = Kind("data.kind", "data set", "smaflib.data", ("mini", "voc", "coco", "folder"))
REFINEMENT = Kind("pseudo_masks.refine", "refinement", "smaflib.refinement", ("crf", "par", "none"))


# ------------------------------------------------------------------------------------------------------------- loading


def search_in(*folders: Path) -> None:
    """Look for modules in these folders, too, in this process and in those that it starts."""
    known = [folder for folder in os.environ.get(FOLDERS, "").split(os.pathsep) if folder]
    wanted = [str(folder.resolve()) for folder in folders]
    os.environ[FOLDERS] = os.pathsep.join(dict.fromkeys([*known, *wanted]))


def load(kind: Kind, name: str) -> Any:
    """What a name stands for.

    Args:
        kind: of code.
        name: an entry point's, or ``package.module:attribute``.

    Raises:
        PluginError: if there is no such module or attribute, the module cannot be imported, or it cannot be called.
    """
    module_name, attribute = _target(kind, name)
    value: Any = _import(kind, name, module_name)
    file = getattr(value, "__file__", None) or module_name
    for part in attribute.split("."):
        if not hasattr(value, part):
            there = [each for each in dir(value) if not each.startswith("_")]
            near = difflib.get_close_matches(part, there, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise PluginError(f"{kind.setting} is {name!r}, but {_shown(file)} has no {part}{hint}")
        value = getattr(value, part)
    if not callable(value):
        raise PluginError(f"{kind.setting} is {name!r}, which is a {type(value).__name__} and cannot be called")
    return value


def _target(kind: Kind, name: str) -> tuple[str, str]:
    """Module and attribute of a name."""
    point = kind.added().get(name)
    module, separator, attribute = (point.value if point else name).partition(":")
    if not separator:
        raise PluginError(f"{kind.setting} is {name!r}, which is no {kind.what} and not package.module:attribute")
    return module.strip(), attribute.partition("[")[0].strip()


def _import(kind: Kind, name: str, module_name: str) -> ModuleType:
    if (known := sys.modules.get(module_name)) is not None:  # a rule is called for every image
        return known
    _extend_search()
    importlib.invalidate_caches()  # the file may be younger than what Python knows of its folder
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and f"{module_name}.".startswith(f"{error.name}."):
            cure = f"write {module_name.removesuffix('.py')}:..., without the file's ending"
            if not module_name.endswith(".py"):
                cure = f"it is looked for among installed packages and in {', '.join(_folders())}"
            raise PluginError(f"{kind.setting} is {name!r}, but there is no module {error.name}; {cure}") from error
        raise _not_importable(kind, name, module_name, error) from error
    except (Exception, SystemExit) as error:
        raise _not_importable(kind, name, module_name, error) from error


def _not_importable(kind: Kind, name: str, module_name: str, error: BaseException) -> PluginError:
    what = f"{type(error).__name__}: {error}"
    return PluginError(f"{kind.setting} is {name!r}, but {module_name} cannot be imported: {what}{_where(error)}")


def _folders() -> list[str]:
    listed = [folder for folder in os.environ.get(FOLDERS, "").split(os.pathsep) if folder]
    return list(dict.fromkeys([*listed, str(Path.cwd()), str(PROJECT_ROOT)]))


def _extend_search() -> None:
    # At the end: a file of somebody's that is called like an installed package must not take its place.
    sys.path += [folder for folder in _folders() if folder not in sys.path]


# ------------------------------------------------------------------------------------------------------------- calling


@contextlib.contextmanager
def calling(what: str) -> Iterator[None]:
    """Turn what somebody's own code raises into an error that names it, file and line.

    Args:
        what: is called, such as ``"the fusion rule my_rules:softmax_sum"``.

    Raises:
        PluginError: for any exception.
    """
    try:
        yield
    except PluginError:
        raise
    except Exception as error:
        raise PluginError(f"{what} raised {type(error).__name__}: {error}{_where(error)}") from error


@contextlib.contextmanager
def of_image(*image_ids: str) -> Iterator[None]:
    """Name the images that are at work in an error of somebody's own code that names none."""
    try:
        yield
    except PluginError as error:
        if getattr(error, "names_image", False):
            raise
        named = PluginError(f"image {', '.join(image_ids)}: {error}")
        named.names_image = True  # type: ignore[attr-defined]
        raise named from error


def _where(error: BaseException) -> str:
    """File and line that an exception comes from, the last outside of installed packages and this one."""
    frames = traceback.extract_tb(error.__traceback__)
    others = (str(Path(__file__).parent), "<frozen", sysconfig.get_path("stdlib"))
    own = [frame for frame in frames if not frame.filename.startswith(others) and "site-packages" not in frame.filename]
    return f" ({_shown(own[-1].filename)}, line {own[-1].lineno})" if own else ""


def _shown(file: str) -> str:
    return display_path(Path(file))


def own_name(given: Callable[..., Any]) -> str:
    """What messages call a function, class or object that was given itself, not by name."""
    named = given if hasattr(given, "__qualname__") else type(given)
    return f"{named.__module__}:{named.__qualname__}"


def checked_maps(what: str, maps: Any, shape: tuple[int | None, ...], axes: str) -> Tensor:
    """Maps that somebody's own code returned, if they are what they must be.

    Args:
        what: returned them, such as ``"the fusion rule my_rules:softmax_sum"``.
        maps: what it returned.
        shape: expected; None where any length will do.
        axes: what the shape means, such as ``"(K, H, W)"``.

    Returns:
        The maps as float32, without a gradient.

    Raises:
        PluginError: if they are no tensor of floats, of another shape, not finite, or negative anywhere.
    """
    import torch

    if not isinstance(maps, torch.Tensor) or not maps.is_floating_point():
        kind = f"a tensor of {maps.dtype}" if isinstance(maps, torch.Tensor) else f"a {type(maps).__name__}"
        raise PluginError(f"{what} returned {kind}; it must return a tensor of floats {axes}")
    fits = maps.dim() == len(shape) and all(n in (None, m) for n, m in zip(shape, maps.shape, strict=True))
    if not fits:
        wanted = ", ".join("any" if n is None else str(n) for n in shape)
        raise PluginError(f"{what} returned the shape {tuple(maps.shape)}; it must be ({wanted}): {axes}")
    maps = maps.detach()
    if maps.device.type != "meta" and maps.numel() and not bool((maps >= 0).all() and maps.isfinite().all()):
        finite = bool(maps.isfinite().all())
        found = f"negative values, the least {float(maps.min()):.3g}" if finite else "values that are not finite"
        raise PluginError(f"{what} returned {found}; maps must be finite and not negative, such as after relu()")
    return maps.float()


# -------------------------------------------------------------------------------------------- what a result depends on


def describe(kind: Kind, name: str) -> dict[str, Any]:
    """What a manifest says about somebody's own code, without importing it.

    Returns:
        ``name``; ``module``; its ``file``, and the ``folder`` from which it is imported; ``package`` and version where
        a distribution brings it, else None; ``sha256`` of the file and of those below the folder that it imports.

    Raises:
        PluginError: if there is no such module.
    """
    module, _ = _target(kind, name)
    sources = source_files(kind, name)
    digest = hashlib.sha256("".join(f"{each}\0{file_hash(path)}\n" for each, path in sources.items()).encode())
    return {
        "name": name,
        "module": module,
        "file": display_path(sources[module]),
        "folder": display_path(_root(module, sources[module])),
        "package": _package(module),
        "sha256": digest.hexdigest(),
    }


def source_files(kind: Kind, name: str) -> dict[str, Path]:
    """Files by module: the one that a name means, and those below the same folder that it imports, and so on.

    Of an installed package only the module itself: its version stands for the rest.

    Raises:
        PluginError: if there is no such module, or it has no file.
    """
    module, _ = _target(kind, name)
    _extend_search()
    importlib.invalidate_caches()
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError) as error:
        raise PluginError(f"{kind.setting} is {name!r}, but there is no module {module}: {error}") from error
    if spec is None or not spec.has_location or spec.origin is None:
        _import(kind, name, module)  # which says what is wrong
        raise PluginError(f"{kind.setting} is {name!r}, but {module} has no file; name a module of Python code")
    file = Path(spec.origin)
    found = {module: file}
    if _package(module):
        return found
    _follow(_root(module, file), module, found)
    return dict(sorted(found.items()))


def _root(module: str, file: Path) -> Path:
    """The folder on Python's path from which a module's file is imported."""
    return file.parents[module.count(".") + (file.name == "__init__.py")]


def _follow(root: Path, module: str, found: dict[str, Path]) -> None:
    """Add what a module's file imports from below a folder."""
    try:
        tree = ast.parse(found[module].read_text(encoding="utf-8"))
    except (SyntaxError, ValueError, OSError):  # compiled, or importing it says what is wrong
        return
    package = module if found[module].name == "__init__.py" else module.rpartition(".")[0]
    names = [".".join(module.split(".")[:count]) for count in range(1, module.count(".") + 1)]  # its packages
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: package.count(".") + 2 - node.level] if node.level else []
            source = ".".join([*parents, *filter(None, [node.module])])
            names += [source, *(f"{source}.{alias.name}" for alias in node.names)]
    for name in names:
        if name.partition(".")[0] == "smaflib" or name in found or not name:
            continue  # what is imported of this library counts with its modules
        path = root.joinpath(*name.split("."))
        for file in (path / "__init__.py", path.with_suffix(".py")):
            if file.is_file():
                found[name] = file
                _follow(root, name, found)


@functools.cache
def _packages() -> dict[str, list[str]]:
    return dict(importlib.metadata.packages_distributions())


def _package(module: str) -> str | None:
    """Distribution and version that bring a module."""
    names = _packages().get(module.partition(".")[0])
    return f"{names[0]} {importlib.metadata.version(names[0])}" if names else None


# ---------------------------------------------- the new API; everything above goes once nobody calls it


def is_custom(name: str) -> bool:
    """Whether a name stands for custom code: ``package.module:attribute``."""
    return ":" in name


def load_custom(name: str) -> Callable[..., Any]:
    """Import what a name such as ``my_rules:softmax_sum`` stands for.

    A module is searched for as Python does, then in the working directory, beside the config file, and in the checkout.

    Raises:
        ConfigError: if it cannot be imported or called; with the name and the cause.
    """
    _extend_search()
    try:
        value = pkgutil.resolve_name(name)
    except (Exception, SystemExit) as error:
        cause = f"{type(error).__name__}: {error}"
        raise ConfigError(
            f"cannot load {name}: {cause}. Modules are searched for in {', '.join(_folders())}"
        ) from error
    if not callable(value):
        raise ConfigError(f"{name} is a {type(value).__name__} and cannot be called")
    return value


def custom_file(name: str) -> Path:
    """The file of the module that a name stands for, without importing it; its hash goes into the manifest.

    Raises:
        ConfigError: if there is no such module, or it has no file.
    """
    _extend_search()
    module = name.partition(":")[0]
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError) as error:
        raise ConfigError(f"cannot load {name}: {error}") from error
    if spec is None or not spec.has_location or spec.origin is None:
        raise ConfigError(f"cannot load {name}: there is no file of {module} in {', '.join(_folders())}")
    return Path(spec.origin)

"""Custom code behind a name in a config: ``package.module:attribute``.

Reading a config imports none of it. What a fusion rule, a source of maps, a backbone, a data set and a refinement must
do is in docs/extend.md; :func:`smaflib.pipeline.check_custom` tries them before a run.
"""

import importlib
import inspect
import os
import pkgutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from smaflib.errors import ConfigError
from smaflib.files import PROJECT_ROOT

FOLDERS = "SMAF_PLUGIN_FOLDERS"
"""Environment variable: more folders to search for modules; kernels and worker processes inherit it."""


def is_custom(name: str) -> bool:
    """Whether a name stands for custom code."""
    return ":" in name


def search_in(*folders: Path) -> None:
    """Also search these folders, in this process and in those that it starts."""
    listed = filter(None, os.environ.get(FOLDERS, "").split(os.pathsep))
    os.environ[FOLDERS] = os.pathsep.join(dict.fromkeys([*listed, *(str(folder.resolve()) for folder in folders)]))


def load_custom(name: str) -> Callable[..., Any]:
    """Import what a name such as ``my_rules:softmax_sum`` stands for; ConfigError if it cannot be found.

    A module is searched for on Python's path, then in :data:`FOLDERS`, the working directory and the checkout.
    """
    listed = filter(None, os.environ.get(FOLDERS, "").split(os.pathsep))
    folders = list(dict.fromkeys([*listed, str(Path.cwd()), str(PROJECT_ROOT)]))
    # At the end: a module in these folders must not replace an installed package of the same name.
    sys.path += [folder for folder in folders if folder not in sys.path]
    importlib.invalidate_caches()  # the file may be younger than what Python knows of its folder
    try:
        return pkgutil.resolve_name(name)
    except (Exception, SystemExit) as error:
        cause = f"{type(error).__name__}: {error}. Modules are searched for in {', '.join(folders)}"
        raise ConfigError(f"cannot load {name}: {cause}") from error


def custom_file(name: str) -> Path:
    """The file of the module of a name, which is imported."""
    load_custom(name)
    return Path(inspect.getfile(sys.modules[name.partition(":")[0]]))

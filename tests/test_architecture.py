"""The package's shape: imports point down, importing has no effects, the method needs neither Jupyter nor plots."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from importlib import import_module
from pathlib import Path

import pytest

import smaflib
from smaflib.files import PROJECT_ROOT

STAGES = "classifier cams maps reactivation thresholds self_training pseudo_masks segmentation training evaluation"
LAYERS = (
    ("config", "plugins", "files", "errors"),
    ("data", "models", "refinement", "processes", "runtime", "sources"),
    tuple(STAGES.split()),
    ("pipeline", "workspace"),
    ("runs", "report"),
    ("explorer", "apps", "__main__"),
)
"""From bottom to top; a module imports from its own layer and from those below."""
METHOD = 3  # the last layer that a user of the method needs
NOT_FOR_THE_METHOD = {"papermill", "jupyter_client", "jupyterlab", "IPython", "nbconvert", "matplotlib", "pandas"}


def modules() -> dict[str, Path]:
    """Paths by name without ``smaflib.``; the front door left out."""
    package = PROJECT_ROOT / "smaflib"
    paths = {".".join(path.relative_to(package).with_suffix("").parts): path for path in package.rglob("*.py")}
    return {name.removesuffix(".__init__"): path for name, path in paths.items() if name != "__init__"}


MODULES = modules()


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """The modules that a file imports, smaflib's as in :data:`MODULES`, and whether when it is loaded."""

    def visit(node: ast.AST, loaded: bool) -> Iterator[tuple[str, bool]]:
        if isinstance(node, ast.FunctionDef) or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)):
            loaded = False
        if isinstance(node, ast.Import):
            yield from ((alias.name.removeprefix("smaflib."), loaded) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:  # ``from smaflib import files`` means the module
                full = f"{node.module}.{alias.name}".removeprefix("smaflib.")
                yield full if full in MODULES else str(node.module).removeprefix("smaflib."), loaded
        for child in ast.iter_child_nodes(node):
            yield from visit(child, loaded)

    return visit(ast.parse(path.read_text(encoding="utf-8")), True)


def layer(name: str) -> int:
    places = [
        (len(top), number) for number, tops in enumerate(LAYERS) for top in tops if f"{name}.".startswith(f"{top}.")
    ]
    assert places, f"smaflib.{name} is in no layer"
    return max(places)[1]


def test_imports_point_down() -> None:
    arrows = {(name, target) for name, path in MODULES.items() for target, _ in imports(path) if target in MODULES}
    assert {(name, target) for name, target in arrows if layer(target) > layer(name)} == set()


def test_no_module_needs_itself() -> None:
    loaded = {name: {target for target, now in imports(path) if now} & MODULES.keys() for name, path in MODULES.items()}
    TopologicalSorter(loaded).prepare()  # a CycleError names the circle


def test_the_package_imports_nothing_of_its_checkout() -> None:
    outside = {target.partition(".")[0] for path in MODULES.values() for target, _ in imports(path)}
    assert not outside & {"smaflib", "tools", "tests", "benchmarks"}


def test_the_drawn_data_set_needs_samples_only() -> None:
    used = {target for path in (PROJECT_ROOT / "minidata").rglob("*.py") for target, _ in imports(path)}
    assert {target for target in used & MODULES.keys() if not target.startswith("data.")} <= {
        "files",
        "errors",
        "config",
    }


def test_the_method_needs_no_jupyter_plots_or_tables() -> None:
    method = [path for name, path in MODULES.items() if layer(name) <= METHOD]
    loaded = {target.partition(".")[0] for path in method for target, now in imports(path) if now}
    assert "torch" in loaded and NOT_FOR_THE_METHOD.isdisjoint(loaded)


def test_importing_changes_nothing_and_waits_for_nothing() -> None:
    script = """
import os, sys
before, umask = dict(os.environ), os.umask(0o026)
import smaflib
loaded = {"torch", "numpy", "pydantic", "smaflib.config"} & sys.modules.keys()
import smaflib.files
print(dict(os.environ) == before, os.umask(umask) == 0o026, sorted(loaded))
"""
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=PROJECT_ROOT, check=True, capture_output=True, text=True)
    assert done.stdout.split() == ["True", "True", "[]"]


@pytest.mark.parametrize("name", smaflib.__all__)
def test_the_front_door_offers_the_steps_of_the_method(name: str) -> None:
    offered = getattr(smaflib, name)
    assert offered.__name__ == name and name in dir(smaflib)
    assert getattr(import_module(offered.__module__), name) is offered


def test_the_front_door_offers_nothing_else() -> None:
    with pytest.raises(AttributeError, match="module 'smaflib' has no attribute 'denoize'"):
        smaflib.denoize  # noqa: B018


NOT_ON_WINDOWS = """
import importlib, os, pkgutil, signal, sys, warnings
for name in ("fcntl", "resource", "pwd", "grp", "termios", "pty"):
    sys.modules[name] = None
for name in ("killpg", "setsid", "fork", "sched_getaffinity", "sysconf"):
    delattr(os, name)
for name in ("SIGKILL", "SIGHUP"):
    delattr(signal, name)
warnings.simplefilter("ignore")
import smaflib
for module in pkgutil.walk_packages(smaflib.__path__, "smaflib."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
"""


def test_every_module_imports_without_posix() -> None:
    done = subprocess.run([sys.executable, "-c", NOT_ON_WINDOWS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

"""The package's shape: imports go one way, and the method needs neither Jupyter nor plots nor tables."""

from __future__ import annotations

import ast
import runpy
import subprocess
import sys
from graphlib import TopologicalSorter
from importlib import import_module
from pathlib import Path

import pytest

import smaflib
from smaflib.files import PROJECT_ROOT

LAYERS = (
    ("apps", "__main__"),
    ("explorer",),
    ("runs.runner",),  # ends a run with its report
    ("report",),
    ("runs",),
    ("distributed.worker",),  # calls the stages, in processes that they have started
    ("pipeline",),
    (
        "classifier",
        "cams",
        "maps",
        "reactivation",
        "self_training",
        "pseudo_masks",
        "segmentation",
        "evaluation",
        "thresholds",
        "training",
        "trials",
    ),
    ("refinement",),
    ("models",),
    ("distributed.launch",),
    ("distributed",),
    ("data",),
    ("runtime",),
    ("config",),
    ("plugins",),
    ("files",),
    ("errors",),
)
"""From top to bottom; a module imports from its own layer and from those below it."""

METHOD = LAYERS.index(("pipeline",))
"""The first layer of what is needed without notebooks, runs and reports."""

UPWARDS: dict[tuple[str, str], str] = {}
"""(module, imported module): why an import inside a function, or for types, goes up."""

NOT_FOR_THE_METHOD = {"papermill", "jupyter_client", "jupyterlab", "IPython", "nbconvert", "matplotlib", "pandas"}


def modules() -> dict[str, Path]:
    """Paths by name, without the package's own ``smaflib.``; its front door, which only users import from, left out."""
    package = PROJECT_ROOT / "smaflib"
    paths = {".".join(path.relative_to(package).with_suffix("").parts): path for path in package.rglob("*.py")}
    return {name.removesuffix(".__init__"): path for name, path in paths.items() if name != "__init__"}


MODULES = modules()


def imports(name: str) -> dict[str, bool]:
    """What a module imports, with the package's own modules under their name in :data:`MODULES`; True: when loaded."""
    found: dict[str, bool] = {}

    def visit(node: ast.AST, loaded: bool) -> None:
        if isinstance(node, ast.FunctionDef) or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)):
            loaded = False
        targets = []
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} imports from a relative name"
            # ``from smaflib import files`` means the module, ``from smaflib.files import display_path`` too.
            longer = [f"{node.module}.{alias.name}" for alias in node.names]
            targets = [full if full.removeprefix("smaflib.") in MODULES else node.module for full in longer]
        for target in targets:
            target = target.removeprefix("smaflib.")
            found[target] = found.get(target, False) or loaded
        for child in ast.iter_child_nodes(node):
            visit(child, loaded)

    visit(ast.parse(MODULES[name].read_text()), True)
    return found


def layer(name: str) -> int:
    places = [
        (len(prefix), number)
        for number, prefixes in enumerate(LAYERS)
        for prefix in prefixes
        if f"{name}.".startswith(f"{prefix}.")
    ]
    assert places, f"smaflib.{name} stands in no layer; say in LAYERS where it belongs"
    return max(places)[1]


def test_imports_go_one_way() -> None:
    upwards = {
        (name, target): loaded
        for name in MODULES
        for target, loaded in imports(name).items()
        if target in MODULES and layer(target) < layer(name)
    }
    assert {pair for pair, loaded in upwards.items() if loaded} == set()
    assert upwards.keys() == UPWARDS.keys()


def test_no_module_is_needed_to_load_itself() -> None:
    graph = {name: {target for target, loaded in imports(name).items() if loaded} & MODULES.keys() for name in MODULES}
    TopologicalSorter(graph).prepare()  # a CycleError names the circle


def test_the_library_imports_nothing_of_the_checkout_around_it() -> None:
    outside = {(name, target) for name in MODULES for target in imports(name)}
    assert not [pair for pair in outside if pair[1].partition(".")[0] in ("smaflib", "tools", "tests", "benchmarks")]


def run_python(script: str, *arguments: str) -> list[str]:
    command = [sys.executable, "-c", script, *arguments]
    return subprocess.run(command, cwd=PROJECT_ROOT, check=True, capture_output=True, text=True).stdout.split()


def test_the_method_needs_no_jupyter_plots_or_tables() -> None:
    needed = sorted(name for name in MODULES if layer(name) >= METHOD)
    script = """
import importlib, sys
unwanted, *names = sys.argv[1:]
unwanted = set(unwanted.split())
for name in names:
    importlib.import_module(f"smaflib.{name}")
    for package in unwanted & sys.modules.keys():
        print(f"{name}->{package}")
        unwanted.remove(package)
"""
    assert run_python(script, " ".join(NOT_FOR_THE_METHOD), *needed) == []


def test_the_front_door_waits_for_nothing() -> None:
    loaded = run_python("import smaflib, sys; print(*sys.modules)")
    assert "smaflib" in loaded
    assert not {"torch", "numpy", "pydantic"} & set(loaded)
    assert not [name for name in loaded if name.startswith("smaflib.")]


@pytest.mark.parametrize("name", smaflib.__all__)
def test_the_straight_path_is_offered_by_its_modules(name: str) -> None:
    offered = getattr(smaflib, name)
    assert offered.__name__ == name and name in dir(smaflib)
    assert getattr(import_module(offered.__module__), name) is offered


def test_the_front_door_offers_nothing_else() -> None:
    with pytest.raises(AttributeError, match="module 'smaflib' has no attribute 'denoize'"):
        smaflib.denoize  # noqa: B018


def test_the_package_is_a_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["smaflib", "run", "--help"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_module("smaflib", run_name="__main__")
    assert "Usage: smaf run" in capsys.readouterr().out


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
from smaflib.runtime import CPU, memory_of, num_cores
assert num_cores() >= 1 and memory_of(CPU) is None
"""


def test_every_module_imports_where_there_is_no_posix():
    done = subprocess.run([sys.executable, "-c", NOT_ON_WINDOWS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

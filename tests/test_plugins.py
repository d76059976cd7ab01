"""Custom code behind a name in a config: found in the right places, or one error that says what is wrong."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from smaflib.config import load_config
from smaflib.errors import ConfigError
from smaflib.files import PROJECT_ROOT
from smaflib.plugins import custom_file, is_custom, load_custom


@pytest.fixture
def home(code_folder: Path) -> Path:
    """The working directory, with a module."""
    (code_folder / "own_rules.py").write_text("def f(maps, scales): return maps.sum(dim=0)\nclass A:\n    x = 3\n")
    return code_folder


def test_a_name_is_a_module_and_an_attribute(home: Path) -> None:
    assert is_custom("own_rules:f") and not is_custom("size_adaptive")
    assert custom_file("own_rules:f") == home / "own_rules.py"
    assert load_custom("own_rules:f").__name__ == "f" and load_custom("own_rules:A")().x == 3


@pytest.mark.parametrize(
    ("name", "cause"),
    [
        ("no_such_module:f", "ModuleNotFoundError: No module named 'no_such_module'. Modules are searched for in"),
        ("own_rules:g", "module 'own_rules' has no attribute 'g'"),
        ("own_rules.py:f", "'own_rules' is not a package"),
        ("own rules:f", "invalid format"),
        ("own_broken:f", "ZeroDivisionError: division by zero"),
        ("own_exit:f", "SystemExit: 3"),
    ],
)
def test_what_cannot_be_loaded_is_named_with_its_cause(home: Path, name: str, cause: str) -> None:
    (home / "own_broken.py").write_text("1 / 0")
    (home / "own_exit.py").write_text("raise SystemExit(3)")
    with pytest.raises(ConfigError, match=name) as caught:
        load_custom(name)
    assert cause in str(caught.value)


def test_modules_beside_the_config_are_found_in_child_processes(home: Path) -> None:
    beside = home / "configs"
    beside.mkdir()
    (beside / "own_beside.py").write_text("def f(maps, scales): return maps.amax(dim=0)")
    (beside / "c.yaml").write_text("data: {kind: mini}\nattention: {fusion: 'own_beside:f'}\n")
    load_config(beside / "c.yaml")
    assert "own_beside" not in sys.modules  # reading a config imports nothing
    script = "from smaflib.plugins import *; print(load_custom('own_rules:f'), load_custom('own_beside:f'))"
    env = os.environ | {"PYTHONPATH": str(PROJECT_ROOT)}
    done = subprocess.run([sys.executable, "-c", script], cwd="/", env=env, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count("<function f") == 2, done.stderr

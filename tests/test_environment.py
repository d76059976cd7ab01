"""What is installed: pyproject.toml, environment.yml, requirements.lock and the Makefile say the same thing."""

import importlib.metadata
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import smaflib
from smaflib.refinement import pydensecrf_backend

ROOT = Path(__file__).parents[1]
CONDA_NAMES = {"torch": "pytorch", "jupyter-client": "jupyter_client", "jupyter-core": "jupyter_core"}
NOT_ON_CONDA_FORGE = {"pydensecrf2", "playwright"}
CONDA_ONLY = {"python", "pip", "cxx-compiler"}

stamp = ROOT / ".venv" / ".stamp"
in_the_venv_of_make = pytest.mark.skipif(
    Path(sys.prefix).resolve() != (ROOT / ".venv").resolve() or not stamp.exists() or sys.version_info[:2] != (3, 11),
    reason="compares requirements.lock with the Python 3.11 environment that `make setup` made; this is another one",
)


def read_pyproject() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def read_requirements() -> dict[str, Requirement]:
    """Dependencies and the dev extra of pyproject.toml, by canonical name."""
    project = read_pyproject()["project"]
    lines = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    requirements = [Requirement(line) for line in lines]
    return {canonicalize_name(requirement.name): requirement for requirement in requirements}


def read_environment() -> tuple[dict[str, str], list[str]]:
    """Bounds by conda name, and the lines of the pip section, of environment.yml."""
    dependencies = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    (pip_section,) = [entry["pip"] for entry in dependencies if isinstance(entry, dict)]
    packages = [re.fullmatch(r"([\w-]+)(.*)", entry).groups() for entry in dependencies if isinstance(entry, str)]
    return dict(packages), pip_section


def read_lock() -> dict[str, str]:
    """Version by canonical name, of the lines of requirements.lock that are meant for this platform."""
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    pins = {}
    for requirement in [Requirement(line) for line in lines if line and not line.startswith("#")]:
        (bound,) = requirement.specifier
        assert bound.operator == "==" and "*" not in bound.version, f"{requirement} is not one exact version"
        if requirement.marker is None or requirement.marker.evaluate():
            assert canonicalize_name(requirement.name) not in pins, f"{requirement.name} is pinned twice"
            pins[canonicalize_name(requirement.name)] = bound.version
    return pins


def needed_packages(roots: list[Requirement]) -> dict[str, str]:
    """Installed version by canonical name, of all that the roots need directly or through one another.

    Torch's CUDA and triton packages, which torch asks for on Linux only, are left out.
    """
    versions: dict[str, str] = {}
    seen, todo = set(), list(roots)
    while todo:
        requirement = todo.pop()
        name = canonicalize_name(requirement.name)
        if name == "pydensecrf2" and not pydensecrf_backend.INSTALLED:  # left out where there is no compiler
            versions[name] = read_lock()[name]
            continue
        distribution = importlib.metadata.distribution(name)
        versions[name] = distribution.version
        for extra in {"", *requirement.extras}:
            if (name, extra) in seen:
                continue
            seen.add((name, extra))
            for needed in map(Requirement, distribution.requires or []):
                if name == "torch" and "platform_system" in str(needed.marker):
                    continue
                if needed.marker is None or needed.marker.evaluate({**default_environment(), "extra": extra}):
                    todo.append(needed)
    return versions


def run_make(*arguments: str) -> str:
    # Make's own variables would make this call one of its children, which prints more.
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    return subprocess.run(
        ["make", *arguments], cwd=ROOT, env=environ, check=True, capture_output=True, text=True
    ).stdout.strip()


def test_environment_yml_lists_the_packages_of_pyproject():
    packages, pip_section = read_environment()
    expected = {CONDA_NAMES.get(name, name) for name in read_requirements().keys() - NOT_ON_CONDA_FORGE}
    assert packages.keys() == expected | CONDA_ONLY
    assert {Requirement(line).name for line in pip_section if line != "-e ."} == NOT_ON_CONDA_FORGE
    assert pip_section[-1] == "-e ."


def test_environment_yml_has_the_bounds_of_pyproject():
    packages, pip_section = read_environment()
    bounds = {CONDA_NAMES.get(name, name): str(bound.specifier) for name, bound in read_requirements().items()}
    in_pip_section = {line.name: str(line.specifier) for line in map(Requirement, pip_section[:-1])}
    for name, bound in {**packages, **in_pip_section}.items():
        assert name in CONDA_ONLY or bound == bounds[name], name


def test_environment_yml_has_the_oldest_python_of_pyproject():
    packages, _ = read_environment()
    assert packages["python"].replace("=", ">=") == read_pyproject()["project"]["requires-python"]


@pytest.mark.parametrize("name", read_requirements())
def test_lock_satisfies_the_bound_of_pyproject(name):
    version = read_lock()[name]
    assert read_requirements()[name].specifier.contains(version), f"{name} {version}: run `make lock`"


@in_the_venv_of_make
def test_lock_pins_exactly_what_is_needed_at_the_version_that_is_installed():
    assert read_lock() == needed_packages(list(read_requirements().values()))


def test_the_version_is_said_once_and_cited():
    assert read_pyproject()["project"]["dynamic"] == ["version"]
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == smaflib.__version__


def test_readme_names_the_commands_of_the_makefile():
    readme = (ROOT / "README.md").read_text()
    assert "make reproduce" in readme
    assert "make test" in readme
    assert run_make("--dry-run", "reproduce").splitlines()[-1] == ".venv/bin/smaf run configs/mini.yaml"


def test_ci_runs_what_make_test_runs():
    last_line = (ROOT / ".ci" / "run").read_text().splitlines()[-1]
    assert last_line == "exec make --no-print-directory test"
    assert os.access(ROOT / ".ci" / "run", os.X_OK)

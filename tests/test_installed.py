"""The package from its wheel, in a fresh environment and outside any checkout."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
from test_notebooks import TINY

from smaflib.files import PROJECT_ROOT

LEFT_OUT = (".git", ".venv", "papermill_runs", "build", "docs", "tests", "*.egg-info", ".*_cache")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel alone; torch and the others are this environment's."""
    home = tmp_path_factory.mktemp("installed")
    shutil.copytree(PROJECT_ROOT, home / "source", ignore=shutil.ignore_patterns(*LEFT_OUT))
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    offline = ["--quiet", "--no-deps", "--no-index"]
    wheel = ["wheel", *offline, "--no-build-isolation", "--wheel-dir", str(home / "wheel"), str(home / "source")]
    subprocess.run([*pip, *wheel], check=True)
    shutil.rmtree(home / "source")
    venv.create(home / "env", with_pip=False, symlinks=True)
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(home / "env"), "platbase": str(home / "env")}))
    (packages / "shared.pth").write_text(sysconfig.get_path("purelib") + "\n")
    (built,) = (home / "wheel").glob("*.whl")
    python = str(home / "env" / "bin" / "python")
    subprocess.run([*pip, "--python", python, "install", *offline, str(built)], check=True)
    (home / "work").mkdir()
    return home


def call(home: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """A command of the environment, in a folder that holds nothing of the project."""
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "SMAF_HOME")}
    env["JUPYTER_PATH"] = str(Path(sysconfig.get_path("data")) / "share" / "jupyter")  # templates of nbconvert
    program = str(home / "env" / "bin" / words[0])
    return subprocess.run(
        [program, *words[1:]], cwd=home / "work", env=env, capture_output=True, text=True, timeout=600
    )


ONE_STAGE = """
import sys
from pathlib import Path
from smaflib.files import find_config
from smaflib.runs.runner import run_notebooks
from smaflib.runs.stages import STAGES
run_notebooks(find_config(Path("mini")), overrides=sys.argv[1:], stages=STAGES[1:2])
"""


def test_a_stage_runs_by_the_name_of_its_settings(home: Path) -> None:
    done = call(home, "python", "-c", ONE_STAGE, *TINY)
    assert done.returncode == 0, done.stderr[-3000:]
    run = home / "work" / "papermill_runs" / "mini"
    manifest = json.loads((run / "manifest.json").read_text())
    assert [entry["status"] for entry in manifest["stages"].values()] == ["complete"]
    assert manifest["git_commit"] is None and (run / "index.html").is_file()
    assert call(home, "smaf", "status", "mini").stdout.count("complete") == 1


def test_masks_command_finds_its_preset(home: Path) -> None:
    (home / "work" / "labels.csv").write_text("image,labels\na.jpg,cat\n")
    done = call(home, "smaf", "masks", "--images", ".", "--labels", "labels.csv", "--out", "out")
    assert done.returncode == 2 and "a.jpg" in done.stderr, done.stderr[-2000:]


def test_notebooks_are_copied_and_those_that_are_there_stay(home: Path) -> None:
    assert call(home, "smaf", "lab", "--no-start").returncode == 0
    notebook = home / "work" / "notebooks" / "00_one_image_end_to_end.ipynb"
    assert notebook.read_bytes() == (PROJECT_ROOT / "notebooks" / notebook.name).read_bytes()
    notebook.write_text("mine")
    assert call(home, "smaf", "lab", "--no-start").returncode == 0 and notebook.read_text() == "mine"


def test_module_is_the_command_and_comes_from_the_wheel(home: Path) -> None:
    assert "sweep" in call(home, "python", "-m", "smaflib", "--help").stdout
    assert str(home / "env") in call(home, "python", "-c", "import smaflib; print(smaflib.__file__)").stdout

"""The runner on a chain of two small notebooks. A kernel takes seconds to start, so most tests execute cells here."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import nbformat
import pytest
from helpers import execute_here
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from smaflib.errors import InputError, RunError
from smaflib.files import PROJECT_ROOT, locked
from smaflib.runs import Run
from smaflib.runs.kernel import NotebookKernel
from smaflib.runs.runner import run_notebooks
from smaflib.runs.stages import STAGES, Stage

CHAIN = (
    Stage("01_make", "?", outputs=("data.json", "cams/**"), required_outputs=("data.json",)),
    Stage(
        "02_use",
        "?",
        depends_on=("01_make",),
        outputs=("result.txt", "figures/02_*.png"),
        settings=("data.num_train",),
        code=("masks",),
    ),
)
PARAMETERS_CELL = """config_file: str = "configs/mini.yaml"  # settings
overrides: list = []  # key=value on top
run_dir: str = "papermill_runs/mini"  # where results go
zoom: int = 3  # display only"""

# Each execution writes a line to a file beside the run folder.
MAKE = """from pathlib import Path
run = Path(run_dir)
with open(run.parent / "log", "a") as log: print("01", file=log)
(run / "data.json").write_text("[1, 2]")
for i in "012":
    path = run / f"cams/teacher/{i}.npz"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.exists() or path.write_text(i)"""
USE = """import json, os, sys
from pathlib import Path
run = Path(run_dir)
with open(run.parent / "log", "a") as log: print("02", file=log)
(run / "result.txt").write_text(str(sum(json.loads((run / "data.json").read_text()))))
print(sys.executable, os.environ.get("MPLBACKEND"), os.environ.get("PYTHONHASHSEED"), zoom)"""
# Slow only if it is not resumed: the first attempt leaves half of its files.
SLOW = """import os, subprocess, sys, time
from pathlib import Path
cams = Path(run_dir) / "example"
cams.mkdir(exist_ok=True)
resumed = (cams / "0.npz").exists()
(cams / "0.npz").touch()
worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(120)"]) if not resumed else None
(cams / "pids.new").write_text(f"{os.getpid()} {worker.pid if worker else ''}")
(cams / "pids.new").rename(cams / "pids")
time.sleep(0 if resumed else 120)
(cams / "1.npz").touch()"""


@dataclass
class Chain:
    """A folder with notebooks, settings and runs."""

    folder: Path

    def run(self, until_stage: str | None = None, **options: object) -> Run:
        arguments = {"notebooks": self.folder / "notebooks", "runs": self.folder / "runs", "stages": CHAIN} | options
        return run_notebooks(self.folder / "tiny.yaml", None, [], until_stage, **arguments)

    def reuse(self, name: str, *settings: str, sources: Sequence[str] = ("tiny",), **options: object) -> Path:
        folders = {"notebooks": self.folder / "notebooks", "runs": self.folder / "runs", "stages": CHAIN}
        return run_notebooks(self.folder / "tiny.yaml", name, settings, reuse=sources, **folders, **options).folder

    def write(self, name: str, *code: str) -> None:
        cells = [new_markdown_cell("# Why?"), new_code_cell(PARAMETERS_CELL, metadata={"tags": ["parameters"]})]
        document = new_notebook(cells=cells + [new_code_cell(source) for source in code])
        document.metadata.kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
        nbformat.write(document, self.folder / "notebooks" / f"{name}.ipynb")

    def file(self, name: str) -> Path:
        return self.folder / "runs" / "tiny" / name

    def entry(self, stage: str) -> dict:
        return json.loads(self.file("manifest.json").read_text())["stages"][stage]

    @property
    def log(self) -> list[str]:
        """What has been executed so far."""
        return (self.folder / "runs" / "log").read_text().split()

    def command(self, *arguments: str) -> list[str]:
        folders = ["--notebooks", str(self.folder / "notebooks"), "--runs", str(self.folder / "runs")]
        return [sys.executable, "-m", "smaflib", "run", str(self.folder / "tiny.yaml"), *folders, *arguments]


def new_chain(folder: Path) -> Chain:
    (folder / "notebooks").mkdir(parents=True)
    (folder / "tiny.yaml").write_text("data: {kind: mini, num_train: 2, num_val: 2}\ndevice: cpu\n")
    chain = Chain(folder)
    chain.write("01_make", MAKE)
    chain.write("02_use", USE)
    return chain


@pytest.fixture
def chain(tmp_path: Path) -> Chain:
    return new_chain(tmp_path)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    """A complete run, executed by kernels."""
    chain = new_chain(tmp_path_factory.mktemp("chain"))
    decoy = chain.folder / "jupyter" / "kernels" / "python3"
    decoy.mkdir(parents=True)
    (decoy / "kernel.json").write_text(json.dumps({"argv": ["false"], "display_name": "x", "language": "python"}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JUPYTER_PATH", str(chain.folder / "jupyter"))
        patch.setenv("MPLBACKEND", "agg")
        chain.run()
    return chain


@pytest.fixture
def finished(original: Chain, tmp_path: Path) -> Chain:
    """A copy of a complete run."""
    shutil.copytree(original.folder, tmp_path, dirs_exist_ok=True)
    return Chain(tmp_path)


@pytest.fixture
def kernels() -> None:
    """Execute notebooks in kernels."""


@pytest.fixture(autouse=True)
def no_kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "kernels" not in request.fixturenames:
        monkeypatch.setattr(NotebookKernel, "execute", execute_here)


def wait_until(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.1)


def exists(pid: int) -> bool:
    with contextlib.suppress(ProcessLookupError, FileNotFoundError):
        os.kill(pid, 0)
        # A container's first process may not collect orphans.
        return not re.search(r"^State:\s*Z", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return False


# a run


def test_run_executes_all_notebooks_in_this_interpreter(original):
    assert original.log == ["01", "02"]
    assert original.file("result.txt").read_text() == "3"
    executed = nbformat.read(original.file("02_use.ipynb"), as_version=4)
    printed = executed.cells[-1].outputs[0].text.split()
    assert printed == [sys.executable, "module://matplotlib_inline.backend_inline", "0", "3"]
    assert "widgets" not in executed.metadata
    assert sorted(path.name for path in original.file("").glob("*.ipynb")) == ["01_make.ipynb", "02_use.ipynb"]


def test_manifest_proves_what_ran(original):
    manifest = json.loads(original.file("manifest.json").read_text())
    assert manifest["run"] == "tiny" and manifest["seed"] == 0 and manifest["device"].startswith("cpu")
    assert set(manifest) >= {"git_commit", "git_dirty", "python", "config_hash", "precision"}
    assert set(manifest["packages"]) >= {"torch", "numpy", "papermill"}
    stage, later = manifest["stages"]["01_make"], manifest["stages"]["02_use"]
    assert stage["status"] == "complete" and stage["seconds"] > 0
    assert stage["artifacts"]["data.json"]["bytes"] == 6
    assert stage["inputs"]["data.kind"] == "mini" and stage["inputs"]["smaflib.cams"].startswith("sha256:")
    assert "data.num_train" not in stage["inputs"] and later["inputs"]["data.num_train"] == 2
    assert later["inputs"]["01_make"] == stage["made"]


def test_complete_stages_are_skipped_with_a_line_each(finished, capfd):
    before = finished.file("index.html").stat().st_mtime_ns
    finished.run()
    assert finished.log == ["01", "02"]
    out, err = capfd.readouterr()
    assert re.findall(r"^(\w+)  complete, skipped", err, re.MULTILINE) == ["01_make", "02_use"]
    assert "\r" not in err
    assert str(finished.file("index.html")) in out
    assert finished.file("index.html").stat().st_mtime_ns == before


def test_changed_code_with_the_same_result_runs_one_stage(finished, capfd):
    finished.write("01_make", MAKE + "\nnothing = 0")
    finished.run()
    assert finished.log == ["01", "02", "01"]
    err = capfd.readouterr().err
    assert "01_make  starts (its notebook changed)" in err and re.search(r"01_make  done in \d+ s", err)


# code of the library


@pytest.fixture
def toolbox(chain: Chain, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A library of three modules, of which stage 02 is the first to depend on ``masks``."""
    folder = chain.folder / "toolbox"
    folder.mkdir()
    for name in ("cams", "report", "masks"):
        (folder / f"{name}.py").write_text("value = 1")
    monkeypatch.setattr("smaflib.runs.inputs.PACKAGES", [folder])
    chain.run()
    return folder


def test_changed_module_runs_the_stages_that_depend_on_it(chain, toolbox, capfd):
    (toolbox / "cams.py").write_text('"""Maps."""\nvalue = 1  # as before')
    chain.run()
    assert chain.log == ["01", "02"]
    (toolbox / "masks.py").write_text("value = 2")
    chain.run()
    assert chain.log == ["01", "02", "02"]
    (toolbox / "cams.py").write_text("value = 2")
    chain.run()
    assert chain.log == ["01", "02", "02", "01", "02"]
    assert "01_make  starts (toolbox.cams changed)" in capfd.readouterr().err
    assert not chain.entry("01_make")["resumed"]


def test_module_that_only_shows_runs_nothing_again(chain, toolbox):
    (toolbox / "report.py").write_text("value = 2")
    chain.run()
    assert chain.log == ["01", "02"]


def test_keep_stale_keeps_what_another_version_made(chain, toolbox):
    manifest = json.loads(chain.file("manifest.json").read_text())
    manifest["stages"]["02_use"]["status"] = "failed"
    chain.file("manifest.json").write_text(json.dumps(manifest))
    (toolbox / "cams.py").write_text("value = 2")
    chain.run(keep_stale=True)
    assert chain.log == ["01", "02", "02"] and chain.entry("02_use")["resumed"]
    chain.run()
    assert chain.log == ["01", "02", "02", "01", "02"]


# reused from another run


def content(folder: Path) -> dict[str, bytes]:
    """What both stages made, but for the report."""
    paths = [path for pattern in ("*.ipynb", "*.json", "*.txt", "cams/**/*.npz") for path in folder.glob(pattern)]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths if path.name != "manifest.json"}


def test_stages_with_the_same_inputs_are_reused(finished, capfd):
    folder = finished.reuse("same", "processes=1")  # it decides no result
    assert finished.log == ["01", "02"]
    err = capfd.readouterr().err
    assert re.findall(r"^(\w+)  reused from tiny$", err, re.MULTILINE) == ["01_make", "02_use"]
    assert content(folder) == content(finished.file("")) and len(content(folder)) == 7
    manifest = json.loads((folder / "manifest.json").read_text())
    assert {stage["reused_from"] for stage in manifest["stages"].values()} == {str(finished.file(""))}
    assert manifest["run"] == "same" and manifest["overrides"] == ["processes=1"]
    assert (folder / "cams/teacher/0.npz").samefile(finished.file("cams/teacher/0.npz"))
    for edited in ("data.json", "01_make.ipynb"):
        assert not (folder / edited).samefile(finished.file(edited))
    finished.reuse("same", "processes=1")
    assert capfd.readouterr().err.count("complete, skipped") == 2


def test_killed_while_reusing_then_run_again_is_complete(finished, monkeypatch):
    link, made = os.link, []

    def killing(source: str, target: str) -> None:
        if len(made) == 2:
            raise KeyboardInterrupt
        link(source, target)
        made.append(target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "link", killing)
        finished.reuse("killed")
    assert content(finished.reuse("killed")) == content(finished.file(""))
    assert finished.log == ["01", "02"]


# interrupted


def test_failing_cell_is_reported_with_how_to_resume(chain, kernels):
    chain.write("01_make", MAKE, "value = 1\nraise ValueError(f'value is {value}')")
    with pytest.raises(RunError) as error:
        chain.run()
    message = str(error.value)
    assert "01_make.ipynb failed" in message and "ValueError: value is 1" in message
    assert "The same command resumes it." in message
    assert error.value.exit_code == 1
    assert chain.entry("01_make")["status"] == "failed"
    assert chain.file("01_make.failed.ipynb").exists() and not chain.file("01_make.ipynb").exists()

    chain.write("01_make", MAKE)
    chain.run(until_stage="01")
    assert chain.entry("01_make")["status"] == "complete"
    assert not chain.file("01_make.failed.ipynb").exists()


def test_dead_kernel_fails_the_stage(chain, kernels):
    chain.write("01_make", "import ctypes", "ctypes.string_at(0)")
    with pytest.raises(RunError, match="the kernel died"):
        chain.run()
    assert chain.entry("01_make")["status"] == "failed"


def test_missing_artifact_fails_the_stage(chain):
    chain.write("01_make", "pass")
    with pytest.raises(RunError, match=r"01_make ended without making data\.json"):
        chain.run()
    assert chain.entry("01_make")["status"] == "failed"


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_killed_run_resumes(chain):
    name = "00_one_image_end_to_end"  # the command runs the real chain, whose first notebook this one replaces
    chain.write(name, SLOW)
    environment = os.environ | {"PYTHONPATH": str(PROJECT_ROOT)}
    process = subprocess.Popen(chain.command("--until", "0"), env=environment, stderr=subprocess.DEVNULL)
    wait_until(chain.file("example/pids").exists)
    pids = [int(pid) for pid in chain.file("example/pids").read_text().split()]
    process.kill()
    process.wait()
    assert chain.entry(name)["status"] == "running"

    wait_until(lambda: not exists(pids[0]))  # workers end by themselves, this test's does not
    os.kill(pids[1], signal.SIGKILL)
    chain.run(until_stage="0", stages=STAGES)
    assert chain.entry(name)["status"] == "complete" and chain.entry(name)["resumed"]
    assert {"0.npz", "1.npz"} <= {path.name for path in chain.file("example").iterdir()}


def test_stopped_run_leaves_no_kernel(chain, kernels):
    chain.write("01_make", SLOW)

    def stop() -> None:
        wait_until(chain.file("example/pids").exists)
        os.kill(os.getpid(), signal.SIGTERM)

    helper = threading.Thread(target=stop)
    helper.start()
    with pytest.raises(RunError, match="01_make was stopped by SIGTERM") as error:
        chain.run()
    helper.join()
    assert error.value.exit_code == 143 and chain.entry("01_make")["status"] == "failed"
    assert not any(exists(int(pid)) for pid in chain.file("example/pids").read_text().split())


# refused before any kernel starts


def test_second_runner_is_kept_out(finished):
    with locked(finished.file(""), "smaf run"), pytest.raises(RunError, match="tiny"):
        finished.run()
    assert finished.log == ["01", "02"]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["data.images={}/none"], "no folder .*none; set data.images"),
        (["data.images={}"], "a.jpg cannot be read as an image"),
        (["data.images={}", "model.weights=none.pth"], "no weights file .*none.pth"),
    ],
)
def test_what_cannot_run_leaves_no_folder_behind(tmp_path, settings, words):
    (tmp_path / "a.jpg").write_bytes(b"no picture")
    (tmp_path / "labels.csv").write_text("image,labels\na.jpg,cat\n")
    given = [f"data.labels={tmp_path}/labels.csv", *(setting.format(tmp_path) for setting in settings)]
    with pytest.raises(InputError, match=words):
        run_notebooks(PROJECT_ROOT / "configs" / "custom.yaml", overrides=given, runs=tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_wrong_stage_is_refused(chain):
    with pytest.raises(RunError, match="no stage 'maek'"):
        chain.run("maek")
    assert not chain.file("").exists()

"""Each kernel takes about two seconds to start, so tests share one finished run and work on copies of it."""

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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from smaflib.errors import ConfigError, RunError, RunMismatch, RunStopped, StageFailed
from smaflib.files import PROJECT_ROOT, locked
from smaflib.runs import Run
from smaflib.runs.code import imported_modules
from smaflib.runs.runner import PARAMETERS, run_notebooks
from smaflib.runs.stages import Stage

CHAIN = (
    Stage("01_make", "?", outputs=("data.json", "cams/**"), required_outputs=("data.json",)),
    Stage("02_use", "?", depends_on=("01_make",), outputs=("result.txt", "figures/02_*.png")),
)
PARAMETERS_CELL = """config_file: str = "configs/mini.yaml"  # settings
overrides: list = []  # key=value on top
run_dir: str = "papermill_runs/mini"  # where results go
zoom: int = 3  # display only"""

# Every execution leaves a line in a file beside the run folder.
MAKE = """from pathlib import Path
run = Path(run_dir)
with open(run.parent / "log", "a") as log: print("01", file=log)
(run / "data.json").write_text("[1, 2]")"""
USE = """import json, os, sys
from pathlib import Path
run = Path(run_dir)
with open(run.parent / "log", "a") as log: print("02", file=log)
(run / "result.txt").write_text(str(sum(json.loads((run / "data.json").read_text()))))
print("\\n".join([sys.executable, os.environ["MPLBACKEND"], os.environ["PYTHONHASHSEED"], str(zoom)]))"""
# Slow only as long as it is not continued: the first attempt leaves half of its files.
SLOW = """import os, time
from pathlib import Path
cams = Path(run_dir) / "cams"
cams.mkdir(exist_ok=True)
continued = (cams / "0.npz").exists()
(cams / "0.npz").touch()
(cams / "pid.new").write_text(str(os.getpid()))
(cams / "pid.new").rename(cams / "pid")
time.sleep(0 if continued else 120)
(cams / "1.npz").touch()"""


@dataclass
class Chain:
    """A folder with notebooks, settings and runs."""

    folder: Path

    def run(self, from_stage: str | None = None, until_stage: str | None = None, **options: object) -> Run:
        arguments = {"notebooks": self.folder / "notebooks", "runs": self.folder / "runs", "stages": CHAIN} | options
        return run_notebooks(self.folder / "tiny.yaml", None, [], from_stage, until_stage, **arguments)

    def write(self, name: str, *code: str, parameters: str = PARAMETERS_CELL, text: str = "# Why?") -> None:
        cells = [new_markdown_cell(text), new_code_cell(parameters, metadata={"tags": ["parameters"]})]
        document = new_notebook(cells=cells + [new_code_cell(source) for source in code])
        document.metadata.kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
        nbformat.write(document, self.folder / "notebooks" / f"{name}.ipynb")

    def file(self, name: str) -> Path:
        return self.folder / "runs" / "tiny" / name

    @property
    def log(self) -> list[str]:
        """What has been executed so far."""
        return (self.folder / "runs" / "log").read_text().split()

    def command(self, *arguments: str) -> list[str]:
        folders = ["--notebooks", str(self.folder / "notebooks"), "--runs", str(self.folder / "runs")]
        return [sys.executable, "-m", "smaflib.apps.cli", "run", str(self.folder / "tiny.yaml"), *folders, *arguments]


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
def original(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chain]:
    chain = new_chain(tmp_path_factory.mktemp("chain"))
    decoy = chain.folder / "jupyter" / "kernels" / "python3"
    decoy.mkdir(parents=True)
    (decoy / "kernel.json").write_text(json.dumps({"argv": ["false"], "display_name": "x", "language": "python"}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JUPYTER_PATH", str(chain.folder / "jupyter"))
        patch.setenv("MPLBACKEND", "agg")
        chain.run()
    yield chain


@pytest.fixture
def finished(original: Chain, tmp_path: Path) -> Chain:
    """A copy of a complete run."""
    shutil.copytree(original.folder, tmp_path, dirs_exist_ok=True)
    return Chain(tmp_path)


def entry(chain: Chain, stage: str) -> dict:
    return json.loads(chain.file("manifest.json").read_text())["stages"][stage]


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
    stage = manifest["stages"]["01_make"]
    assert stage["status"] == "complete" and stage["exit_code"] == 0 and stage["seconds"] > 0
    assert stage["artifacts"]["data.json"]["bytes"] == 6
    assert set(stage["parameters"]) == set(PARAMETERS)
    if Path("/proc/self/status").exists():
        assert 20 < stage["peak_memory_mb"] < 2000


def test_complete_stages_are_skipped_with_a_line_each(finished, capfd):
    finished.run()
    assert finished.log == ["01", "02"]
    out, err = capfd.readouterr()
    assert re.findall(r"^(\w+)  complete, skipped", err, re.MULTILINE) == ["01_make", "02_use"]
    assert "\r" not in err
    assert str(finished.file("index.html")) in out
    assert finished.file("index.html").exists()


def test_changed_text_runs_nothing(finished):
    finished.write("01_make", MAKE, text="# Why indeed?")
    finished.run()
    assert finished.log == ["01", "02"]


def test_changed_code_runs_the_stage_and_what_needs_it(finished):
    finished.write("01_make", MAKE.replace("[1, 2]", "[1, 4]"))
    finished.run()
    assert finished.log == ["01", "02", "01", "02"]
    assert finished.file("result.txt").read_text() == "5"


def test_changed_code_with_the_same_result_runs_one_stage(finished, capfd):
    finished.write("01_make", MAKE + "\nnothing = 0")
    finished.run()
    assert finished.log == ["01", "02", "01"]
    err = capfd.readouterr().err
    assert "01_make  starts (its notebook changed)" in err and re.search(r"01_make  done in \d+ s", err)


def test_truncated_artifact_is_made_again(finished):
    finished.file("result.txt").write_text("")
    finished.run()
    assert finished.log == ["01", "02", "02"]
    assert finished.file("result.txt").read_text() == "3"


def test_from_runs_later_stages_anew_though_nothing_they_need_changed(finished):
    finished.run(from_stage="01")
    assert finished.log == ["01", "02", "01", "02"]


def test_from_runs_anew_and_until_stops(finished):
    finished.file("cams").mkdir()
    finished.file("cams/old.npz").touch()
    finished.run(from_stage="01", until_stage="make")
    assert finished.log == ["01", "02", "01"]
    assert not finished.file("cams").exists()


# code of the library


@pytest.fixture
def toolbox(chain: Chain, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A library of two modules: notebook 01 computes with ``cams`` and shows with ``report``, 02 imports neither."""
    folder = chain.folder / "toolbox"
    folder.mkdir()
    for name in ("__init__", "cams", "report"):
        (folder / f"{name}.py").write_text("value = 1")
    imports = f"import sys\nsys.path.insert(0, {str(chain.folder)!r})\nfrom toolbox import cams, report"
    make_map = 'path = run / "cams/0.npz"\npath.parent.mkdir(exist_ok=True)\npath.exists() or path.touch()'
    chain.write("01_make", imports, MAKE, make_map)
    monkeypatch.setattr("smaflib.runs.inputs.imported_modules", partial(imported_modules, package=folder))
    chain.run()
    return folder


def test_changed_module_runs_the_stages_that_import_it(chain, toolbox, capfd):
    (toolbox / "cams.py").write_text('"""Maps."""\nvalue = 1  # as before')
    chain.run()
    assert chain.log == ["01", "02"]
    assert set(entry(chain, "01_make")["modules"]) == {"toolbox", "toolbox.cams", "toolbox.report"}
    assert entry(chain, "02_use")["modules"] == {}
    (toolbox / "cams.py").write_text("value = 2")
    chain.run()
    assert chain.log == ["01", "02", "01"]
    assert "01_make  starts (toolbox.cams changed)" in capfd.readouterr().err
    assert not entry(chain, "01_make")["resumed"]


def test_module_that_only_shows_leaves_artifacts_as_they_are(chain, toolbox, capfd):
    before = chain.file("cams/0.npz").stat().st_mtime_ns
    (toolbox / "report.py").write_text("value = 2")
    chain.run()
    assert chain.log == ["01", "02", "01"]
    assert "01_make  starts (toolbox.report changed; its artifacts stay)" in capfd.readouterr().err
    assert entry(chain, "01_make")["resumed"] and chain.file("cams/0.npz").stat().st_mtime_ns == before


def test_keep_stale_keeps_what_another_version_made_and_says_so(chain, toolbox, capfd):
    (toolbox / "cams.py").write_text("value = 2")
    chain.run(keep_stale=True)
    assert chain.log == ["01", "02"]
    err = capfd.readouterr().err
    assert re.search(
        r"01_make  complete, skipped \(took \d+ s; kept by --keep-stale though toolbox.cams changed\)", err
    )
    assert err.count("--keep-stale") == 1
    chain.run()
    assert chain.log == ["01", "02", "01"]


def test_keep_stale_resumes_what_another_version_began(chain, toolbox, capfd):
    before = chain.file("cams/0.npz").stat().st_mtime_ns
    manifest = json.loads(chain.file("manifest.json").read_text())
    manifest["stages"]["01_make"]["status"] = "failed"
    chain.file("manifest.json").write_text(json.dumps(manifest))
    (toolbox / "cams.py").write_text("value = 2")
    chain.run(keep_stale=True)
    assert "01_make  starts (resumes; kept by --keep-stale though toolbox.cams changed)" in capfd.readouterr().err
    assert chain.log == ["01", "02", "01"] and chain.file("cams/0.npz").stat().st_mtime_ns == before
    chain.run()
    assert chain.log == ["01", "02", "01", "01"] and chain.file("cams/0.npz").stat().st_mtime_ns > before


# taken over from another run


READ = """from smaflib.runs import open_run
print(open_run(run_dir, config_file, overrides).config.data.num_train)"""


@pytest.fixture(scope="module")
def reading(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    """A finished run ``tiny`` whose first stage makes a folder and whose second reads a setting."""
    chain = new_chain(tmp_path_factory.mktemp("reading"))
    make_maps = (
        'for i in "012":\n    path = run / f"cams/teacher/{i}.npz"\n    path.parent.mkdir(parents=True, exist_ok=True)'
    )
    chain.write("01_make", MAKE, make_maps + "\n    path.write_text(i)")
    chain.write("02_use", USE, READ)
    chain.run()
    return chain


def reuse(chain: Chain, name: str, *settings: str, sources: Sequence[str] = ("tiny",), **options: object) -> Path:
    folders = {"notebooks": chain.folder / "notebooks", "runs": chain.folder / "runs", "stages": CHAIN}
    return run_notebooks(chain.folder / "tiny.yaml", name, settings, reuse=sources, **folders, **options).folder


def content(folder: Path) -> dict[str, bytes]:
    """What both stages made, but for the report."""
    paths = [path for pattern in ("*.ipynb", "*.json", "*.txt", "cams/**/*.npz") for path in folder.glob(pattern)]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths if path.name != "manifest.json"}


def test_stages_with_the_same_inputs_are_taken_over(reading, capfd):
    executed = list(reading.log)
    folder = reuse(reading, "same", "data.num_val=3")  # no stage has read it
    assert reading.log == executed
    err = capfd.readouterr().err
    assert re.findall(r"^(\w+)  taken over from tiny$", err, re.MULTILINE) == ["01_make", "02_use"]
    assert content(folder) == content(reading.file("")) and len(content(folder)) == 7
    manifest = json.loads((folder / "manifest.json").read_text())
    assert {stage["reused_from"] for stage in manifest["stages"].values()} == {str(reading.file(""))}
    assert manifest["run"] == "same" and manifest["overrides"] == ["data.num_val=3"]
    assert (folder / "cams/teacher/0.npz").samefile(reading.file("cams/teacher/0.npz"))
    for edited in ("data.json", "01_make.ipynb"):
        assert not (folder / edited).samefile(reading.file(edited))
    reuse(reading, "same", "data.num_val=3")
    assert capfd.readouterr().err.count("complete, skipped") == 2


def test_other_setting_runs_the_stages_that_read_it(reading, capfd):
    executed = list(reading.log)
    folder = reuse(reading, "other", "data.num_train=5")
    assert reading.log == [*executed, "02"]
    err = capfd.readouterr().err
    assert "01_make  taken over from tiny" in err
    assert "02_use  starts (tiny: data.num_train differs (2 | 5))" in err
    stages = json.loads((folder / "manifest.json").read_text())["stages"]
    assert stages["02_use"]["settings_read"] == {"data.num_train": 5} and "reused_from" not in stages["02_use"]


def test_from_takes_nothing_over(reading):
    executed = list(reading.log)
    reuse(reading, "anew", from_stage="02")
    assert reading.log == [*executed, "02"]


@pytest.mark.parametrize("links", [0, 2])
def test_killed_while_taking_over_then_run_again_is_complete(reading, links):
    script = f"""if True:
        import os, signal, sys
        from pathlib import Path
        sys.path[:0] = [{str(PROJECT_ROOT)!r}, {str(Path(__file__).parent)!r}]
        import test_runner
        link, made = os.link, []
        def killing(source, target):
            if len(made) == {links}:
                os.kill(os.getpid(), signal.SIGKILL)
            link(source, target)
            made.append(target)
        os.link = killing
        test_runner.reuse(test_runner.Chain(Path({str(reading.folder)!r})), "killed{links}")"""
    killed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    folder = reading.folder / "runs" / f"killed{links}"
    assert len(list(folder.glob(".partial-cams/teacher/*"))) == links and not (folder / "cams").exists()
    executed = list(reading.log)
    assert content(reuse(reading, folder.name)) == content(reading.file(""))
    assert reading.log == executed and not list(folder.rglob(".partial-*"))


def test_where_files_cannot_be_linked_they_are_copied(reading, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    folder = reuse(reading, "copied")
    assert content(folder) == content(reading.file(""))
    assert not (folder / "cams/teacher/0.npz").samefile(reading.file("cams/teacher/0.npz"))


def test_damaged_stage_is_taken_from_the_next_run(reading, capfd):
    damaged = reuse(reading, "damaged") / "result.txt"
    damaged.unlink()
    damaged.write_text("")
    folder = reuse(reading, "two", sources=["damaged", "tiny"])
    assert re.findall(r"^(\w+)  taken over from (\w+)$", capfd.readouterr().err, re.MULTILINE)[-2:] == [
        ("01_make", "damaged"),
        ("02_use", "tiny"),
    ]
    assert (folder / "result.txt").read_text() == "3"


@pytest.mark.parametrize(
    ("source", "message"), [("tiny", "tiny is the run itself"), ("tinny", "there is no run 'tinny'")]
)
def test_run_to_reuse_must_be_another_one(finished, source, message):
    with pytest.raises(RunError, match=message):
        finished.run(reuse=[source])


# interrupted


def test_failing_cell_is_told_with_how_to_resume(chain):
    chain.write("01_make", MAKE, "value = 1\nraise ValueError(f'value is {value}')")
    with pytest.raises(StageFailed) as error:
        chain.run()
    message = str(error.value)
    assert "01_make.ipynb failed in cell 4 of 4" in message
    assert "    value = 1\n" in message and "ValueError: value is 1" in message
    command = f"smaf run {chain.folder / 'tiny.yaml'} --name tiny --runs {chain.folder / 'runs'}"
    assert f"{command} --notebooks {chain.folder / 'notebooks'}" in message
    assert error.value.exit_code == 1
    assert entry(chain, "01_make")["status"] == "failed" and entry(chain, "01_make")["exit_code"] == 1
    assert chain.file("01_make.failed.ipynb").exists() and not chain.file("01_make.ipynb").exists()

    chain.write("01_make", MAKE)
    chain.run(until_stage="01")
    assert entry(chain, "01_make")["status"] == "complete"
    assert not chain.file("01_make.failed.ipynb").exists()


def test_settings_that_the_first_attempt_read_count_though_the_second_does_not_read_them(chain):
    lines = ["if not (run / 'cams').exists():", "(run / 'cams').mkdir()", READ.splitlines()[1], "1 / 0"]
    once = "\n    ".join(lines)
    chain.write("01_make", MAKE, READ.splitlines()[0], once)
    with pytest.raises(StageFailed, match="ZeroDivisionError"):
        chain.run()
    chain.run(until_stage="01")
    assert entry(chain, "01_make")["resumed"] and entry(chain, "01_make")["settings_read"] == {"data.num_train": 2}
    assert not list(chain.file("").glob("*.settings"))


def test_dead_kernel_and_missing_artifact_fail_the_stage(chain):
    chain.write("01_make", "import ctypes", "ctypes.string_at(0)")
    with pytest.raises(StageFailed, match=r"cell 4 of 4(.|\n)*the kernel died(.|\n)*Segmentation fault"):
        chain.run()
    chain.write("01_make", "pass")
    with pytest.raises(StageFailed, match=r"01_make ended without making data\.json"):
        chain.run()
    assert entry(chain, "01_make")["status"] == "failed"


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_killed_run_resumes(chain):
    name = "00_one_image_end_to_end"  # the command runs the real chain, whose first notebook this one replaces
    chain.write(name, SLOW)
    environment = os.environ | {"PYTHONPATH": str(PROJECT_ROOT)}
    process = subprocess.Popen(chain.command("--until", "0"), env=environment, stderr=subprocess.DEVNULL)
    wait_until(chain.file("cams/pid").exists)
    kernel = int(chain.file("cams/pid").read_text())
    process.kill()
    process.wait()
    assert entry(chain, name)["status"] == "running"

    chain.run(stages=(Stage(name, "?", outputs=("cams/**",)),))
    assert not exists(kernel)
    assert entry(chain, name)["status"] == "complete" and entry(chain, name)["resumed"]
    assert {"0.npz", "1.npz"} <= {path.name for path in chain.file("cams").iterdir()}


@pytest.mark.parametrize(("signum", "exit_code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_stopped_run_leaves_no_kernel(chain, signum, exit_code):
    if threading.current_thread() is not threading.main_thread():
        pytest.skip("signals reach the main thread only")
    chain.write("01_make", SLOW)

    def stop() -> None:
        wait_until(chain.file("cams/pid").exists)
        os.kill(os.getpid(), signum)

    helper = threading.Thread(target=stop)
    helper.start()
    with pytest.raises(RunStopped, match=r"01_make was stopped by SIG\w+(.|\n)*smaf run") as error:
        chain.run()
    helper.join()
    assert error.value.exit_code == exit_code
    assert entry(chain, "01_make")["status"] == "failed" and entry(chain, "01_make")["exit_code"] == exit_code
    assert not exists(int(chain.file("cams/pid").read_text()))


# refused before any kernel starts


def test_second_runner_is_kept_out(finished):
    with (
        locked(finished.file(""), "smaf"),
        pytest.raises(RunError, match=r"another smaf run is running in .*tiny; wait"),
    ):
        finished.run(from_stage="01")
    assert finished.log == ["01", "02"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"from_stage": "03"}, "no stage '03'"),
        ({"until_stage": "maek"}, "did you mean 01_make"),
        ({"from_stage": "use", "until_stage": "make"}, "nothing would run"),
    ],
)
def test_wrong_stage_is_refused(chain, options, message):
    with pytest.raises(RunError, match=message):
        chain.run(**options)
    assert not chain.file("").exists()


def test_notebook_must_know_the_parameters(chain):
    chain.write("02_use", USE, parameters="config_file = ''\nrun_dir: str = ''")
    with pytest.raises(RunError, match=r"02_use\.ipynb does not take overrides"):
        chain.run()
    chain.write("02_use", USE, parameters="config_file = ")
    with pytest.raises(RunError, match="not valid Python"):
        chain.run()
    (chain.folder / "notebooks" / "02_use.ipynb").unlink()
    with pytest.raises(RunError, match=r"02_use\.ipynb is missing"):
        chain.run()
    assert not chain.file("").exists()


def test_settings_are_checked_first(finished):
    settings = finished.folder / "tiny.yaml"
    settings.write_text(settings.read_text() + "seed: banana\n")
    with pytest.raises(ConfigError, match="seed"):
        finished.run()
    settings.write_text(settings.read_text().replace("banana", "7"))
    with pytest.raises(RunMismatch, match="seed: 0 | 7"):
        finished.run()
    assert finished.log == ["01", "02"]


@pytest.mark.parametrize("name", ["../elsewhere", ".hidden", "a b", "", "..", "/tmp/x", "n" * 101])
def test_run_name_is_a_plain_folder_name(chain, name):
    folders = {"notebooks": chain.folder / "notebooks", "runs": chain.folder / "runs"}
    with pytest.raises(RunError, match="plain folder name"):
        run_notebooks(chain.folder / "tiny.yaml", name, **folders, stages=CHAIN)

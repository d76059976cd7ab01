"""The spare kernel: ready when it is needed, gone when it is not."""

from __future__ import annotations

import json
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import nbformat
import papermill
import pytest
from jupyter_client.blocking import BlockingKernelClient
from jupyter_client.connect import write_connection_file
from nbformat.v4 import new_code_cell, new_notebook

from smaflib.runs.kernel import SpareKernel
from smaflib.runs.progress import KERNEL_ENVIRONMENT, KernelFolder, NotebookMonitor

pytestmark = pytest.mark.skipif(os.name != "posix", reason="spare kernels are for systems with process groups")


@pytest.fixture
def spare() -> Iterator[SpareKernel]:
    with SpareKernel(KERNEL_ENVIRONMENT) as spare:
        yield spare


def execute(monitor: NotebookMonitor, cells: list[Any], path: Path) -> Any:
    """Run a notebook of these cells as the runner does."""
    nbformat.write(new_notebook(cells=cells), path)
    options = {"kernel_manager_class": monitor.kernel_manager_class(), "kernel_name": "python3", "language": "python"}
    return papermill.execute_notebook(path, None, progress_bar=False, **options)


@pytest.fixture
def temporary(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A temporary folder of this test alone, with a short path: those of pytest are near the limit of sockets."""
    short = Path(tempfile.mkdtemp(dir="/tmp", prefix="t"))
    monkeypatch.setattr(tempfile, "tempdir", str(short))
    yield short
    shutil.rmtree(short)


def test_folders_of_killed_runners_go_and_those_of_living_ones_stay(temporary: Path) -> None:
    living = KernelFolder()
    abandoned, foreign = temporary / "smaf-dead", temporary / "smaf-notes"
    for folder in (abandoned, foreign):
        folder.mkdir()
        (folder / "kernel-ipc-1").touch()
    (abandoned / "lock").touch()
    other = KernelFolder()
    assert living.path.is_dir() and other.path.is_dir() and foreign.is_dir() and not abandoned.exists()
    living.remove()
    other.remove()
    assert [path.name for path in temporary.iterdir()] == ["smaf-notes"]


def test_folder_of_a_long_path_is_no_place_for_sockets(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = temporary / ("x" * 80)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    folder = KernelFolder()
    assert folder.path.parent == Path("/tmp")
    folder.remove()
    assert not folder.path.exists()


def test_what_a_kernel_leaves_in_temporary_folders_goes_with_it(spare: SpareKernel, tmp_path: Path) -> None:
    """As worker processes do, which are killed with their kernel; the spare process has imported what asks for it."""
    spare.prepare("v1")
    cells = [new_code_cell("import tempfile\nprint(tempfile.mkdtemp(prefix='pymp-'))")]
    with NotebookMonitor("leaves", 1, lambda pid: None, partial(spare.become_kernel, "v1")) as monitor:
        executed = execute(monitor, cells, tmp_path / "leaves.ipynb")
    made = Path(executed.cells[-1].outputs[0].text.strip())
    assert made.parent == monitor._folder and not made.exists()


def ended(pid: int, seconds: float = 20) -> bool:
    """Whether a process that is no child of this one any more, or was waited for, is gone soon."""
    for _ in range(int(seconds * 10)):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.1)
    return False


def wait_until_it_answers(client: BlockingKernelClient) -> None:
    for _ in range(10):  # a client without a manager takes a kernel that does not answer yet for a dead one
        try:
            client.wait_for_ready(timeout=5)
            return
        except RuntimeError:
            time.sleep(1)
    raise TimeoutError("the kernel does not answer")


def test_spare_process_becomes_the_kernel_it_is_told_to_be(spare: SpareKernel, tmp_path: Path) -> None:
    spare.prepare("v1")
    connection_file, _ = write_connection_file(
        str(tmp_path / "kernel.json"), ip=str(tmp_path / "s"), transport="ipc", key=b"k"
    )
    env = (
        dict(os.environ) | KERNEL_ENVIRONMENT | {"SMAF_PROGRESS_FILE": "here", "IPYTHONDIR": str(tmp_path / "ipython")}
    )
    process = spare.become_kernel("v1", ["-f", connection_file], env, str(tmp_path), str(tmp_path / "log"))
    assert process is not None
    client = BlockingKernelClient(connection_file=connection_file)
    client.load_connection_file()
    client.start_channels()
    try:
        wait_until_it_answers(client)
        code = "import json, os, sys; state = [os.getcwd(), os.environ['SMAF_PROGRESS_FILE'], 'torch' in sys.modules];"
        code += "json.dump(state, open('said.json', 'w'))"
        reply = client.execute_interactive(code, timeout=60, output_hook=lambda message: None)
        assert reply["content"]["status"] == "ok"
        assert json.loads((tmp_path / "said.json").read_text()) == [str(tmp_path), "here", True]
    finally:
        client.stop_channels()
        os.killpg(process.pid, signal.SIGKILL)  # a group of its own, as the runner kills it
        process.wait()
    assert spare.become_kernel("v1", [], {}, "", "") is None  # used up


def test_notebook_runs_in_the_spare_process(spare: SpareKernel, tmp_path: Path) -> None:
    cells = [new_code_cell("import os, sys\nprint(os.getpid(), 'torch' in sys.modules)")]
    spare.prepare("v1")
    assert spare._process is not None
    pids = [spare._process.pid]
    with NotebookMonitor("pid", 1, pids.append, partial(spare.become_kernel, "v1")) as monitor:
        executed = execute(monitor, cells, tmp_path / "pid.ipynb")
    assert executed.cells[-1].outputs[0].text == f"{pids[0]} True\n"
    assert pids == [pids[0]] * 2 and ended(pids[0])


def test_spare_of_other_code_is_not_used(spare: SpareKernel) -> None:
    spare.prepare("v1")
    first = spare._process
    assert first is not None
    assert spare.become_kernel("v2", [], {}, "", "") is None and first.poll() is not None
    spare.prepare("v1")
    second = spare._process
    spare.prepare("v1")
    assert spare._process is second
    spare.prepare("v2")
    assert second is not None and second.poll() is not None and spare._process is not second


def test_spare_that_died_is_not_used(spare: SpareKernel) -> None:
    spare.prepare("v1")
    assert spare._process is not None
    spare._process.kill()
    spare._process.wait()
    assert spare.become_kernel("v1", [], {}, "", "") is None


def test_spare_goes_with_the_one_who_made_it() -> None:
    with SpareKernel(KERNEL_ENVIRONMENT) as spare:
        spare.prepare("v1")
        assert spare._process is not None
        pid = spare._process.pid
    assert ended(pid)
    spare.prepare("v1")
    process = spare._process
    assert process is not None and process.stdin is not None
    process.stdin.close()  # what the spare process sees when its maker is killed
    assert process.wait(timeout=60) == 0

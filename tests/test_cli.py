import json
import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
from click.testing import Result
from typer.testing import CliRunner

from smaflib.apps.cli import app
from smaflib.errors import ConfigError, RunError
from smaflib.files import PROJECT_ROOT
from smaflib.runs import Run, open_run, runner
from smaflib.runs.manifest import write_manifest


@pytest.fixture
def run(tmp_path: Path, config_file: Path) -> Run:
    run = open_run(tmp_path / "runs" / "first", config_file)
    run.record("03", [{"variant": "fused", "metric": "iou", "value": 0.646}])
    return run


def smaf(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_run_passes_its_options_on(monkeypatch, config_file, tmp_path):
    given = []
    monkeypatch.setattr(runner, "run_notebooks", lambda *arguments: given.extend(arguments))
    monkeypatch.chdir(tmp_path)
    words = "run tiny.yaml --name n --set seed=1 --set data.num_val=3 --until 4 --runs r --notebooks nb"
    result = smaf(*words.split(), "--reuse", "m", "--keep-stale")
    assert result.exit_code == 0
    overrides = ["seed=1", "data.num_val=3"]
    assert given == [config_file, "n", overrides, "4", tmp_path / "nb", tmp_path / "r", ["m"], True]


def test_home_is_replaced_where_a_shell_leaves_it(monkeypatch, config_file, tmp_path):
    given = []
    monkeypatch.setattr(runner, "run_notebooks", lambda *arguments: given.extend(arguments))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert smaf("run", "~/tiny.yaml", "--runs=~/r", "--notebooks", "$HOME/nb", "--set=data.root=~/x").exit_code == 0
    assert given[0] == config_file and given[4:6] == [tmp_path / "nb", tmp_path / "r"]
    assert given[2] == ["data.root=~/x"]  # a setting, which is replaced where it is read


@pytest.mark.parametrize(
    ("error", "exit_code"),
    [
        (RunError("02_classifier.ipynb failed in cell 3", exit_code=1), 1),
        (RunError("02_classifier was stopped", exit_code=143), 143),
        (PermissionError(13, "Permission denied", "a.npz"), 2),
        (KeyboardInterrupt(), 130),
    ],
)
def test_known_errors_are_one_message(monkeypatch, config_file, error, exit_code):
    monkeypatch.setattr(runner, "run_notebooks", Mock(side_effect=error))
    result = smaf("run", config_file)
    assert result.exit_code == exit_code
    assert str(error) in result.stderr and "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "nowhere.yaml"], "there is no config file"),
        (["run", "tiny.yaml", "--set", "classifier.iteration=5"], "did you mean classifier.iterations"),
        (["run", "tiny.yaml", "--set", "classifier.learning_rate=banana"], "classifier.learning_rate"),
        (["run", "tiny.yaml", "--until", "clasifier"], "there is no stage 'clasifier'"),
        (["run", "tiny.yaml", "--notebooks", "empty"], "00_one_image_end_to_end.ipynb"),
        (["status", "nowhere"], "no run 'nowhere'"),
        (["compare", "one", "two", "--measure", "huge"], "'small', 'medium', 'large'"),
    ],
)
def test_bad_input_exits_with_2(monkeypatch, config_file, arguments, message):
    monkeypatch.chdir(config_file.parent)
    more = ["--runs", "runs"] if arguments[0] == "run" else []
    result = smaf(*arguments, *more)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.replace("│", " ").split())
    assert not (config_file.parent / "runs").exists()


def test_debug_shows_the_traceback_and_faults_always_do(monkeypatch, config_file):
    monkeypatch.setattr(runner, "run_notebooks", Mock(side_effect=ConfigError("no such setting")))
    result = smaf("run", config_file)
    assert result.exit_code == 2 and result.stderr == "error: no such setting\n"
    assert isinstance(smaf("--debug", "run", config_file).exception, ConfigError)
    monkeypatch.setattr(runner, "run_notebooks", Mock(side_effect=ValueError("a fault")))
    assert isinstance(smaf("run", config_file).exception, ValueError)


@pytest.mark.parametrize("content", [b"[]", b"\xff\xfe\x00", b'{"stages": {"01_data": {"status"'])
@pytest.mark.parametrize("name", ["manifest.json", "metrics.json", "config.yaml"])
@pytest.mark.parametrize("command", ["status", "compare"])
def test_damaged_file_of_a_run_is_named(run, name, content, command):
    write_manifest(run.folder, {"stages": {"01_data": {"status": "complete", "seconds": 1.0}}})
    run.path(name).write_bytes(content)
    result = smaf(command, run.folder, *([run.folder] if command == "compare" else []))
    assert result.exit_code in (0, 2), result.exception  # 0: the command does not need the file, or it fits after all
    assert "Traceback" not in result.output and len(result.stderr) < 3000
    if result.exit_code:
        assert result.stderr.startswith("error: ") and (name in result.stderr or "no run" in result.stderr)


def test_status_lists_all_stages(run):
    entry = {"status": "complete", "seconds": 61.2}
    taken = entry | {"reused_from": "papermill_runs/x"}
    write_manifest(run.folder, {"stages": {"01_data": entry, "02_classifier": taken}})
    lines = smaf("status", run.folder).stdout.splitlines()
    assert len(lines) == len(run.stages)
    assert lines[0].split() == ["00_one_image_end_to_end", "not", "run", "-"]
    assert lines[1].split() == ["01_data", "complete", "1", "min", "01", "s"]
    assert lines[2].endswith("1 min 01 s  reused from papermill_runs/x")


def test_a_students_copy_holds_no_solution(tmp_path):
    for folder, options in (("all", []), ("student", ["--student"])):
        assert smaf("lab", tmp_path / folder, "--no-start", *options).exit_code == 0
    for copy in (tmp_path / "student").glob("*.ipynb"):
        cells = json.loads(copy.read_text())["cells"]
        complete = json.loads((tmp_path / "all" / copy.name).read_text())["cells"]
        assert cells == [cell for cell in complete if cell["metadata"].get("tags") != ["solution"]]
        assert "with solution()" not in copy.read_text()
    assert len(cells) and sum("with solution()" in path.read_text() for path in (tmp_path / "all").iterdir()) == 10


def test_help_needs_no_torch():
    code = "import sys; from smaflib.apps.cli import app; print({'torch', 'pandas', 'papermill'} & set(sys.modules))"
    environment = os.environ | {"PYTHONPATH": str(PROJECT_ROOT)}
    command = [sys.executable, "-c", code]
    assert subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout == "set()\n"

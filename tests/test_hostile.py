"""Names of runs on the command line that are refused: one message, exit code 1 or 2, and nothing written.

Settings are in test_config.py, weights in test_weights.py, tables of labels and pictures in test_data_*.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from smaflib.apps.cli import app


def tree(folder: Path) -> dict[str, bytes]:
    paths = sorted(folder.rglob("*"))
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b"" for path in paths}


def refused(folder: Path, *words: object, naming: object) -> None:
    """Call a command that must refuse its input."""
    before = tree(folder)
    result: Result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code in (1, 2) and isinstance(result.exception, SystemExit), result.exception
    assert "Traceback" not in result.output and len(result.output) < 2600
    assert str(naming) in "".join(result.output.split("\n")), result.output  # typer wraps its own messages
    assert tree(folder) == before


@pytest.mark.parametrize(
    "name", ["..", "", "../escaped", "/tmp/escaped", "a\\b", "x" * 300, "a\nb", "a\x1b[31m"], ids=repr
)
def test_names_that_lead_out_of_the_folder_of_runs(tmp_path: Path, name: str) -> None:
    words = ("run", "configs/mini.yaml", "--runs", tmp_path / "runs", f"--name={name}")
    refused(tmp_path, *words, naming="must be a plain folder name")

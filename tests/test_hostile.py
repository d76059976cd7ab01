"""Bad input on the command line: one message that names it, exit code 1 or 2, and nothing written.

Settings are in test_config.py, weights in test_weights.py, tables of labels and pictures in test_data_*.py.
"""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from click.testing import Result
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner

from smaflib.apps.cli import app
from smaflib.data.labels import read_label_rows
from smaflib.errors import DataError


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


@pytest.mark.parametrize("command", ["status", "report"])
@pytest.mark.parametrize("name", ["nothing", "x" * 5000, "a\0b"], ids=lambda name: repr(name)[:12])
def test_runs_that_do_not_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    refused(tmp_path, command, name, "--runs", tmp_path, naming="error")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in ("a.png", "b.png"):
        Image.new("RGB", (40, 30), "red").save(folder / name)
    return folder


@pytest.mark.parametrize(
    ("content", "naming"),
    [
        (b"image,labels\na.png,\n", "line 2"),
        (b"image,labels\nmissing.png,cat\n", "missing.png"),
        (b"image,labels\n../photos/a.png,cat\n", "../photos/a.png"),
        (b"image,labels\na.png," + b";".join(b"c%d" % n for n in range(300)) + b"\n", "300 classes"),
        (b"PK\x03\x04" + bytes(100), "labels.csv"),
    ],
)
def test_tables_of_labels(photos: Path, tmp_path: Path, content: bytes, naming: str) -> None:
    table = tmp_path / "labels.csv"
    table.write_bytes(content)
    words = ("masks", "--images", photos, "--labels", table, "--out", tmp_path / "out", "--backbone", "slim")
    refused(tmp_path, *words, "--set", "model.weights=null", naming=naming)


def encoded(picture: Image.Image, kind: str) -> bytes:
    content = io.BytesIO()
    picture.save(content, kind)
    return content.getvalue()


PICTURES = {
    "text": b"dear sir",
    "gif": encoded(Image.new("RGB", (40, 30)), "GIF"),
    "cut jpeg": encoded(Image.new("RGB", (40, 30)), "JPEG")[:200],
    "huge": encoded(Image.new("1", (13_000, 13_000)), "PNG"),
}


@pytest.mark.parametrize("kind", PICTURES)
def test_photos(photos: Path, tmp_path: Path, kind: str) -> None:
    (photos / "b.png").write_bytes(PICTURES[kind])
    (tmp_path / "labels.csv").write_text("image,labels\nb.png,cat\na.png,dog\n")
    settings = (f"--set=data.images={photos}", f"--set=data.labels={tmp_path / 'labels.csv'}")
    refused(tmp_path, "data", "check", "configs/custom.yaml", *settings, naming="b.png")


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=200) | st.text(max_size=200).map(lambda text: b"image,labels\n" + text.encode()))
def test_any_bytes_are_a_table_or_an_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "labels.csv"
    path.write_bytes(content)
    try:
        rows = read_label_rows(path)
    except DataError as error:
        assert str(path) in str(error)
    else:
        assert rows and all(row.image and row.labels for row in rows.values())

"""Files are complete or absent."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from smaflib.errors import RunError
from smaflib.files import (
    PARTIAL,
    PROJECT_ROOT,
    find_config,
    locked,
    read_json,
    replacing,
    shown_path,
    write_json,
    write_text,
)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_failing_block_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with pytest.raises(RuntimeError, match="killed"), replacing(path) as temporary:
        temporary.write_text("half of the ne")
        assert temporary.name.startswith(PARTIAL) and temporary.suffix == ".txt"
        raise RuntimeError("killed")
    assert path.read_text() == "old" and names(tmp_path) == ["a.txt"]


def test_a_finished_block_replaces_the_file_and_creates_folders(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "er" / ("n" * 251 + ".txt")
    for text in ("one", "two"):
        write_text(path, text)
        assert path.read_text() == text
    assert names(path.parent) == [path.name]


def test_permissions_are_those_of_the_user(tmp_path: Path) -> None:
    umask = os.umask(0o027)
    try:
        write_text(tmp_path / "a", "")
    finally:
        os.umask(umask)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640


def test_json_round_trip_without_nan(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"b": [1, 2.5, None], "a": "ä"})
    assert json.loads(path.read_text(encoding="utf-8")) == read_json(path, {}) == {"b": [1, 2.5, None], "a": "ä"}
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(path, {"x": float("nan")})
    assert read_json(tmp_path / "absent.json", {"x": 1}) == {"x": 1}


def test_damaged_json_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(RunError, match=r"(?s)a\.json is damaged; delete it.*property name"):
        read_json(tmp_path / "a.json", {})


def test_lock_keeps_others_out_and_is_free_afterwards(tmp_path: Path) -> None:
    for _ in range(2):
        with (
            locked(tmp_path, "smaf run"),
            pytest.raises(RunError, match="another smaf masks is running in .*; wait for it"),
            locked(tmp_path, "smaf masks"),
        ):
            pytest.fail("two at once")


def test_paths_in_output_and_configs_are_found_from_where_one_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in (PROJECT_ROOT, PROJECT_ROOT / "configs", Path("/")):
        monkeypatch.chdir(folder)
        preset = PROJECT_ROOT / "configs" / "mini.yaml"
        assert Path(shown_path(preset)).resolve() == preset
        for given in ("mini", "configs/mini.yaml", str(preset)):
            assert find_config(Path(given)).resolve() == preset
        assert find_config(Path("gone.yaml")) == folder / "gone.yaml"  # the message names what was meant

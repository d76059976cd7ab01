"""Files are whole or not there."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from smaflib import files
from smaflib.errors import RunError
from smaflib.files import (
    copy_folder,
    duration,
    file_hash,
    load_arrays,
    names_there,
    replacing,
    save_arrays,
    save_image,
    tree_hash,
    walk,
    write_json,
    write_text,
)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_block_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with pytest.raises(RuntimeError, match="killed"), replacing(path) as temporary:
        temporary.write_text("half of the ne")
        raise RuntimeError("killed")
    assert path.read_text() == "old" and names(tmp_path) == ["a.txt"]


def test_block_that_ends_replaces_the_file_and_makes_folders(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "er" / "a.txt"
    for text in ("one", "two"):
        with replacing(path) as temporary:
            temporary.write_text(text)
            assert temporary.parent == path.parent and temporary.suffix == ".txt"
        assert path.read_text() == text
    assert names(path.parent) == ["a.txt"]
    plain = tmp_path / "plain"
    plain.touch()
    assert path.stat().st_mode == plain.stat().st_mode  # others may read a run where they may read files at all


@pytest.mark.parametrize("umask", ["022", "027", "077"])
def test_rights_are_those_that_the_user_gives_to_files(tmp_path: Path, umask: str) -> None:
    code = (
        f"from smaflib.files import write_text; from pathlib import Path; write_text(Path({str(tmp_path / 'a')!r}), '')"
    )
    subprocess.run(["sh", "-c", f'umask {umask}; exec "$0" -c "$1"', sys.executable, code], check=True)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o666 & ~int(umask, 8)


def test_names_of_any_length_that_a_file_may_have(tmp_path: Path) -> None:
    for name in ("n" * 251 + ".png", "\u00e9" * 120 + ".png"):
        write_text(tmp_path / name, "whole")
        assert (tmp_path / name).read_text() == "whole"


def test_json_round_trip_and_nan_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"b": [1, 2.5, None], "a": "ä"})
    assert json.loads(path.read_text(encoding="utf-8")) == {"b": [1, 2.5, None], "a": "ä"}
    assert path.read_text(encoding="utf-8").endswith("}\n")
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(path, {"x": float("nan")})
    assert json.loads(path.read_text(encoding="utf-8"))["a"] == "ä"


def test_arrays_round_trip_exactly(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    arrays = {"half": np.array([0.1, 2], np.float16), "size": np.array((3, 4)), "empty": np.zeros((0, 2))}
    save_arrays(path, **arrays)
    again = load_arrays(path)
    assert again.keys() == arrays.keys()
    for name, array in arrays.items():
        assert again[name].dtype == array.dtype and np.array_equal(again[name], array)
    assert names(tmp_path) == ["a.npz"]


def test_pickles_are_neither_written_nor_read(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    with pytest.raises(ValueError, match="allow_pickle=False"):
        save_arrays(path, a=np.array([{}], dtype=object))
    assert not path.exists()
    np.savez(path, a=np.array([{}], dtype=object))
    with pytest.raises(ValueError, match="allow_pickle=False"):
        load_arrays(path)


def test_image_round_trip(tmp_path: Path) -> None:
    pixels = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    save_image(tmp_path / "a.png", Image.fromarray(pixels))
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.format == "PNG" and np.array_equal(np.array(picture), pixels)


def test_file_hash_is_sha256(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert file_hash(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_walk_finds_every_file_below_a_folder(tmp_path: Path) -> None:
    for name in ("a.png", "inner/b.png", "inner/deep/c.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"12")
    (tmp_path / "link").symlink_to(tmp_path / "inner")  # a folder elsewhere, or this one again
    (tmp_path / "file").symlink_to(tmp_path / "a.png")
    found = {Path(entry.path).relative_to(tmp_path).as_posix(): entry.stat().st_size for entry in walk(tmp_path)}
    assert found == {"a.png": 2, "inner/b.png": 2, "inner/deep/c.png": 2, "file": 2}
    assert list(walk(tmp_path / "nowhere")) == []


def test_folder_is_copied_by_links_and_replaces_what_a_killed_copy_left(tmp_path: Path) -> None:
    for name in ("a.npz", "inner/b.npz", "facts.json"):
        (tmp_path / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "source" / name).write_text(name)
    left = tmp_path / "runs" / f"{files.PARTIAL}target"
    left.mkdir(parents=True)
    (left / "half").touch()
    target = tmp_path / "runs" / "target"
    copy_folder(tmp_path / "source", target, (".json",))
    made = {path.relative_to(target).as_posix(): path for path in target.rglob("*.*")}
    assert {name: path.read_text() for name, path in made.items()} == {name: name for name in made} and len(made) == 3
    linked = {name for name, path in made.items() if path.samefile(tmp_path / "source" / name)}
    assert linked == {"a.npz", "inner/b.npz"} and not left.exists()


@pytest.mark.parametrize("few", [0, 10])
def test_names_of_files_that_are_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, few: int) -> None:
    """Asked for one by one, and of a listing."""
    monkeypatch.setattr(files, "FEW", few)
    for name in ("a.png", "b.png"):
        (tmp_path / name).touch()
    (tmp_path / "c.png").mkdir()
    assert names_there(tmp_path, ["a.png", "c.png", "d.png"]) == {"a.png"}
    assert names_there(tmp_path, []) == set()
    assert names_there(tmp_path / "nowhere", ["a.png"]) == set()


def test_tree_hash_depends_on_names_and_contents_and_not_on_order_or_place(tmp_path: Path) -> None:
    roots = [tmp_path / "one", tmp_path / "two"]
    for root in roots:
        write_text(root / "x" / "a", "1")
        write_text(root / "b", "2")
    lists = [[root / "x" / "a", root / "b"] for root in roots]
    first = tree_hash(lists[0], roots[0])
    assert first == tree_hash(lists[1][::-1], roots[1])
    inner = [hashlib.sha256(text).hexdigest() for text in (b"2", b"1")]
    assert first == hashlib.sha256(f"b\0{inner[0]}\nx/a\0{inner[1]}\n".encode()).hexdigest()

    write_text(roots[1] / "b", "3")
    assert first != tree_hash(lists[1], roots[1])
    (roots[0] / "b").rename(roots[0] / "c")
    assert first != tree_hash([roots[0] / "x" / "a", roots[0] / "c"], roots[0])


def test_tree_hash_takes_a_folder_before_its_neighbours_names(tmp_path: Path) -> None:
    """The order of paths, which manifests were written with: x/a before x-y, though "-" comes before "/"."""
    for name in ("x-y", "x/a"):
        write_text(tmp_path / name, name)
    lines = (f"{name}\0{hashlib.sha256(name.encode()).hexdigest()}\n" for name in ("x/a", "x-y"))
    expected = hashlib.sha256("".join(lines).encode()).hexdigest()
    assert tree_hash([tmp_path / "x-y", tmp_path / "x" / "a"], tmp_path) == expected


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "-"), (0.4, "0 s"), (58, "58 s"), (59.6, "1 min 00 s"), (185, "3 min 05 s"), (8040, "2 h 14 min")],
)
def test_seconds_are_printed_as_people_say_them(seconds: float | None, text: str) -> None:
    assert duration(seconds) == text


# --- locks ------------------------------------------------------------------------------------------------------------


def test_lock_says_who_holds_it_and_is_free_afterwards(tmp_path: Path) -> None:
    with files.locked(tmp_path, "smaf run"):
        held = (
            r"another smaf masks is at work in .* \(process \d+ on .+ since \d{4}-\d\d-\d\d .+\); wait for it, stop it"
        )
        with pytest.raises(RunError, match=held), files.locked(tmp_path, "smaf masks"):
            pytest.fail("two at once")
    with files.locked(tmp_path, "smaf masks"):
        pass
    assert {path.name for path in tmp_path.iterdir()} <= {".lock"}


@pytest.mark.parametrize("note", [None, "", "[]", '{"process": {}}', '{"process": 7}'])
def test_lock_without_a_readable_note_is_held_all_the_same(tmp_path: Path, note: str | None) -> None:
    with files.locked(tmp_path, "smaf run"):
        holder = tmp_path / ".lock-holder.json"
        holder.unlink()
        if note is not None:
            holder.write_text(note)
        with pytest.raises(RunError, match=r"is at work in [^(]*; wait"), files.locked(tmp_path, "smaf run"):
            pytest.fail("two at once")


def test_lock_of_another_machine_is_explained(tmp_path: Path) -> None:
    note = {"process": 7, "host": "node-of-yesterday", "since": "2026-11-26 08:00:00"}
    with files.locked(tmp_path, "smaf run"):
        files.write_json(tmp_path / ".lock-holder.json", note)
        with pytest.raises(RunError, match=r"node-of-yesterday .* If that machine is gone.*delete .*\.lock"):
            files.locked(tmp_path, "smaf run").__enter__()


def test_file_system_without_locks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise NotImplementedError("no flock")

    monkeypatch.setattr("filelock.FileLock.acquire", refuse)
    with pytest.raises(RunError, match="has no locks"), files.locked(tmp_path, "smaf run"):
        pytest.fail("not locked")


# --- power cuts -------------------------------------------------------------------------------------------------------


def test_bytes_are_on_the_disk_before_the_name_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    fsync, replace = os.fsync, os.replace

    def noted_fsync(descriptor: int) -> None:
        events.append(f"flush {Path(os.readlink(f'/proc/self/fd/{descriptor}')).name}")
        fsync(descriptor)

    def noted_replace(source: Path, target: Path) -> None:
        events.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    files.write_text(tmp_path / "a.txt", "text")
    assert events[0].startswith(f"flush {files.PARTIAL}") and events[1:] == ["rename", f"flush {tmp_path.name}"]


def test_full_disk_at_the_last_moment_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    files.write_text(path, "old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        files.write_text(path, "new")
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["a.txt"]

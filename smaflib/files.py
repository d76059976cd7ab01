"""Files that are either whole or not there: everything is written under a temporary name and then renamed.

Before the rename the file's bytes are on the disk, and after it the folder's list of names is, so that a power cut
leaves no name without its bytes. That costs a few milliseconds a file.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import platform
import shutil
import site
import sys
import tempfile
import time
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from smaflib.errors import RunError

HOME = "SMAF_HOME"
"""Environment variable: where relative paths begin for an installed package; its kernels stand in other folders."""


def _checkout() -> Path | None:
    root = Path(__file__).resolve().parents[1]
    return root if (root / "configs").is_dir() and (root / "notebooks").is_dir() else None


def _shipped() -> Path | None:
    prefixes = (Path(sys.prefix), Path(site.getuserbase()), Path(__file__).resolve().parents[1])
    found = (prefix / "share" / "smaflib" for prefix in prefixes)
    return next((folder for folder in found if (folder / "configs").is_dir()), None)


_CHECKOUT = _checkout()
IS_CHECKOUT = _CHECKOUT is not None

PROJECT_ROOT = _CHECKOUT or Path(os.environ.get(HOME) or Path.cwd()).resolve()
"""The checkout; of an installed package, the folder that a command was called in. Relative paths in notebooks, settings
and manifests are relative to it."""

SHIPPED = _CHECKOUT or _shipped() or PROJECT_ROOT
"""Holds ``configs`` and ``notebooks`` as they came with the package."""

RUNS_FOLDER = PROJECT_ROOT / "papermill_runs"

UMASK = os.umask(0o077)
"""Rights that this user keeps from others; asking for them means setting them."""
os.umask(UMASK)

PARTIAL = ".partial-"
"""How the name of a file begins that is being written, or that a killed process left."""


def absolute(path: str | Path) -> Path:
    """A path; a relative one is relative to :data:`PROJECT_ROOT`, or to :data:`SHIPPED` where only that has it."""
    found = Path(os.path.normpath(PROJECT_ROOT / path))
    shipped = Path(os.path.normpath(SHIPPED / path))
    return shipped if not found.exists() and shipped.exists() else found


def find_config(config: Path) -> Path:
    """A config file by its path, from here or from the checkout, or one that came with the package by its name."""
    if config.exists():
        return config.absolute()
    named = SHIPPED / "configs" / f"{config}.yaml"
    return named if config.name == str(config) and named.is_file() else config


def is_plain_name(name: str) -> bool:
    """Whether a name from outside may become part of a path: it stays in its folder and every system takes it."""
    parts = name in ("", ".", "..") or any(character in name for character in "/\\\0")
    return not parts and name.isprintable() and len(name.encode()) <= 200


def python_path() -> str:
    """``PYTHONPATH`` of processes that must import the library that starts them, wherever another one is installed."""
    return os.pathsep.join(filter(None, [str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH")]))


def display_path(path: Path) -> str:
    """A path as it is printed and recorded: relative to the checkout where it lies inside."""
    return str(path.relative_to(PROJECT_ROOT)) if path.is_relative_to(PROJECT_ROOT) else str(path)


def duration(seconds: float | None) -> str:
    """A time as it is printed: ``"58 s"``, ``"3 min 05 s"`` or ``"2 h 14 min"``."""
    if seconds is None:
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    hours, left = divmod(minutes, 60)
    if hours:
        return f"{hours} h {left:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path`` that takes its place when the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    stem = path.stem.encode()[:100].decode(errors="ignore")  # a file's name has 255 bytes at most, and this adds to it
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f"{PARTIAL}{stem}-", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        _flush(temporary)
        # mkstemp makes files that only their owner reads; a run folder is shared as its owner's other files are.
        temporary.chmod(0o666 & ~UMASK)
        os.replace(temporary, path)
        _flush(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    """Wait until a file's bytes, or a folder's names, are on the disk; file systems that cannot are not waited for."""
    if os.name == "nt" and path.is_dir():
        return  # Windows opens no folders
    descriptor = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EROFS):  # a full disk is no such case
            raise
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write text, all or nothing."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write JSON, all or nothing. NaN is refused: it is not JSON."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def save_arrays(path: Path, **arrays: np.ndarray) -> None:
    """Write a compressed ``.npz`` without pickles, all or nothing."""
    with replacing(path) as temporary:
        np.savez_compressed(temporary, allow_pickle=False, **arrays)


def load_arrays(path: Path, names: Collection[str] | None = None) -> dict[str, np.ndarray]:
    """Read a ``.npz``, whole or some of its arrays; pickled content is refused by numpy."""
    # np.load leaves a file that it opened itself open when it turns out to be damaged.
    with path.open("rb") as handle, np.load(handle, allow_pickle=False) as arrays:
        return {name: arrays[name] for name in (arrays.files if names is None else names)}


def save_image(path: Path, image: Image.Image) -> None:
    """Write a picture, all or nothing; the ending chooses the format."""
    with replacing(path) as temporary:
        image.save(temporary)


def copy_file(source: Path, target: Path) -> None:
    """Copy a file, all or nothing, by a hard link where the file system has them.

    A link is safe because nothing in this project is written in place.
    """
    with replacing(target) as temporary:
        temporary.unlink()
        if not _link(source, temporary):
            shutil.copyfile(source, temporary)


def _link(source: Path, target: Path) -> bool:
    """Give a file a second name, which must be free; False on another file system, or one without links."""
    try:
        os.link(source, target)
    except FileExistsError:
        raise
    except OSError:
        return False
    return True


def copy_folder(source: Path, target: Path, copied: Collection[str] = ()) -> None:
    """Copy a folder to a place where none is, all or nothing, by hard links where the file system has them.

    The links get their names under a temporary one of the folder, and only folders are waited for: links that are
    waited for one by one take long. A killed process leaves the temporary folder, which the next copy replaces.

    Args:
        source: the folder.
        target: must not exist.
        copied: endings of files that are copied all the same.
    """
    temporary = target.with_name(f"{PARTIAL}{target.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    folders = {temporary}
    for entry in walk(source):
        place = temporary / Path(entry.path).relative_to(source)
        if place.parent not in folders:
            place.parent.mkdir(parents=True, exist_ok=True)
            folders.add(place.parent)
        if place.suffix in copied or not _link(Path(entry.path), place):
            with replacing(place) as half:
                shutil.copyfile(entry.path, half)
    for folder in folders:
        _flush(folder)
    os.replace(temporary, target)
    _flush(target.parent)


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def walk(folder: Path | str) -> Iterator[os.DirEntry[str]]:
    """The files below a folder, in the order of the file system, one after the other: there may be a million of them.

    An entry knows its name and that it is a file; ``stat`` asks the file system. Nothing where there is no folder.
    """
    with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_file():
                yield entry
            elif entry.is_dir(follow_symlinks=False):
                yield from walk(entry.path)


FEW = 1000
"""Names up to which :func:`names_there` asks for each; a listing of a large folder takes longer than that."""


def names_there(folder: Path, names: Collection[str]) -> set[str]:
    """Those of some names that are files of a folder, or none where there is no folder.

    A few are asked for one by one. Of many the folder is listed instead: a million questions take a file server long.
    """
    if len(names) < FEW:
        return {name for name in names if (folder / name).is_file()}
    with contextlib.suppress(FileNotFoundError), os.scandir(folder) as entries:
        return {entry.name for entry in entries if entry.is_file()}.intersection(names)
    return set()


def tree_hash(paths: Iterable[Path], root: Path) -> str:
    """SHA-256 over names and contents of files, whatever the order they are given in."""
    digest = hashlib.sha256()
    # Names, not paths, which take several times the memory.
    names = sorted((path.relative_to(root).as_posix() for path in paths), key=lambda name: name.split("/"))
    for name in names:
        digest.update(f"{name}\0{file_hash(root / name)}\n".encode())
    return digest.hexdigest()


@contextlib.contextmanager
def locked(folder: Path, command: str, name: str = ".lock", wait: float = 0.0) -> Iterator[None]:
    """Keep other processes that do the same out of a folder; the lock ends with this process, however it ends.

    Args:
        folder: is made where it is missing.
        command: what does the work, for the message to whoever comes second.
        name: of the lock; a folder may have several.
        wait: for how many seconds to wait for another process.

    Raises:
        RunError: if another one is at work there: who, where and since when; or the folder cannot be written or locked.
    """
    from filelock import FileLock, Timeout

    holder = _holder_note(folder, name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / name).acquire(timeout=wait)
    except Timeout as error:
        waited = f" ({duration(wait)} were waited for it)" if wait else ""
        raise RunError(_who_holds(folder, command, name) + waited) from error
    except NotImplementedError as error:
        raise RunError(
            f"the file system of {display_path(folder)} has no locks, which keep two commands from writing the same "
            "files; choose a folder on a local disk"
        ) from error
    except OSError as error:
        raise RunError(f"cannot write the run folder {display_path(folder)}: {error.strerror or error}") from error
    with lock:
        write_json(
            holder, {"process": os.getpid(), "host": platform.node(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        )
        try:
            yield
        finally:
            holder.unlink(missing_ok=True)


def refuse_if_locked(folder: Path, command: str, name: str) -> None:
    """Return if nobody holds a lock of a folder.

    Raises:
        RunError: if somebody does: who, where and since when.
    """
    from filelock import FileLock, Timeout

    try:
        FileLock(folder / name).acquire(timeout=0).lock.release()
    except Timeout as error:
        raise RunError(_who_holds(folder, command, name)) from error


def _holder_note(folder: Path, name: str) -> Path:
    return folder / f".{name.lstrip('.')}-holder.json"


def _who_holds(folder: Path, command: str, name: str) -> str:
    """The message to whoever comes second. The holder's note may be missing: it is written after the lock is taken."""
    what = f"another {command} is at work in {display_path(folder)}"
    try:
        note = read_json(_holder_note(folder, name), {}, dict[str, str | int])
    except RunError:
        note = {}
    if {"process", "host", "since"} <= note.keys():
        what += f" (process {note['process']} on {note['host']} since {note['since']})"
        if note["host"] != platform.node():
            return (
                f"{what}; wait for it, or stop it there. If that machine is gone, the file server may keep its lock "
                f"for a while: then delete {display_path(folder / name)}"
            )
    return f"{what}; wait for it, stop it, or give another --name"


def read_json(path: Path, default: Any, schema: Any = None) -> Any:
    """Read JSON that a command of this project wrote; ``default`` where there is no such file.

    Args:
        path: of the file.
        default: a dict or a list; the file must hold the same kind.
        schema: a type that pydantic checks the content against; the content itself is returned.

    Raises:
        RunError: if the file is damaged, of another kind or does not fit; it says where and what to do.
    """
    if not path.exists():
        return default
    cure = "delete it to run its stages again"
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(f"{display_path(path)} is not valid JSON ({error}); {cure}") from error
    if not isinstance(value, type(default)):
        kinds: dict[type, str] = {dict: "an object", list: "a list"}
        holds = kinds.get(type(value), f"{value!r:.40}")
        raise RunError(f"{display_path(path)} holds {holds} instead of {kinds[type(default)]}; {cure}")
    if schema is not None:
        from pydantic import TypeAdapter, ValidationError

        try:
            TypeAdapter(schema).validate_python(value)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(map(str, first["loc"]))
            raise RunError(f"{display_path(path)} does not fit at {where}: {first['msg']}; {cure}") from error
    return value

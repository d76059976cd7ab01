"""Paths, and files that are either complete or absent: written under a temporary name, then renamed."""

import contextlib
import hashlib
import json
import os
import shutil
import site
import sys
import unicodedata
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from smaflib.errors import DataError, RunError

HOME = "SMAF_HOME"
"""Environment variable: the folder that relative paths of an installed package start from; set for its kernels."""

_PACKAGE_PARENT = Path(__file__).resolve().parents[1]
IS_CHECKOUT = (_PACKAGE_PARENT / "configs").is_dir() and (_PACKAGE_PARENT / "notebooks").is_dir()

PROJECT_ROOT = _PACKAGE_PARENT if IS_CHECKOUT else Path(os.environ.get(HOME) or Path.cwd()).resolve()
"""The checkout, or for an installed package the working directory. Relative paths in notebooks, settings and manifests
start here."""

_SHARES = (Path(prefix, "share", "smaflib") for prefix in (sys.prefix, site.getuserbase(), _PACKAGE_PARENT))
SHIPPED = next((folder for folder in _SHARES if not IS_CHECKOUT and (folder / "configs").is_dir()), PROJECT_ROOT)
"""Holds ``configs`` and ``notebooks`` as they came with the package."""

RUNS_FOLDER = PROJECT_ROOT / "papermill_runs"

PARTIAL = ".partial-"  # prefix of files that are being written, or were left by a killed process


def expanded(path: str | Path) -> Path:
    """A path with ``~`` and ``$VARIABLE`` replaced, as a shell does at the beginning of a word only."""
    return Path(os.path.expanduser(os.path.expandvars(path)))


def absolute(path: str | Path) -> Path:
    """A path relative to :data:`PROJECT_ROOT`, or to :data:`SHIPPED` if it exists only there."""
    path = expanded(path)
    found = Path(os.path.normpath(PROJECT_ROOT / path))
    shipped = Path(os.path.normpath(SHIPPED / path))
    return shipped if not found.exists() and shipped.exists() else found


def find_config(config: Path) -> Path:
    """A config file by its path from the working directory or the checkout, or a shipped one by its name (``mini``)."""
    places = (config.absolute(), SHIPPED / "configs" / f"{config}.yaml", absolute(config))
    return next((path for path in places if path.is_file()), places[0])


def compose(name: str) -> str:
    """One spelling of a name in Unicode (NFC): a Mac writes é in file names as e and an accent."""
    return unicodedata.normalize("NFC", name)


def read_text(path: Path) -> str:
    """Read UTF-8, or Windows-1252 as some programs of Windows write it, with composed letters."""
    content = path.read_bytes()
    try:
        return compose(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        if b"\0" not in content:  # as a spreadsheet's own format would hold
            with contextlib.suppress(UnicodeDecodeError):
                return compose(content.decode("cp1252"))
        raise DataError(f"{path} is not UTF-8 ({error}); save it as UTF-8, a table as 'CSV UTF-8'") from error


def display_path(path: Path) -> str:
    """A path for records: relative to the checkout if inside it."""
    return str(path.relative_to(PROJECT_ROOT)) if path.is_relative_to(PROJECT_ROOT) else str(path)


def shown_path(path: Path) -> str:
    """A path for output, which exists where one stands: relative to the working directory if inside it."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def duration(seconds: float) -> str:
    """``"58 s"``, ``"3 min 05 s"`` or ``"2 h 14 min"``."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path``, a file or new folder, that replaces it when the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    stem = path.stem.encode()[:100].decode(errors="ignore")  # a file name has at most 255 bytes
    temporary = path.with_name(f"{PARTIAL}{stem}-{uuid.uuid4().hex}{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary) if temporary.is_dir() else temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text, all or nothing."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write JSON, all or nothing; NaN is a ValueError."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def read_json(path: Path, default: Any) -> Any:
    """Read JSON that a command has written; ``default`` if there is no such file, RunError if it is damaged."""
    try:
        value = json.loads(path.read_text(encoding="utf-8")) if path.exists() else default
        if not isinstance(value, type(default)):
            raise ValueError(f"it holds {type(value).__name__}, not {type(default).__name__}")
    except ValueError as error:
        raise RunError(f"{display_path(path)} is damaged; delete it to run its stages again\n{error}") from error
    return value


def save_image(path: Path, image: Image.Image) -> None:
    """Write a picture, all or nothing; the suffix selects the format."""
    with replacing(path) as temporary:
        image.save(temporary)


def files_below(folder: Path) -> list[Path]:
    """All files below a folder; none if there is no such folder."""
    return [path for path in folder.rglob("*") if path.is_file()]


def file_hash(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


@contextlib.contextmanager
def locked(folder: Path, command: str, name: str = ".lock") -> Iterator[None]:
    """Hold the lock of a folder, which is created if missing; RunError if another ``command`` holds it.

    It is released when the process ends, even if killed.
    """
    from filelock import FileLock, Timeout

    folder.mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(folder / name).acquire(timeout=0)
    except Timeout:
        message = f"another {command} is running in {display_path(folder)}; wait for it, stop it or use another folder"
        raise RunError(message) from None
    with lock:
        yield

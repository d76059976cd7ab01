"""The manifest proves which stages of a run are complete, and of what they were made."""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from smaflib import files
from smaflib.runs.metrics import read_records, replace_records
from smaflib.runs.stages import Stage

HASHED_BYTES, HASHED_FILES = 200 * 2**20, 20_000
"""A stage's artifacts up to this much and so many are hashed again when they are checked, beyond it only measured."""

MEASURED_FILES = 100_000
"""Of a folder with more files the check only counts them: a listing, without a question to the file system for each."""

Entry = dict[str, Any]
"""What the manifest says about one stage."""


class StoredPlugin(BaseModel):
    """What an entry must hold of somebody's own code; there is more in it."""

    model_config = ConfigDict(strict=True)

    folder: str


class StoredStage(BaseModel):
    """What an entry of a stage must hold for others to be read; there is more in it."""

    model_config = ConfigDict(strict=True)

    status: Literal["running", "complete", "failed"]
    started: str | None = None
    seconds: float | None = None
    peak_memory_mb: float | None = None
    artifacts: dict[str, dict[str, Any]] = {}
    parameters: dict[str, Any] = {}
    plugins: dict[str, StoredPlugin] = {}


class StoredManifest(BaseModel):
    """What a manifest must hold; there is more in it."""

    model_config = ConfigDict(strict=True)

    stages: dict[str, StoredStage] = {}
    overrides: list[str] = []
    config_file: str = ""
    packages: dict[str, str] = {}


def read_manifest(folder: Path) -> Entry:
    """The manifest of a run folder; one without stages if nothing has run yet."""
    manifest: Entry = files.read_json(folder / "manifest.json", {}, StoredManifest)
    return manifest if "stages" in manifest else manifest | {"stages": {}}


def write_manifest(folder: Path, manifest: Entry) -> None:
    """Write the manifest atomically, its stages in pipeline order, which is that of their names."""
    files.write_json(folder / "manifest.json", {**manifest, "stages": dict(sorted(manifest["stages"].items()))})


def list_artifacts(folder: Path, stage: Stage) -> dict[str, Entry]:
    """Size and hash of everything a stage made, its executed notebook included; a folder is one entry."""
    page = f"{stage.name}.html"  # the report's, which is written after the stage and anew each time
    return {_key(folder, path): _fingerprint(path) for path in _made_by(folder, stage) if path.name != page}


def record_hash(folder: Path, stage: Stage) -> str:
    """SHA-256 of a stage's records in ``metrics.json``."""
    return hash_value([record for record in read_records(folder) if record["stage"] == stage.name])


def missing_outputs(folder: Path, stage: Stage) -> list[str]:
    """The globs of a stage's required artifacts that match no file."""
    return [
        pattern
        for pattern in stage.required_outputs
        if not any(path.is_file() or any(files.walk(path)) for path in folder.glob(pattern.removesuffix("/**")))
    ]


def damaged_artifacts(folder: Path, entry: Entry) -> list[str]:
    """The artifacts of a stage's entry that are gone or are not what was recorded."""
    artifacts = entry.get("artifacts", {})
    num_files = sum(recorded.get("files", 1) for recorded in artifacts.values())
    cheap = num_files <= HASHED_FILES and sum(recorded["bytes"] for recorded in artifacts.values()) <= HASHED_BYTES
    return [key for key, recorded in artifacts.items() if not _is_intact(folder / key, recorded, cheap)]


def clear_stage(folder: Path, stage: Stage, resumed: Entry | None = None) -> None:
    """Delete what a stage may not build on before it runs.

    Args:
        folder: the run folder.
        stage: the stage.
        resumed: the entry of an earlier attempt with the same inputs, whose whole artifacts and records stay.
    """
    for path in _left_by_killed(folder, stage):  # first: they are no damage
        _delete(path)
    if resumed is None:
        replace_records(folder, stage.name, ())
        delete = _made_by(folder, stage)
    else:
        delete = [folder / key for key in damaged_artifacts(folder, resumed)]
    for path in delete:
        _delete(path)


def hash_value(value: Any) -> str:
    """SHA-256 of a value as JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _made_by(folder: Path, stage: Stage) -> list[Path]:
    """Files of a stage; of ``folder/**`` the folders themselves."""
    paths = {path for pattern in _patterns(stage) for path in folder.glob(pattern.removesuffix("/**"))}
    return sorted(path for path in paths if not path.name.startswith("."))


def _left_by_killed(folder: Path, stage: Stage) -> list[Path]:
    """Half-written files of a stage, which would count in its folders' sizes and hashes."""

    def unfinished(pattern: str) -> Iterator[Path]:
        if pattern.endswith("/**"):
            whole = PurePosixPath(pattern.removesuffix("/**"))  # a folder that was being copied
            below = (entry for made in folder.glob(str(whole)) for entry in files.walk(made))
            inside = (Path(entry.path) for entry in below if entry.name.startswith(files.PARTIAL))
            return itertools.chain(inside, folder.glob(str(whole.parent / f"{files.PARTIAL}{whole.name}")))
        path = PurePosixPath(pattern)
        return folder.glob((path.parent / f"{files.PARTIAL}{path.stem}-*{path.suffix}").as_posix())

    return sorted({path for pattern in _patterns(stage) for path in unfinished(pattern)})


def _patterns(stage: Stage) -> list[str]:
    """Globs of all that a stage writes, its notebook and the notebook's page included."""
    return [f"{stage.name}.ipynb", f"{stage.name}.html", *stage.outputs]


def _fingerprint(path: Path) -> Entry:
    if path.is_dir():
        sizes = {entry.path: entry.stat().st_size for entry in files.walk(path)}
        return {"files": len(sizes), "bytes": sum(sizes.values()), "sha256": files.tree_hash(map(Path, sizes), path)}
    return {"bytes": path.stat().st_size, "sha256": files.file_hash(path)}


def _is_intact(path: Path, recorded: Entry, cheap: bool) -> bool:
    if not path.exists() or path.is_dir() != ("files" in recorded):
        return False
    if cheap:
        return _fingerprint(path) == recorded
    if not path.is_dir():
        return path.stat().st_size == recorded["bytes"]
    if recorded["files"] > MEASURED_FILES:
        return sum(1 for _ in files.walk(path)) == recorded["files"]
    sizes = [entry.stat().st_size for entry in files.walk(path)]
    return (len(sizes), sum(sizes)) == (recorded["files"], recorded["bytes"])


def _delete(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _key(folder: Path, path: Path) -> str:
    return path.relative_to(folder).as_posix() + ("/" if path.is_dir() else "")

"""What a run has measured, and the manifest that proves which stages are complete and from which inputs."""

import hashlib
import json
import math
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict

from smaflib import files
from smaflib.runs.stages import Stage

Entry = dict[str, Any]  # of a stage: status, inputs, artifacts, records, made, seconds, ...


Number = Annotated[float | None, AfterValidator(lambda number: number if math.isfinite(number or 0) else None)]
"""NaN and infinity, which are not JSON, become null."""


class Record(BaseModel):
    """A measurement and what it was taken of."""

    model_config = ConfigDict(extra="forbid")

    stage: str
    variant: str = ""
    split: str = "train"
    scale: Number = None
    fusion: str | None = None
    object_size: Literal["all", "small", "medium", "large"] = "all"
    class_name: str = "mean"
    bg_score: Number = None
    metric: str
    value: Number  # IoU, precision, recall and accuracy in [0, 1]


def read_records(folder: Path) -> list[dict[str, Any]]:
    """The records of ``metrics.json``; none if there is no such file."""
    return files.read_json(folder / "metrics.json", [])


def replace_records(folder: Path, stage: str, records: Iterable[dict[str, Any]]) -> None:
    """Replace a stage's records in ``metrics.json``, which is kept in pipeline order; without records it is deleted."""
    others = [record for record in read_records(folder) if record["stage"] != stage]
    if whole := [*others, *records]:
        files.write_json(folder / "metrics.json", sorted(whole, key=lambda record: record["stage"]))
    else:
        (folder / "metrics.json").unlink(missing_ok=True)


def read_manifest(folder: Path) -> Entry:
    """The manifest of a run folder; without stages if nothing has run yet."""
    return {"stages": {}} | files.read_json(folder / "manifest.json", {})


def write_manifest(folder: Path, manifest: Entry) -> None:
    """Write the manifest atomically, its stages in pipeline order, which is the order of their names."""
    files.write_json(folder / "manifest.json", {**manifest, "stages": dict(sorted(manifest["stages"].items()))})


def put_entry(folder: Path, stage: Stage, entry: Entry | None) -> None:
    """Write a stage's entry into the manifest; None removes it."""
    manifest = read_manifest(folder)
    manifest["stages"].pop(stage.name, None)
    if entry is not None:
        manifest["stages"][stage.name] = entry
    write_manifest(folder, manifest)


def describe_results(folder: Path, stage: Stage) -> Entry:
    """What a finished stage made, for its manifest entry.

    ``artifacts``: size and SHA-256 of each file, a folder as one entry; ``records``: hash of its measurements;
    ``made``: hash of what later stages may read, so without figures and executed notebooks, which hold times.
    """
    artifacts = {}
    for path in made_by(folder, stage):
        if path.name != f"{stage.name}.html":  # belongs to the report, which is written after the stage
            key = path.relative_to(folder).as_posix()
            artifacts[f"{key}/" if path.is_dir() else key] = _fingerprint(path)
    records = record_hash(folder, stage)
    shown = [key for key in artifacts if key.startswith("figures/") or key.endswith(".ipynb")]
    passed_on = {key: artifact for key, artifact in artifacts.items() if key not in shown}
    return {"artifacts": artifacts, "records": records, "made": hash_value([records, passed_on])}


def record_hash(folder: Path, stage: Stage) -> str:
    """Hash of a stage's records in ``metrics.json``."""
    return hash_value([record for record in read_records(folder) if record["stage"] == stage.name])


def missing_outputs(folder: Path, stage: Stage) -> list[str]:
    """The globs of a stage's required artifacts that match no file."""
    return [
        pattern
        for pattern in stage.required_outputs
        if not any(path.is_file() or files.files_below(path) for path in folder.glob(pattern.removesuffix("/**")))
    ]


def damaged_artifacts(folder: Path, entry: Entry, verify: bool = False) -> list[str]:
    """The artifacts of a stage that are missing or have another size; with ``verify`` another content, too."""
    damaged = []
    for key, recorded in entry.get("artifacts", {}).items():
        path = folder / key
        found = _fingerprint(path, hashed=verify) if path.exists() else {}
        if any(found.get(name) != value for name, value in recorded.items() if verify or name != "sha256"):
            damaged.append(key)
    return damaged


def clear_stage(folder: Path, stage: Stage, resumed: Entry | None = None) -> None:
    """Delete what a stage must not build on; what is intact of an earlier attempt to resume stays."""
    homes = {folder / pattern.split("/")[0] for pattern in stage.outputs if "/" in pattern}
    half_written = [path for home in homes for path in home.rglob(f"{files.PARTIAL}*")]
    _delete([*folder.glob(f"{files.PARTIAL}*"), *half_written])  # by a process that was killed
    if resumed is None:
        replace_records(folder, stage.name, ())
        _delete(made_by(folder, stage))
    else:
        _delete([folder / key for key in damaged_artifacts(folder, resumed)])


def hash_value(value: Any) -> str:
    """A short SHA-256 of a value as JSON."""
    return f"sha256:{hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]}"


def made_by(folder: Path, stage: Stage) -> list[Path]:
    """Files of a stage; for ``folder/**`` the folders themselves."""
    patterns = [f"{stage.name}.ipynb", f"{stage.name}.html", *stage.outputs]
    paths = {path for pattern in patterns for path in folder.glob(pattern.removesuffix("/**"))}
    return sorted(path for path in paths if not path.name.startswith("."))


def _delete(paths: list[Path]) -> None:
    for path in paths:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _fingerprint(path: Path, hashed: bool = True) -> Entry:
    if not path.is_dir():
        return {"bytes": path.stat().st_size} | ({"sha256": files.file_hash(path)} if hashed else {})
    inside = sorted(files.files_below(path))
    facts: Entry = {"files": len(inside), "bytes": sum(each.stat().st_size for each in inside)}
    if hashed:
        listing = "".join(f"{each.relative_to(path).as_posix()}\0{files.file_hash(each)}\n" for each in inside)
        facts["sha256"] = hashlib.sha256(listing.encode()).hexdigest()
    return facts

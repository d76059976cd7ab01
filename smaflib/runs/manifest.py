"""The manifest proves which stages of a run are complete, and of what they were made."""

from __future__ import annotations

import ast
import hashlib
import json
import shutil
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from smaflib import files
from smaflib.errors import RunError
from smaflib.files import display_path
from smaflib.runs.metrics import read_records
from smaflib.runs.stages import Stage

if TYPE_CHECKING:
    from smaflib.runs.run import Run

NEVER_RAN = "has not run"
HASHED_BYTES = 200 * 2**20  # a stage's artifacts up to this much are re-hashed when checked, beyond it only measured

Entry = dict[str, Any]
"""What the manifest says about one stage."""


# ------------------------------------------------------------------------------------------------------- the manifest


def read_manifest(run: Run) -> Entry:
    """The manifest; one without stages if nothing has run yet."""
    manifest: Entry = files.read_json(run.path("manifest.json"), {})
    return manifest if "stages" in manifest else manifest | {"stages": {}}


def write_manifest(run: Run, manifest: Entry) -> None:
    """Write the manifest atomically, its stages in pipeline order."""
    order = {stage.name: number for number, stage in enumerate(run.stages)}
    stages = sorted(manifest["stages"].items(), key=lambda item: order.get(item[0], len(order)))
    files.write_json(run.path("manifest.json"), {**manifest, "stages": dict(stages)})


def stage_inputs(run: Run, stage: Stage, notebook: Path) -> dict[str, str]:
    """Hashes of all that decides a stage's result, and ``inputs`` over them.

    How the settings were spelled (file, overrides) does not count, only what they are.
    """
    settings = run.config.model_dump(mode="json")
    made = read_manifest(run)["stages"]
    needed = {name: _passed_on(made.get(name, {})) for name in stage.depends_on}
    hashes = {
        "code": notebook_hash(notebook),
        "settings": _hash({key: settings[key] for key in stage.settings}),
        "needs": _hash(needed),
    }
    if "data" in stage.settings and (table := run.config.data.labels) is not None and table.is_file():
        hashes["labels"] = files.file_hash(table)
    if stage.extra_inputs:
        there = [name for name in stage.extra_inputs if run.path(name).is_file()]
        hashes["reads"] = _hash({name: files.file_hash(run.path(name)) for name in there})
    return hashes | {"inputs": _hash(hashes)}


def notebook_hash(notebook: Path) -> str:
    """SHA-256 of a notebook's code; text, comments, layout and outputs do not count."""
    return _hash([_code_only(cell["source"]) for cell in notebook_cells(notebook) if cell["cell_type"] == "code"])


def notebook_cells(notebook: Path) -> list[Entry]:
    """Cells of a notebook: ``cell_type``, ``source`` as one text, ``tags``.

    Importing nbformat would take seconds, and this is all that is needed of it here.

    Raises:
        RunError: if there is no such notebook, or it cannot be read.
    """
    if not notebook.is_file():
        raise RunError(f"the notebook {display_path(notebook)} is missing")
    try:
        return [
            {
                "cell_type": cell["cell_type"],
                "source": "".join(cell["source"]),
                "tags": cell["metadata"].get("tags", []),
            }
            for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(f"{display_path(notebook)} cannot be read as a notebook: {error!r}") from error


def library_hash() -> str:
    """SHA-256 of the library's own sources."""
    package = Path(__file__).parents[1]
    return files.tree_hash([path for path in package.rglob("*.py") if "__pycache__" not in path.parts], package)


def list_artifacts(run: Run, stage: Stage) -> dict[str, Entry]:
    """Size and hash of everything a stage made, its executed notebook included; a folder is one entry."""
    page = f"{stage.name}.html"  # the report's, which is written after the stage and anew each time
    made = [path for path in _made_by(run, stage) if path.name != page]
    return {_key(run, path): _fingerprint(path) for path in made}


def record_hash(run: Run, stage: Stage) -> str:
    """SHA-256 of a stage's records in ``metrics.json``."""
    return _hash([record for record in read_records(run.folder) if record["stage"] == stage.name])


def missing_outputs(run: Run, stage: Stage) -> list[str]:
    """The globs of a stage's essential artifacts that match no file."""
    return [
        pattern
        for pattern in stage.required_outputs
        if not any(path.is_file() for path in run.folder.glob(_all_of(pattern)))
    ]


def damaged_artifacts(run: Run, entry: Entry) -> list[str]:
    """The artifacts of a stage's entry that are gone or are not what was recorded."""
    artifacts = entry.get("artifacts", {})
    cheap = sum(recorded["bytes"] for recorded in artifacts.values()) <= HASHED_BYTES
    return [key for key, recorded in artifacts.items() if not _is_intact(run.path(key), recorded, cheap)]


def why_not_complete(run: Run, stage: Stage, inputs: dict[str, str]) -> str | None:
    """Why a stage has to run, in a few words; None if it is complete and unchanged."""
    entry = read_manifest(run)["stages"].get(stage.name)
    if entry is None:
        return NEVER_RAN
    reasons = {"code": "its notebook changed", "settings": "its settings changed", "needs": "a stage it needs changed"}
    reasons |= {"labels": f"{run.config.data.labels} changed"} if "labels" in inputs else {}
    reasons |= {"reads": f"{', '.join(stage.extra_inputs)} is new"} if stage.extra_inputs else {}
    for key, reason in reasons.items():
        if entry.get(key) != inputs[key]:
            return reason
    if entry["status"] != "complete":
        return "goes on where it stopped"
    if damaged := damaged_artifacts(run, entry):
        return f"{damaged[0]} is missing or damaged"
    return None if entry.get("records") == record_hash(run, stage) else "its records in metrics.json changed"


def clear_stage(run: Run, stage: Stage, inputs: dict[str, str]) -> bool:
    """Delete what a stage may not build on before it runs; whole artifacts of the same inputs stay.

    Returns:
        Whether the stage goes on from an earlier attempt.
    """
    entry = read_manifest(run)["stages"].get(stage.name, {})
    if entry.get("inputs") == inputs["inputs"]:
        for path in _left_by_killed(run, stage):  # first: they are no damage
            _delete(path)
        for key in damaged_artifacts(run, entry):
            _delete(run.path(key))
        return True
    for path in _made_by(run, stage):
        _delete(path)
    if others := [record for record in read_records(run.folder) if record["stage"] != stage.name]:
        files.write_json(run.path("metrics.json"), others)
    else:
        run.path("metrics.json").unlink(missing_ok=True)
    return False


def _made_by(run: Run, stage: Stage) -> list[Path]:
    """Files of a stage; of ``folder/**`` the folders themselves."""
    paths = {path for pattern in _patterns(stage) for path in run.folder.glob(pattern.removesuffix("/**"))}
    return sorted(path for path in paths if not path.name.startswith("."))


def _left_by_killed(run: Run, stage: Stage) -> list[Path]:
    """Half-written files of a stage, which would count in its folders' sizes and hashes."""

    def unfinished(pattern: str) -> str:
        if pattern.endswith("/**"):
            return f"{pattern}/{files.PARTIAL}*"
        path = PurePosixPath(pattern)
        return (path.parent / f"{files.PARTIAL}{path.stem}-*{path.suffix}").as_posix()

    return sorted({path for pattern in _patterns(stage) for path in run.folder.glob(unfinished(pattern))})


def _patterns(stage: Stage) -> list[str]:
    """Globs of all that a stage writes, its notebook and the notebook's page included."""
    return [f"{stage.name}.ipynb", f"{stage.name}.html", *stage.outputs]


def _passed_on(entry: Entry) -> Entry:
    """What other stages may read of a stage: its records, its artifacts but for pictures and the executed notebook."""
    artifacts = entry.get("artifacts", {})
    # Executed notebooks hold times, so they differ after every run even if it made the same.
    kept = {
        key: made for key, made in artifacts.items() if not key.startswith("figures/") and not key.endswith(".ipynb")
    }
    return {"artifacts": kept, "records": entry.get("records")}


def _fingerprint(path: Path) -> Entry:
    if path.is_dir():
        inside = [file for file in path.rglob("*") if file.is_file()]
        total = sum(file.stat().st_size for file in inside)
        return {"files": len(inside), "bytes": total, "sha256": files.tree_hash(inside, path)}
    return {"bytes": path.stat().st_size, "sha256": files.file_hash(path)}


def _is_intact(path: Path, recorded: Entry, cheap: bool) -> bool:
    if not path.exists() or path.is_dir() != ("files" in recorded):
        return False
    if cheap:
        return _fingerprint(path) == recorded
    sizes = (
        [file.stat().st_size for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path.stat().st_size]
    )
    return sum(sizes) == recorded["bytes"] and len(sizes) == recorded.get("files", 1)


def _delete(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _key(run: Run, path: Path) -> str:
    return path.relative_to(run.folder).as_posix() + ("/" if path.is_dir() else "")


def _all_of(pattern: str) -> str:
    return pattern + "/*" if pattern.endswith("**") else pattern  # glob's ** alone yields folders only


def _code_only(source: str) -> str:
    try:
        return ast.dump(ast.parse(source))
    except SyntaxError:  # a magic such as %matplotlib inline
        return source


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()

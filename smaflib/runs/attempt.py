"""An attempt at a stage: what is cleared before it, its entry in the manifest, the settings that it reads.

``smaf run`` makes one, and so do the shards of a stage (:mod:`smaflib.runs.shards`), which work at one together.
"""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from smaflib import files
from smaflib.config_reads import recorded_settings
from smaflib.files import display_path
from smaflib.runs.inputs import config_hash
from smaflib.runs.manifest import Entry, clear_stage, read_manifest, write_manifest
from smaflib.runs.run import Run
from smaflib.runs.stages import Stage


def begin_attempt(run: Run, stage: Stage, inputs: Entry, resumed: Entry | None, **more: Any) -> Entry:
    """Make room for a stage and give it a manifest entry.

    Args:
        run: the run.
        stage: the stage.
        inputs: from :func:`~smaflib.runs.inputs.stage_inputs`.
        resumed: the entry of the attempt whose artifacts stay; None: the stage begins from nothing.
        more: of the entry.

    Returns:
        The entry, as it stands in the manifest.
    """
    # What is there is not made again; the settings that it was made with count although nobody reads them now.
    names = settings_read(run, stage) | resumed.get("settings_read", {}) if resumed else {}
    clear_stage(run.folder, stage, resumed)
    forget_settings(run.folder, stage)
    files.write_text(settings_file(run.folder, stage), "".join(f"{name}\n" for name in names))
    entry = {
        "status": "running",
        "exit_code": None,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": None,
        "peak_memory_mb": None,
        "resumed": resumed is not None,
        "parameters": {
            "config_file": display_path(run.config_file),
            "overrides": list(run.overrides),
            "run_dir": display_path(run.folder),
        },
        **inputs,
        "config_hash": config_hash(run.config),
        **more,
    }
    put_entry(run.folder, stage, entry)
    return entry


def put_entry(folder: Path, stage: Stage, entry: Entry, **more: Any) -> None:
    """Write a stage's entry into the manifest, with ``more`` in it."""
    manifest = read_manifest(folder)
    entry.update(more)
    if entry["status"] != "running":
        entry.pop("kernel_pid", None)
    manifest["stages"][stage.name] = entry
    write_manifest(folder, manifest)


def settings_file(folder: Path, stage: Stage, part: str = "") -> Path:
    """Takes the names of the settings that a stage reads while it runs; a part, such as ``2-of-8``, has its own."""
    return folder / f".{stage.name}{f'.{part}' if part else ''}.settings"


def settings_read(run: Run, stage: Stage) -> dict[str, Any]:
    """The settings that a stage has read so far, all its parts together, with their values."""
    found: dict[str, Any] = {}
    for path in _settings_files(run.folder, stage):
        found |= recorded_settings(path, run.config)
    return dict(sorted(found.items()))


def forget_settings(folder: Path, stage: Stage) -> None:
    """Delete the files of :func:`settings_file`: the manifest has their names, or the stage begins from nothing."""
    for path in _settings_files(folder, stage):
        path.unlink(missing_ok=True)


def _settings_files(folder: Path, stage: Stage) -> list[Path]:
    return [settings_file(folder, stage), *sorted(folder.glob(f".{stage.name}.*-of-*.settings"))]

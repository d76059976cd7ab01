"""Taking finished stages over from another run whose inputs are the same.

From DVC's run cache: a stage is known by the hashes of all that it read, it is restored only if every output is there
as recorded, by links, but for what people edit. Unlike there nothing is declared, and no store lies beside the runs:
the manifest of a finished run says what each of its stages read.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from smaflib import files
from smaflib.config import Config
from smaflib.runs.inputs import RESUMES, why_not_complete
from smaflib.runs.manifest import Entry, clear_stage, read_manifest, write_manifest
from smaflib.runs.metrics import read_records, replace_records
from smaflib.runs.stages import Stage

EDITED = (".ipynb", ".json", ".html")
"""Endings of files that are copied, not linked: editors write into the file that is there."""


def take_over(source: Path, folder: Path, stage: Stage, config: Config, inputs: Entry, all_code: bool) -> str | None:
    """Take a stage over from another run, with its records and its manifest entry.

    Killed in between, it leaves a stage without an entry, which the next call begins anew.

    Args:
        source: folder of the other run.
        folder: folder of the run that needs the stage.
        stage: the stage.
        config: of the run that needs it.
        inputs: of the run that needs it, from :func:`~smaflib.runs.inputs.stage_inputs`.
        all_code: do not take what another version of a module made.

    Returns:
        Why it was not taken over; None if it was.
    """
    if reason := why_not_complete(source, stage, config, inputs, all_code):
        return "has not finished" if reason == RESUMES else reason
    entry = read_manifest(source)["stages"][stage.name]
    manifest = read_manifest(folder)
    if manifest["stages"].pop(stage.name, None):
        write_manifest(folder, manifest)
    clear_stage(folder, stage)
    for key in entry["artifacts"]:
        _copy(source / key, folder / key)
    replace_records(folder, stage.name, [record for record in read_records(source) if record["stage"] == stage.name])
    manifest["stages"][stage.name] = entry | {"reused_from": files.display_path(source)}
    write_manifest(folder, manifest)
    return None


def _copy(source: Path, target: Path) -> None:
    """Copy a file or a folder, by hard links but for what people edit."""
    if source.is_dir():
        files.copy_folder(source, target, EDITED)
    elif source.suffix in EDITED:
        with files.replacing(target) as temporary:
            shutil.copyfile(source, temporary)
    else:
        files.copy_file(source, target)

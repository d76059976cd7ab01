"""What decides a stage's result: the notebook, the library, settings, data, earlier stages; and whether it changed."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, get_args

from smaflib import files
from smaflib.config import FREE_SETTINGS, Config, DataConfig, Split
from smaflib.config_reads import settings_at
from smaflib.errors import ConfigError, RunError
from smaflib.files import display_path
from smaflib.plugins import DATA, describe, source_files
from smaflib.runs.code import PACKAGE, code_only, imported_modules, library_hash
from smaflib.runs.manifest import Entry, damaged_artifacts, hash_value, read_manifest, record_hash
from smaflib.runs.stages import Stage

NEVER_RAN, RESUMES = "has not run", "resumes"

PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".xml", ".json")
"""Endings of the files of a data folder that are compared, by name and size; annotations among them."""

DATA_FOLDERS = {
    "voc": "JPEGImages Annotations SegmentationClass SegmentationClassAug labels.csv".split(),
    "coco": ["annotations", "{}"],
}
"""By ``data.kind``: what lies in ``data.root``; in place of ``{}`` the name of a split."""


def stage_inputs(
    folder: Path, stage: Stage, notebook: Path, data: Mapping[str, str], plugins: Mapping[str, Entry] | None = None
) -> Entry:
    """Hashes of what decides a stage's result, beside the settings that it will read.

    Args:
        folder: the run folder.
        stage: the stage.
        notebook: its notebook.
        data: from :func:`data_hashes`.
        plugins: from :func:`plugin_facts`.

    Returns:
        ``code`` of the notebook; by name ``modules`` of the library that it imports, ``depends_on`` (what earlier
        stages made), ``data``, ``extra_inputs``, ``plugins``.
    """
    made = read_manifest(folder)["stages"]
    there = [name for name in stage.extra_inputs if (folder / name).is_file()]
    return {
        "code": notebook_hash(notebook),
        "modules": imported_modules(_code_cells(notebook)),
        "depends_on": {name: hash_value(_passed_on(made.get(name, {}))) for name in stage.depends_on},
        "data": dict(data),
        "extra_inputs": {name: files.file_hash(folder / name) for name in there},
        "plugins": dict(plugins or {}),
    }


def plugin_facts(config: Config) -> dict[str, Entry]:
    """What a run depends on of somebody's own code, by setting.

    Of :func:`~smaflib.plugins.describe`, and ``modules`` of this library that the code imports, with their hashes.

    Raises:
        PluginError: if there is no such code.
    """
    facts = {}
    for setting, (kind, name) in config.plugins.items():
        sources = [path.read_text(encoding="utf-8", errors="replace") for path in source_files(kind, name).values()]
        facts[setting] = describe(kind, name) | {"modules": imported_modules(sources)}
    return facts


def code_of(plugins: Mapping[str, Entry]) -> dict[str, Entry]:
    """What counts of :func:`plugin_facts`: not where the code lies."""
    places = ("file", "folder")
    return {setting: {key: facts[key] for key in facts if key not in places} for setting, facts in plugins.items()}


def claim_code(config: Config, path: Path, folder: str) -> None:
    """Let a folder belong to the code of somebody's own that its config names: a file in it keeps the facts.

    Args:
        config: of the work in the folder.
        path: of the file; without such code none is written.
        folder: is named in the error.

    Raises:
        ConfigError: if another version of the code was at work there.
    """
    facts = plugin_facts(config)
    kept = files.read_json(path, {})
    if kept and (changed := changed_names(code_of(kept), code_of(facts))):
        raise ConfigError(
            f"{folder} holds work of another version of the code of {changed[0]}; delete it, or choose another one"
        )
    if facts:
        files.write_json(path, facts)


def data_hashes(data: DataConfig) -> dict[str, str]:
    """Hashes of the data that the settings name, by setting; none for what code draws.

    Tables and lists count by content, pictures by name and size alone: nothing is decoded.
    """
    named = {f"data.{name}": getattr(data, name) for name in ("labels", "images", "saliency", "masks")}
    for inside in DATA_FOLDERS.get(data.kind, ()) if data.root else ():
        for split in (data.train_split, data.val_split):
            named[f"data.root/{inside.format(split)}"] = data.root / inside.format(split)  # type: ignore[operator]
    lists = {f"data.{split}_split": data.split_list(split) for split in get_args(Split)} if data.kind == "voc" else {}
    for name, path in lists.items() if data.root else ():
        inside_root = path.is_relative_to(data.root)  # type: ignore[arg-type]
        named[f"data.root/{path.relative_to(data.root).as_posix()}" if inside_root else name] = path  # type: ignore[arg-type]
    if DATA.is_own(data.kind):  # nobody knows what of it counts
        named["data.root"] = data.root
    there = {name: path for name, path in named.items() if path and path.exists()}
    listing = _tree_listing_hash if DATA.is_own(data.kind) else _listing_hash
    return {name: files.file_hash(path) if path.is_file() else listing(path) for name, path in there.items()}


def notebook_hash(notebook: Path) -> str:
    """SHA-256 of a notebook's code; text, comments, layout and outputs do not count."""
    return hash_value([code_only(source) for source in _code_cells(notebook)])


def code_hash(notebooks: Path) -> str:
    """SHA-256 of the library's sources and of the code of a folder's notebooks: what nodes of a cluster must share."""
    return hash_value([library_hash(), {path.name: notebook_hash(path) for path in sorted(notebooks.glob("*.ipynb"))}])


def refuse_other_code(expected: str | None, notebooks: Path) -> None:
    """Return if library and notebooks are those that were asked for, or none were.

    Raises:
        RunError: if they are not.
    """
    if expected is not None and (here := code_hash(notebooks)) != expected:
        raise RunError(
            f"smaflib or its notebooks on {platform.node()} ({display_path(PACKAGE)}) are not those that this work was "
            f"planned with (--code {expected[:12]}, here {here[:12]}); install the same version on every node, or plan "
            "the work anew. Nothing was run"
        )


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


# ------------------------------------------------------------------------------------------------------------- changes


def why_not_complete(folder: Path, stage: Stage, config: Config, inputs: Entry, all_code: bool = True) -> str | None:
    """Why a stage has to run, in a few words; None if it is complete and unchanged.

    Args:
        folder: of the run that holds its manifest entry, artifacts and records.
        stage: the stage.
        config: the settings now.
        inputs: from :func:`stage_inputs`.
        all_code: also if it is only a module of the library that changed.
    """
    entry = read_manifest(folder)["stages"].get(stage.name)
    if entry is None:
        return NEVER_RAN
    if reason := difference(entry, config, inputs, lambda module: all_code):
        return reason
    if entry["status"] != "complete":
        return RESUMES
    if damaged := damaged_artifacts(folder, entry):
        return f"{damaged[0]} is missing or damaged"
    return None if entry.get("records") == record_hash(folder, stage) else "its records in metrics.json changed"


def difference(
    entry: Entry, config: Config, inputs: Entry, counts: Callable[[str], bool] = lambda module: True
) -> str | None:
    """The first thing that is not as it was when a stage's manifest entry was written; None if all is.

    Args:
        entry: of the manifest; one that an older version wrote differs.
        config: the settings now. Of a complete stage only those that it read count, of another all.
        inputs: from :func:`stage_inputs`.
        counts: which modules of the library count.
    """
    if "modules" not in entry:
        return "its manifest entry is of an older version"
    if reason := _changed_settings(entry, config):
        return reason
    if entry["code"] != inputs["code"]:
        return "its notebook changed"
    read_data = any(name.split(".")[0] in ("", "data") for name in entry.get("settings_read", [""]))
    read = {"settings_read": entry.get("settings_read", [""])}
    before, now = (code_of(read_plugins(read | {"plugins": each.get("plugins", {})})) for each in (entry, inputs))
    if changed := changed_names(before, now):
        return f"the code of {changed[0]} changed"
    for key in ("data", "depends_on", "extra_inputs", "modules"):
        changed = [name for name in changed_names(entry[key], inputs[key]) if key != "modules" or counts(name)]
        if changed and (key != "data" or read_data):
            return f"{changed[0]} changed" if len(changed) == 1 else f"{changed[0]} and {len(changed) - 1} more changed"
    return None


def read_plugins(entry: Entry) -> dict[str, Entry]:
    """Of a stage's entry the facts about somebody's own code that the stage has read the setting of."""
    read = entry.get("settings_read", [""])
    return {
        setting: facts
        for setting, facts in entry.get("plugins", {}).items()
        if any(f"{setting}.".startswith(f"{name}." if name else "") for name in read)
    }


def changed_names(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The names whose values differ, in the order of their appearance."""
    return [name for name in {**before, **now} if before.get(name) != now.get(name)]


def config_hash(config: Config) -> str:
    """SHA-256 of all settings that decide a result."""
    return hash_value(config.model_dump(mode="json", exclude=set(FREE_SETTINGS)))


def _changed_settings(entry: Entry, config: Config) -> str | None:
    if "settings_read" not in entry:
        return None if entry.get("config_hash") == config_hash(config) else "its settings changed"
    before, now = entry["settings_read"], settings_at(entry["settings_read"], config)
    for name in changed_names(before, now):
        left, right = before[name], now.get(name, "-")
        while isinstance(left, dict) and isinstance(right, dict):  # down to the setting itself
            part = changed_names(left, right)[0]
            name, left, right = f"{name}.{part}".lstrip("."), left.get(part, "-"), right.get(part, "-")
        return f"{name} differs ({left} | {right})"
    return None


def _code_cells(notebook: Path) -> list[str]:
    return [cell["source"] for cell in notebook_cells(notebook) if cell["cell_type"] == "code"]


def _passed_on(entry: Entry) -> Entry:
    """What other stages may read of a stage: its records, its artifacts but for pictures and the executed notebook."""
    artifacts = entry.get("artifacts", {})
    # Executed notebooks hold times, so they differ after every run even if it made the same.
    kept = {
        key: made for key, made in artifacts.items() if not key.startswith("figures/") and not key.endswith(".ipynb")
    }
    return {"artifacts": kept, "records": entry.get("records")}


def _tree_listing_hash(folder: Path) -> str:
    """Of names and sizes of all files below a folder."""
    listing = sorted(
        f"{Path(entry.path).relative_to(folder).as_posix()}\0{entry.stat().st_size}" for entry in files.walk(folder)
    )
    return hashlib.sha256("\n".join(listing).encode()).hexdigest()


def _listing_hash(folder: Path) -> str:
    with os.scandir(folder) as entries:  # one after the other: an entry that was asked for its size takes half a kB
        pictures = (entry for entry in entries if entry.name.lower().endswith(PICTURES))
        listing = sorted(f"{entry.name}\0{entry.stat().st_size}" for entry in pictures if entry.is_file())
    return hashlib.sha256("\n".join(listing).encode()).hexdigest()

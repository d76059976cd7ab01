"""What decides a stage's result, in one flat dictionary, and whether it has changed since the stage ran.

Such as ``{"attention.fusion": "sum", "its notebook": hash, "smaflib.cams": hash, "files of data.labels": hash,
"02_classifier": hash}``. The manifest keeps it. A stage with the same inputs is skipped, resumed, or reused.
"""

import ast
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import get_args

from smaflib import files
from smaflib.config import FREE_SETTINGS, Config, Split, changed_names, flat_settings
from smaflib.plugins import custom_file, is_custom
from smaflib.runs.manifest import Entry, damaged_artifacts, hash_value, read_manifest, record_hash
from smaflib.runs.run import Run
from smaflib.runs.stages import Stage, counts

PACKAGES = [Path(__file__).parents[1], Path(__file__).parents[2] / "minidata"]
"""The library, and the data set that it draws."""

SHOWS = ("", "errors", "report", "explorer", "runs", "apps")
"""Parts of the library, ``""`` for its ``__init__``, that only show results: a change runs no stage again."""

DATA_FOLDERS = {
    "voc": "JPEGImages Annotations SegmentationClass labels.csv".split(),
    "coco": ["annotations", "{}"],
}
"""By ``data.kind``: what is read below ``data.root``; ``{}`` is the name of a split."""


def stage_inputs(run: Run, stage: Stage, notebook: Path, outside: Mapping[str, str]) -> Entry:
    """All inputs of a stage: settings by value, everything else by hash; ``outside`` is of :func:`outside_files`."""
    of_masks = stage.settings_of_masks if run.config.self_training.refine != "none" else ()

    def matters(setting: str) -> bool:
        return counts("settings", setting, stage, run.stages) or setting.startswith(of_masks)

    settings = {name: value for name, value in flat_settings(run.config).items() if name not in FREE_SETTINGS}
    made = read_manifest(run.folder)["stages"]
    return {
        **{name: value for name, value in settings.items() if matters(name)},
        "its notebook": notebook_hash(notebook),
        **{f"files of {name}": hashed for name, hashed in outside.items() if matters(name)},
        **{name: made.get(name, {}).get("made") for name in stage.depends_on},
        **{name: _content_hash(run.path(name)) for name in stage.extra_inputs if run.path(name).is_file()},
        **{
            name: hashed
            for name, hashed in code_hashes().items()
            if counts("code", name.partition(".")[2], stage, run.stages)
        },
    }


def why_not_complete(folder: Path, stage: Stage, inputs: Entry, keep_stale: bool = False) -> str | None:
    """Why a stage of a run folder has to run, in words; None if it is complete and unchanged.

    With ``keep_stale`` changes in the library's code do not count.
    """
    entry = read_manifest(folder)["stages"].get(stage.name)
    if entry is None:
        return "has not run"
    if reason := difference(entry.get("inputs", {}), inputs, keep_stale):
        return reason
    if entry["status"] != "complete":
        return "has not finished"
    if damaged := damaged_artifacts(folder, entry):
        return f"{damaged[0]} is missing or damaged"
    return None if entry.get("records") == record_hash(folder, stage) else "its records in metrics.json changed"


def difference(before: Entry, now: Entry, keep_stale: bool = False) -> str | None:
    """The first input that changed, in words, such as ``attention.fusion differs (sum | max)``; None if none did."""
    library = tuple(package.name for package in PACKAGES) if keep_stale else ()
    changed = [name for name in changed_names(before, now) if not name.startswith(library)]
    if not changed:
        return None
    name, more = changed[0], f" and {len(changed) - 1} more" if len(changed) > 1 else ""
    left, right = before.get(name, "-"), now.get(name, "-")
    if any(str(value).startswith("sha256:") for value in (left, right)):
        return f"{name}{more} changed"
    return f"{name} differs ({left} | {right}){more and f',{more}'}"


def outside_files(config: Config) -> dict[str, str]:
    """Hashes of the files that settings name, by setting: data sets, custom code (ConfigError if it has no file).

    Tables, lists and code count by content, folders by the names and sizes of their files.
    """
    data = config.data
    named = {f"data.{name}": getattr(data, name) for name in ("labels", "images", "saliency", "masks")}
    if data.root and is_custom(data.kind):
        named["data.root"] = data.root
    elif data.root:
        for inside in DATA_FOLDERS.get(data.kind, ()):
            for split in (data.train_split, data.val_split):
                named[f"data.root/{inside.format(split)}"] = data.root / inside.format(split)
    if data.root and data.kind == "voc":
        named |= {f"data.{split}_split": data.split_list(split) for split in get_args(Split)}
    named |= {setting: custom_file(name) for setting, name in config.custom_code.items()}
    return {name: _content_hash(path) for name, path in named.items() if path and path.exists()}


def _content_hash(path: Path) -> str:
    if path.is_file():
        return f"sha256:{files.file_hash(path)[:16]}"
    shown = [each for each in files.files_below(path) if not each.name.startswith(".")]
    return hash_value(sorted([each.relative_to(path).as_posix(), each.stat().st_size] for each in shown))


def code_hashes() -> dict[str, str]:
    """A hash of each module by its name, without those that only show; comments, docstrings and layout do not count."""
    hashes = {}
    for package in PACKAGES:
        for path in sorted(package.rglob("*.py")):
            name = ".".join(path.relative_to(package.parent).with_suffix("").parts).removesuffix(".__init__")
            if (name.split(".") + [""])[1] not in SHOWS:
                hashes[name] = _module_hash(path, path.stat().st_mtime_ns)
    return hashes


@cache
def _module_hash(path: Path, _changed: int) -> str:
    return hash_value(_code_only(path.read_text(encoding="utf-8")))


def notebook_hash(notebook: Path) -> str:
    """Hash of a notebook's code; text, comments, layout and outputs do not count."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]  # importing nbformat would take longer
    return hash_value([_code_only("".join(cell["source"])) for cell in cells if cell["cell_type"] == "code"])


def _code_only(source: str) -> str:
    """Code without comments, docstrings and layout; what is not Python, such as a magic, as it is."""
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return source
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            node.body = [
                line for line in node.body if not (isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant))
            ]
    return ast.dump(tree)

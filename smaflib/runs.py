"""A run is a folder: its settings, what each stage made, and a manifest that proves which stages are complete.

Notebooks open a run with :func:`open_run`; :mod:`smaflib.runner` executes notebooks and keeps the manifest.
"""

from __future__ import annotations

import ast
import difflib
import hashlib
import json
import math
import os
import shlex
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Literal

import pandas as pd

from smaflib import files
from smaflib.config import Config, ConfigError, config_differences, dump_config, load_config

if TYPE_CHECKING:  # torch and matplotlib take seconds to import, and "smaf status" needs neither
    from matplotlib.figure import Figure

    from smaflib.data.masks import MaskFiles
    from smaflib.data.sample import Samples
    from smaflib.runtime import Runtime

PROJECT_ROOT = Path(__file__).resolve().parents[1]
"""The checkout. Relative paths in notebooks and in manifests are relative to it."""

RUNS_FOLDER = PROJECT_ROOT / "papermill_runs"
NEVER_RAN = "has not run"
HASHED_BYTES = 200 * 2**20  # a stage's artifacts up to this much are re-hashed when checked, beyond it only measured

Entry = dict[str, Any]
"""What the manifest says about one stage."""


class RunError(Exception):
    """A run that cannot go on; the message says what is in the way and what helps."""

    exit_code = 2


class RunMismatch(RunError):
    """The run folder belongs to other settings."""


class MissingStage(RunError):
    """A stage was opened before the stages that it needs."""


@dataclass(frozen=True)
class Stage:
    """One notebook of the chain.

    Attributes:
        name: the notebook's file name without ending.
        question: what it answers.
        needs: the stages whose artifacts it reads.
        settings: groups of the config that change its result.
        makes: globs of its artifacts in the run folder; ``folder/**`` is everything below.
        essential: the artifacts among them that every config makes, as globs; without them it has failed.
        reads: files that another command may put into the run folder; a new one makes the stage run again.
    """

    name: str
    question: str
    needs: tuple[str, ...] = ()
    settings: tuple[str, ...] = ()
    makes: tuple[str, ...] = ()
    essential: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()


STAGES: tuple[Stage, ...] = (
    Stage(
        "00_one_image_end_to_end",
        "What happens to one image on its way from a label to a mask?",
        makes=("example/**", "figures/00_*.png"),
    ),
    Stage(
        "01_data",
        "What do we learn from: which images, which labels, and how large are the objects?",
        settings=("seed", "data", "evaluation"),
        makes=("data.json", "data/**", "figures/01_*.png"),
        essential=("data.json",),
    ),
    Stage(
        "02_classifier",
        "Can a network tell what is in an image, and what does it look at?",
        needs=("01_data",),
        settings=("seed", "precision", "data", "model", "classifier"),
        makes=("checkpoints/teacher*.safetensors", "figures/02_*.png"),
        essential=("checkpoints/teacher.safetensors",),
    ),
    Stage(
        "03_multi_scale_attention",
        "What do small and large scales see, and what does their fusion gain?",
        needs=("01_data", "02_classifier"),
        settings=("seed", "precision", "data", "attention", "evaluation"),
        makes=("cams/teacher*/**", "figures/03_*.png"),
        essential=("cams/teacher/**",),
    ),
    Stage(
        "04_denoise_and_reactivate",
        "What do denoising and reactivation repair?",
        needs=("01_data", "03_multi_scale_attention"),
        settings=("data", "attention", "evaluation"),
        makes=("figures/04_*.png",),
    ),
    Stage(
        "05_self_training",
        "Does a student of the fused maps see more than its teacher?",
        needs=("01_data", "02_classifier", "03_multi_scale_attention"),
        settings=("seed", "precision", "data", "model", "attention", "self_training", "evaluation"),
        makes=("checkpoints/student*.safetensors", "cams/student*/**", "figures/05_*.png"),
        essential=("checkpoints/student*.safetensors", "cams/student*/**"),
    ),
    Stage(
        "06_pseudo_masks",
        "How good are the masks, and what does the dense CRF add?",
        needs=("01_data", "03_multi_scale_attention", "05_self_training"),
        settings=("data", "attention", "pseudo_masks", "evaluation"),
        makes=("masks/**", "figures/06_*.png"),
        essential=("masks/**",),
    ),
    Stage(
        "07_segmentation",
        "Does a segmentation network trained on the pseudo masks work on new images?",
        needs=("01_data", "05_self_training", "06_pseudo_masks"),
        settings=("seed", "precision", "data", "model", "segmentation", "evaluation"),
        makes=("checkpoints/segmenter*.safetensors", "masks_segmenter/**", "figures/07_*.png"),
    ),
    Stage(
        "08_results",
        "What did each stage gain, for which objects?",
        needs=(
            "01_data",
            "02_classifier",
            "03_multi_scale_attention",
            "04_denoise_and_reactivate",
            "05_self_training",
            "06_pseudo_masks",
            "07_segmentation",
        ),
        settings=("data", "attention", "evaluation"),
        makes=("figures/08_*.png", "explorer.html"),
        reads=("ablation/ablation.json",),
    ),
)


def stage_named(name: str, stages: Sequence[Stage] = STAGES) -> Stage:
    """Find a stage by number (``2``, ``02``), by word (``classifier``) or by its full name.

    Raises:
        RunError: if there is none; the message names the nearest one and all of them.
    """
    wanted = name.strip().lower()
    for stage in stages:
        number, _, word = stage.name.partition("_")
        if wanted in (stage.name, number, number.lstrip("0") or "0", word):
            return stage
    words = {spelling: stage.name for stage in stages for spelling in (stage.name, stage.name.partition("_")[2])}
    close = difflib.get_close_matches(wanted, words, n=1)
    hint = f"; did you mean {words[close[0]]}?" if close else "."
    raise RunError(f"there is no stage {name!r}{hint} The stages are {', '.join(stage.name for stage in stages)}")


# --------------------------------------------------------------------------------------------------------- the folder

RECORD_DEFAULTS: dict[str, Any] = {
    "stage": "",
    "variant": "",
    "split": "train",
    "scale": None,
    "object_size": "all",
    "class_name": "mean",
    "bg_score": None,
    "metric": None,
    "value": None,
}
OBJECT_SIZES = ("all", "small", "medium", "large")
FRACTIONS = ("iou", "iou_sweep", "precision", "recall", "accuracy")


@dataclass(frozen=True)
class Run:
    """A run folder and the settings that it belongs to.

    Attributes:
        folder: absolute path of the run folder.
        config: all settings.
        config_file: where they came from, for commands that are printed.
        overrides: the ``key=value`` settings given on top of the file.
        stages: the chain; only tests use another one.
    """

    folder: Path
    config: Config
    config_file: Path
    overrides: tuple[str, ...] = ()
    stages: tuple[Stage, ...] = STAGES

    @property
    def name(self) -> str:
        return self.folder.name

    @cached_property
    def runtime(self) -> Runtime:
        """Device, precision and seed; asking for it sets torch's threads."""
        from smaflib.runtime import make_runtime

        return make_runtime(self.config)

    def path(self, *parts: str) -> Path:
        """A path inside the run folder."""
        return self.folder.joinpath(*parts)

    def samples(self, split: Literal["train", "val"]) -> Samples:
        """The images and image labels of a split, without masks.

        Raises:
            DataError: if the data cannot be used.
        """
        from smaflib.data import load_samples

        return load_samples(self.config, split, self.folder)

    def mask_files(self, samples: Samples, folder: str = "masks") -> MaskFiles:
        """The masks that the run made of some samples, in their order: of ``masks`` or ``masks_segmenter``.

        Raises:
            DataError: if one is missing.
        """
        from smaflib.data import MaskFiles

        return MaskFiles([self.path(folder, f"{image_id}.png") for image_id in samples.image_ids])

    def record(self, stage: str, records: Iterable[dict[str, Any]]) -> None:
        """Write a stage's measurements to ``metrics.json``, in place of those it wrote before.

        Args:
            stage: the stage's name.
            records: each has ``metric`` and ``value`` (a float; IoU and its kin in [0, 1]; NaN becomes null) and any of
                ``variant``, ``split``, ``scale``, ``object_size``, ``class_name``, ``bg_score``.

        Raises:
            ValueError: if a record has an unknown key, lacks one, or holds a value out of range.
        """
        name = stage_named(stage, self.stages).name
        checked = [_checked_record({**record, "stage": name}) for record in records]
        others = [record for record in read_records(self) if record["stage"] != name]
        # Pipeline order, whatever the order in which stages ran.
        files.write_json(self.path("metrics.json"), sorted(others + checked, key=lambda record: record["stage"]))

    def metrics(self) -> pd.DataFrame:
        """All measurements so far, a row per record; ``pandas.read_json("metrics.json")`` gives the same."""
        table = pd.DataFrame(read_records(self), columns=list(RECORD_DEFAULTS))
        return table.astype({"scale": float, "bg_score": float, "value": float})

    def save_figure(self, figure: Figure, name: str) -> Path:
        """Save a figure as ``figures/<name>.png`` for the report; its title becomes the picture's description."""
        path = self.path("figures", f"{name}.png")
        description = figure.get_suptitle() or "; ".join(axes.get_title() for axes in figure.axes if axes.get_title())
        with files.replacing(path) as temporary:
            figure.savefig(temporary, dpi=110, bbox_inches="tight", metadata={"Description": description})
        return path

    def require(self, stage: str) -> None:
        """Check that the stages that ``stage`` needs have run.

        Raises:
            MissingStage: names the missing file and the command that makes it.
        """
        manifest = read_manifest(self)
        for name in stage_named(stage, self.stages).needs:
            needed = stage_named(name, self.stages)
            # A stage run by hand in JupyterLab has no entry; then its files have to speak for it.
            status = manifest["stages"].get(name, {}).get("status", "complete")
            absent = missing_essentials(self, needed)
            if status == "complete" and not absent:
                continue
            what = f"{absent[0]} is missing" if absent else f"{name} has not finished"
            raise MissingStage(
                f"{stage_named(stage, self.stages).name} needs {name}, but in {shown(self.folder)} {what}. "
                f"This command makes it:\n  {self.command('--until', name.partition('_')[2])}"
            )

    def command(self, *arguments: str) -> str:
        """The ``smaf run`` command of this run."""
        words = ["smaf", "run", shown(self.config_file), "--name", self.name]
        if self.folder.parent != RUNS_FOLDER:
            words += ["--runs", shown(self.folder.parent)]
        for override in self.overrides:
            words += ["--set", override]
        return shlex.join([*words, *arguments])


def open_run(
    run_dir: str | Path,
    config_file: str | Path,
    overrides: Sequence[str] = (),
    stage: str | None = None,
    stages: tuple[Stage, ...] = STAGES,
) -> Run:
    """Open a run folder, or begin it. Relative paths are relative to the checkout.

    Args:
        run_dir: the run folder.
        config_file: a YAML file of settings.
        overrides: ``key=value`` settings on top of it.
        stage: the stage about to run; what it needs must be there.
        stages: the chain; only tests use another one.

    Raises:
        ConfigError: if a setting does not exist or fit.
        FileNotFoundError: if there is no such config file.
        RunMismatch: if the folder belongs to other settings; the message lists them.
        MissingStage: if ``stage`` needs something that is not there.
        RunError: if the folder cannot be written.
    """
    config_file = absolute(config_file)
    config = load_config(config_file, list(overrides))
    run = Run(absolute(run_dir), config, config_file, tuple(overrides), stages)
    stored = run.path("config.yaml")
    if stored.is_file():
        _refuse_other_settings(run, _load_stored(stored))
    else:
        _begin(run)
    if not os.access(run.folder, os.W_OK):
        raise RunError(f"the run folder {shown(run.folder)} is not writable; change its rights or give another --name")
    if stage is not None:
        run.require(stage)
    return run


def read_run(folder: str | Path, stages: tuple[Stage, ...] = STAGES) -> Run:
    """Open an existing run folder with the settings that it holds.

    Raises:
        RunError: if it is no run folder.
    """
    folder = absolute(folder)
    stored = folder / "config.yaml"
    if not stored.is_file():
        raise RunError(f"{shown(folder)} is not a run folder: it holds no config.yaml")
    manifest = _read_json(folder / "manifest.json", {})
    config_file = absolute(manifest.get("config_file", stored))
    return Run(folder, _load_stored(stored), config_file, tuple(manifest.get("overrides", ())), stages)


def find_run(name: str, runs: Path = RUNS_FOLDER, stages: tuple[Stage, ...] = STAGES) -> Run:
    """A run by name or by path.

    Raises:
        RunError: if there is none; the message names those that exist.
    """
    for folder in (runs / name, Path(name).absolute()):
        if (folder / "config.yaml").is_file():
            return read_run(folder, stages)
    names = sorted(stored.parent.name for stored in runs.glob("*/config.yaml"))
    raise RunError(
        f"there is no run {name!r} in {shown(runs)}; there {'are ' + ', '.join(names) if names else 'is none'}"
    )


def absolute(path: str | Path) -> Path:
    """A path; a relative one is relative to the checkout."""
    return Path(os.path.normpath(PROJECT_ROOT / path))


def shown(path: Path) -> str:
    """A path as it is printed and recorded: relative to the checkout where it lies inside."""
    return str(path.relative_to(PROJECT_ROOT)) if path.is_relative_to(PROJECT_ROOT) else str(path)


def read_records(run: Run) -> list[dict[str, Any]]:
    """The records of ``metrics.json``; none if there is no such file."""
    records: list[dict[str, Any]] = _read_json(run.path("metrics.json"), [])
    return records


def _begin(run: Run) -> None:
    try:
        run.folder.mkdir(parents=True, exist_ok=True)
        files.write_text(run.path("config.yaml"), dump_config(run.config))
    except (FileExistsError, NotADirectoryError) as error:
        raise RunError(
            f"cannot make the run folder {shown(run.folder)}: a file of that name is in the way; "
            "move it or give another --name"
        ) from error
    except OSError as error:
        raise RunError(f"cannot write the run folder {shown(run.folder)}: {error.strerror or error}") from error


def _load_stored(stored: Path) -> Config:
    try:
        return load_config(stored)
    except ConfigError as error:
        raise RunError(f"the settings of an existing run no longer fit; give another --name.\n{error}") from error


def _refuse_other_settings(run: Run, stored: Config) -> None:
    if differences := config_differences(stored, run.config):
        listing = "\n".join(f"  {line}" for line in differences)
        raise RunMismatch(
            f"the run folder {shown(run.folder)} belongs to other settings (setting: there | now):\n{listing}\n"
            "Give another --name (in a notebook another run_dir), or delete the folder."
        )


def _checked_record(record: dict[str, Any]) -> dict[str, Any]:
    if unknown := sorted(set(record) - set(RECORD_DEFAULTS)):
        raise ValueError(f"a record has no {', '.join(unknown)}; its keys are {', '.join(RECORD_DEFAULTS)}")
    if absent := sorted({"metric", "value"} - set(record)):
        raise ValueError(f"a record needs {' and '.join(absent)}, got {record}")
    full = RECORD_DEFAULTS | record
    if full["object_size"] not in OBJECT_SIZES:
        raise ValueError(f"object_size must be one of {', '.join(OBJECT_SIZES)}, got {full['object_size']!r}")
    for key in ("scale", "bg_score", "value"):
        number = math.nan if full[key] is None else float(full[key])
        full[key] = number if math.isfinite(number) else None  # NaN is not JSON
    if full["metric"] in FRACTIONS and full["value"] is not None and not 0 <= full["value"] <= 1:
        raise ValueError(f"{full['metric']} must lie in [0, 1], got {full['value']}; percent only where printed")
    return full


# ------------------------------------------------------------------------------------------------------- the manifest


def read_manifest(run: Run) -> Entry:
    """The manifest; one without stages if nothing has run yet."""
    manifest: Entry = _read_json(run.path("manifest.json"), {})
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
    needed = {name: _passed_on(made.get(name, {})) for name in stage.needs}
    hashes = {
        "code": notebook_hash(notebook),
        "settings": _hash({key: settings[key] for key in stage.settings}),
        "needs": _hash(needed),
    }
    if "data" in stage.settings and (table := run.config.data.labels) is not None and table.is_file():
        hashes["labels"] = files.file_hash(table)
    if stage.reads:
        there = [name for name in stage.reads if run.path(name).is_file()]
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
        raise RunError(f"the notebook {shown(notebook)} is missing")
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
        raise RunError(f"{shown(notebook)} cannot be read as a notebook: {error!r}") from error


def library_hash() -> str:
    """SHA-256 of the library's own sources."""
    package = Path(__file__).parent
    return files.tree_hash([path for path in package.rglob("*.py") if "__pycache__" not in path.parts], package)


def list_artifacts(run: Run, stage: Stage) -> dict[str, Entry]:
    """Size and hash of everything a stage made, its executed notebook included; a folder is one entry."""
    page = f"{stage.name}.html"  # the report's, which is written after the stage and anew each time
    made = [path for path in _made_by(run, stage) if path.name != page]
    return {_key(run, path): _fingerprint(path) for path in made}


def record_hash(run: Run, stage: Stage) -> str:
    """SHA-256 of a stage's records in ``metrics.json``."""
    return _hash([record for record in read_records(run) if record["stage"] == stage.name])


def missing_essentials(run: Run, stage: Stage) -> list[str]:
    """The globs of a stage's essential artifacts that match no file."""
    return [
        pattern for pattern in stage.essential if not any(path.is_file() for path in run.folder.glob(_all_of(pattern)))
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
    reasons |= {"reads": f"{', '.join(stage.reads)} is new"} if stage.reads else {}
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
    if others := [record for record in read_records(run) if record["stage"] != stage.name]:
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
    return [f"{stage.name}.ipynb", f"{stage.name}.html", *stage.makes]


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


def _read_json(path: Path, default: Any) -> Any:
    if not path.is_file():
        return default
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise RunError(f"{shown(path)} is not valid JSON ({error}); delete it to run its stages again") from error

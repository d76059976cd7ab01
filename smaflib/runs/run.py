"""A run is a folder: its settings, what each stage made, and a manifest that proves which stages are complete.

Notebooks open a run with :func:`open_run`; :mod:`smaflib.runs.runner` executes notebooks and keeps the manifest.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smaflib import files
from smaflib.config import Config, config_differences, dump_config, load_config
from smaflib.errors import ConfigError, RunError
from smaflib.files import RUNS_FOLDER, absolute, display_path
from smaflib.plugins import search_in
from smaflib.runs.manifest import missing_outputs, read_manifest
from smaflib.runs.metrics import RECORD_DEFAULTS, checked_record, read_records, replace_records
from smaflib.runs.stages import STAGES, Stage, stage_named
from smaflib.workspace import Workspace

if TYPE_CHECKING:  # torch, pandas and matplotlib take seconds to import, and "smaf status" needs none
    import pandas as pd
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Run(Workspace):
    """A workspace whose stages are notebooks: a folder of its own, a manifest, measurements and figures.

    Attributes:
        folder: absolute path of the run folder.
        config: all settings.
        config_file: where they came from, for commands that are printed.
        overrides: the ``key=value`` settings given on top of the file.
        stages: the chain; only tests use another one.
    """

    config_file: Path = Path()
    overrides: tuple[str, ...] = ()
    stages: tuple[Stage, ...] = STAGES

    @property
    def name(self) -> str:
        return self.folder.name

    def record(self, stage: str, records: Iterable[dict[str, Any]]) -> None:
        """Write a stage's measurements to ``metrics.json``, in place of those it wrote before.

        Args:
            stage: the stage's name.
            records: each has ``metric`` and ``value`` (a float; IoU and its kin in [0, 1]; NaN becomes null) and any of
                ``variant``, ``split``, ``scale``, ``fusion``, ``object_size``, ``class_name``, ``bg_score``.

        Raises:
            ValueError: if a record has an unknown key, lacks one, or holds a value out of range.
        """
        name = stage_named(stage, self.stages).name
        checked = [checked_record({**record, "stage": name}) for record in records]
        replace_records(self.folder, name, checked)

    def metrics(self) -> pd.DataFrame:
        """All measurements so far, a row per record; ``pandas.read_json("metrics.json")`` gives the same."""
        import pandas as pd

        table = pd.DataFrame(read_records(self.folder), columns=list(RECORD_DEFAULTS))
        return table.astype({"fusion": object, "scale": float, "bg_score": float, "value": float})

    def save_figure(self, figure: Figure, name: str) -> Path:
        """Save a figure as ``figures/<name>.png`` for the report; its title becomes the picture's description.

        The file says whether it is a plot or holds pictures: a dark page turns the colours of a plot, not of a photo.
        """
        path = self.path("figures", f"{name}.png")
        description = figure.get_suptitle() or "; ".join(axes.get_title() for axes in figure.axes if axes.get_title())
        kind = "pictures" if any(axes.images for axes in figure.axes) else "plot"
        facts = {"Description": description, "Kind": kind}
        with files.replacing(path) as temporary:
            figure.savefig(temporary, dpi=110, bbox_inches="tight", metadata=facts)
        return path

    def require(self, stage: str) -> None:
        """Check that the stages that ``stage`` needs have run.

        Raises:
            RunError: names the missing file and the command that makes it.
        """
        manifest = read_manifest(self.folder)
        for name in stage_named(stage, self.stages).depends_on:
            needed = stage_named(name, self.stages)
            # A stage run by hand in JupyterLab has no entry; then only its files count.
            status = manifest["stages"].get(name, {}).get("status", "complete")
            absent = missing_outputs(self.folder, needed)
            if status == "complete" and not absent:
                continue
            what = f"{absent[0]} is missing" if absent else f"{name} has not finished"
            raise RunError(
                f"{stage_named(stage, self.stages).name} needs {name}, but in {display_path(self.folder)} {what}. "
                f"This command makes it:\n  {self.command('--until', name.partition('_')[2])}"
            )

    def command(self, *arguments: str) -> str:
        """The ``smaf run`` command of this run."""
        words = ["smaf", "run", display_path(self.config_file), "--name", self.name]
        if self.folder.parent != RUNS_FOLDER:
            words += ["--runs", display_path(self.folder.parent)]
        for override in self.overrides:
            words += ["--set", override]
        return shlex.join([*words, *arguments])


def run_folder(runs: Path, name: str) -> Path:
    """The folder of a run by its name.

    Raises:
        RunError: if the name is empty, too long or holds anything but letters, digits and ``_-.+``.
    """
    if not re.fullmatch(r"\w[\w.+-]*", name) or len(name.encode()) > 100:
        raise RunError(
            f"the run name {name[:100]!r} must be a plain folder name of at most 100 bytes: letters, digits, "
            "'_', '-', '.', '+'"
        )
    return absolute(runs) / name


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
        RunError: if the folder belongs to other settings, which the message lists, or cannot be written, or if
            ``stage`` needs something that is missing.
    """
    config_file = absolute(config_file)
    config = load_config(config_file, list(overrides))
    run = Run(absolute(run_dir), config, config_file, tuple(overrides), stages)
    stored = run.path("config.yaml")
    try:
        run.folder.mkdir(parents=True, exist_ok=True)
        if not stored.is_file():
            files.write_text(stored, dump_config(config))
    except OSError as error:
        raise RunError(f"cannot write the run folder {display_path(run.folder)}: {error.strerror or error}") from error
    if differences := config_differences(_load_stored(stored), config):
        listing = "\n".join(f"  {line}" for line in differences)
        raise RunError(
            f"the run folder {display_path(run.folder)} belongs to other settings (setting: there | now):\n{listing}\n"
            "Give another --name (in a notebook another run_dir), or delete the folder."
        )
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
        raise RunError(f"{display_path(folder)} is not a run folder: it holds no config.yaml")
    manifest = read_manifest(folder)
    config_file = absolute(manifest.get("config_file", stored))
    config = _load_stored(stored)
    if config.custom_code:
        search_in(config_file.parent)
    return Run(folder, config, config_file, tuple(manifest.get("overrides", ())), stages)


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
        f"there is no run {name!r} in {display_path(runs)}; there {'are ' + ', '.join(names) if names else 'is none'}"
    )


def _load_stored(stored: Path) -> Config:
    try:
        return load_config(stored)
    except ConfigError as error:
        raise RunError(f"the settings of an existing run no longer fit; give another --name.\n{error}") from error

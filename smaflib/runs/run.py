"""A run is a folder: its settings, what each stage made, and a manifest that proves which stages are complete.

Notebooks open a run with :func:`open_run`; :mod:`smaflib.runs.runner` executes notebooks and keeps the manifest.
"""

import re
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smaflib import files
from smaflib.config import config_differences, dump_config, listed, load_config
from smaflib.errors import RunError
from smaflib.files import RUNS_FOLDER, absolute, display_path, expanded, shown_path
from smaflib.plugins import search_in
from smaflib.runs.manifest import Record, made_by, missing_outputs, read_manifest, read_records, replace_records
from smaflib.runs.stages import STAGES, Stage, stage_named
from smaflib.workspace import Workspace

if TYPE_CHECKING:  # torch, pandas and matplotlib take seconds to import, and "smaf status" needs none
    import pandas as pd
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Run(Workspace):
    """A workspace whose stages are notebooks: a folder of its own, a manifest, measurements and figures."""

    config_file: Path = Path()  # where the settings came from, for commands that are printed
    overrides: tuple[str, ...] = ()  # the key=value settings given on top of the file
    stages: tuple[Stage, ...] = STAGES  # the chain; only tests use another one

    @property
    def name(self) -> str:
        return self.folder.name

    def record(self, stage: str, records: Iterable[dict[str, Any]]) -> None:
        """Write a stage's measurements, each a :class:`~smaflib.runs.manifest.Record`, in place of its earlier ones."""
        name = stage_named(stage, self.stages).name
        replace_records(self.folder, name, [Record(**record | {"stage": name}).model_dump() for record in records])

    def metrics(self) -> "pd.DataFrame":
        """All measurements so far, a row per record; ``pandas.read_json("metrics.json")`` gives the same."""
        import pandas as pd

        table = pd.DataFrame(read_records(self.folder), columns=list(Record.model_fields))
        table = table.astype({"fusion": object, "scale": float, "bg_score": float, "value": float})
        table.attrs["supervision"] = self.config.supervision  # tables show it below their numbers
        return table

    def save_figure(self, figure: "Figure", name: str) -> Path:
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
        """Check that the stages that ``stage`` needs have run; a RunError names the command that runs them."""
        manifest = read_manifest(self.folder)
        for name in stage_named(stage, self.stages).depends_on:
            # A stage run by hand in JupyterLab has no entry; then only its files count.
            status = manifest["stages"].get(name, {}).get("status", "complete")
            absent = missing_outputs(self.folder, stage_named(name, self.stages))
            if absent or status != "complete":
                what = f"{absent[0]} is missing" if absent else "it has not finished"
                command = self.command("--until", name.partition("_")[2])
                where = shown_path(self.folder)
                raise RunError(f"{stage} needs {name}, but in {where} {what}. This command makes it:\n  {command}")

    def command(self, *arguments: str) -> str:
        """The ``smaf run`` command of this run."""
        words = ["smaf", "run", display_path(self.config_file), "--name", self.name]
        if self.folder.parent != RUNS_FOLDER:
            words += ["--runs", shown_path(self.folder.parent)]
        for override in self.overrides:
            words += ["--set", override]
        return shlex.join([*words, *arguments])


def run_folder(runs: Path, name: str) -> Path:
    """The folder of a run by its name, a plain folder name; RunError if it is none."""
    if not re.fullmatch(r"\w[\w.+-]{,99}", name):
        raise RunError(f"the run name {name!r} must be a plain folder name: letters, digits, '_', '-', '.', '+'")
    return absolute(runs) / name


def open_run(
    run_dir: str | Path,
    config_file: str | Path = "",
    overrides: str | Sequence[str] | None = (),
    stage: str | None = None,
    stages: tuple[Stage, ...] = STAGES,
) -> Run:
    """Open a run folder, or begin it, with ``key=value`` overrides on top of a YAML file of settings.

    Without a file the settings are the run's own, and those of ``configs/mini.yaml`` in a new folder. Relative paths
    are relative to the checkout. What the ``stage`` about to run needs must be there.

    Raises:
        ConfigError: if a setting does not exist or fit.
        FileNotFoundError: if there is no such config file.
        RunError: if the folder belongs to other settings, which the message lists, or what ``stage`` needs is missing.
    """
    stored = absolute(run_dir) / "config.yaml"
    config_file = absolute(config_file or (stored if stored.is_file() else "configs/mini.yaml"))
    config = load_config(config_file, overrides)
    run = Run(stored.parent, config, config_file, listed(overrides), stages)
    # A folder in which no stage has made what later ones read belongs to nobody.
    if not stored.is_file() or not any(made_by(run.folder, each) for each in stages if each.required_outputs):
        files.write_text(stored, dump_config(config))
    if differences := config_differences(load_config(stored), config):
        listing = "\n".join(f"  {line}" for line in differences)
        raise RunError(
            f"the run folder {shown_path(run.folder)} belongs to other settings (setting: there | now):\n{listing}\n"
            "Give another --name (in a notebook another run_dir), or delete the folder."
        )
    if stage is not None:
        run.require(stage)
    return run


def read_run(folder: str | Path) -> Run:
    """Open an existing run folder with the settings that it holds; RunError if it is none."""
    folder = absolute(folder)
    stored = folder / "config.yaml"
    if not stored.is_file():
        raise RunError(f"{shown_path(folder)} is not a run folder: it holds no config.yaml")
    manifest, config = read_manifest(folder), load_config(stored)
    config_file = absolute(manifest.get("config_file", stored))
    if config.custom_code:
        search_in(config_file.parent)
    return Run(folder, config, config_file, tuple(manifest.get("overrides", ())))


def find_run(name: str, runs: Path = RUNS_FOLDER) -> Run:
    """A run by name or by path; a RunError that names those that exist if there is none."""
    for folder in (runs / name, expanded(name).absolute()):
        if (folder / "config.yaml").is_file():
            return read_run(folder)
    names = ", ".join(sorted(stored.parent.name for stored in runs.glob("*/config.yaml")))
    raise RunError(f"there is no run {name!r} in {shown_path(runs)}; there are: {names or 'none'}")

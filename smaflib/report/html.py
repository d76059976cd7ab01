"""The report of a run: HTML pages that load nothing from a network."""

from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
from PIL import Image

from smaflib import files
from smaflib.config import dump_config
from smaflib.files import duration
from smaflib.report.tables import chain_rows, class_table, conclusion, folded, headline, results_table
from smaflib.runs import Run
from smaflib.runs.manifest import read_manifest
from smaflib.runs.stages import Stage

FIRST_FIGURE = "00_scales"  # of the report

CAPTIONS = {  # of figures, by file name
    FIRST_FIGURE: "Compare smallest and largest scale: which finds the small object, which the large one whole?",
    "00_mask": "From hesitant attention to a sharp mask. White: the ground truth's outline, which no step read.",
    "01_images_per_class": "A class with few images is learned badly.",
    "01_samples": "The labels above the images are all that the method is told about them.",
    "01_object_sizes": "Dotted: the limits of small and large objects in all tables below.",
    "02_learning_curves": "The loss should fall and level off.",
    "02_attention": "Look for objects of which the bright area covers one part only.",
    "03_scales": "The same objects at every scale: follow the IoU from left to right, for small and for large ones.",
    "03_object_sizes": "Is the scale that is best for small objects also the best for large ones?",
    "03_objects": "Where the lines cross, the best scale changes.",
    "03_background_score": "Only the ground truth tells where a curve peaks; dotted is what the run chose without it.",
    "04_steps": "Denoising removes classes that are not in the image; reactivation makes what is left certain.",
    "04_row": "The highest line of each pixel is at 1 in the last row: that is what the student learns.",
    "05_learning_curves": "The student, and the control that learns from one scale alone.",
    "05_student": "Compare teacher and student at the same scale: what has the student added, and was it right?",
    "05_changes": "Blue was gained by self-training, orange was lost; these images are the extremes.",
    "06_kernels": "Pixels that influence the marked one: near pixels, and pixels of similar colour.",
    "06_pseudo_masks": "The borders move to where colours change. Compare with the last column, the ground truth.",
    "06_crf_parameters": "Coloured pixels change their label with one parameter. White: this run's mask.",
    "07_learning_curves": "The segmentation network learns the pseudo masks, mistakes included.",
    "07_segmentation": "Images that the network was not trained on, and without any label.",
    "08_sizes": "What each stage gains, for small, medium and large objects.",
    "08_best_cases": "The best images by mean IoU.",
    "08_worst_cases": "The worst images: a part for the whole, a neighbour, or a wrong class?",
    "08_learning_curves": "All trainings of the run.",
    "08_ablation": "Each dot is a seed. A step has shown its worth if it moves the dots by more than they spread.",
}


def write_index(run: Run, command: str | None = None) -> Path:
    """Write ``index.html``, and a page without code for each executed notebook, into the run's folder.

    ``command`` repeats the run; by default it is ``smaf run`` with the run's settings. Returns the path of the index.
    """
    from smaflib.report.notebook import notebook_body  # a second to import

    manifest, metrics = read_manifest(run.folder), run.metrics()
    stages = [_stage_facts(run, stage, manifest["stages"].get(stage.name, {})) for stage in run.stages]
    figures = [figure for stage in stages for figure in stage["figures"]]
    pages = [stage for stage in stages if stage["page"]]
    for before, stage, after in zip([None, *pages], pages, [*pages[1:], None], strict=False):
        body = notebook_body(run.path(f"{stage['name']}.ipynb"))
        facts = {"run": run, "stage": stage, "body": body, "previous": before, "next": after}
        write_page(run.path(stage["page"]), "notebook.html.j2", **facts)
    if figures:
        captions = [f"- `{figure['path']}`: {figure['caption']}\n" for figure in figures]
        files.write_text(run.path("figures", "README.md"), "# Figures\n\n" + "".join(captions))
    return write_page(
        run.path("index.html"),
        "index.html.j2",
        run=run,
        manifest=manifest,
        stages=stages,
        total=duration(sum(stage["seconds"] or 0 for stage in stages)),
        headline=headline(metrics),
        first=next((figure for figure in figures if figure["name"] == FIRST_FIGURE), None),
        results=_folded(results_table(metrics), run),
        explorer="explorer.html" if run.path("explorer.html").is_file() else None,
        classes=_folded(class_table(metrics), run),
        config=dump_config(run.config),
        command=command or run.command(),
    )


def page_text(template: str, **values: Any) -> str:
    """One of ``templates/``, filled."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("smaflib.report"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["duration"] = duration
    return environment.get_template(template).render(**values)


def write_page(path: Path, template: str, **values: Any) -> Path:
    """Fill one of ``templates/`` and write it."""
    files.write_text(path, page_text(template, **values))
    return path


def _stage_facts(run: Run, stage: Stage, entry: dict[str, Any]) -> dict[str, Any]:
    number, _, word = stage.name.partition("_")
    figures = sorted(path for path in run.path("figures").glob(f"{number}_*") if path.suffix in (".png", ".webp"))
    recorded = dict.fromkeys(("reused_from", "seconds")) | {"status": "not run"} | entry
    return recorded | {
        "name": stage.name,
        "number": number,
        "title": word.replace("_", " "),
        "question": stage.question,
        "sentence": conclusion(run, number) if recorded["status"] == "complete" and number != "00" else "",
        "page": f"{stage.name}.html" if run.path(f"{stage.name}.ipynb").is_file() else None,
        "figures": [_figure_facts(path) for path in figures],
    }


def _figure_facts(path: Path) -> dict[str, Any]:
    caption = CAPTIONS.get(path.stem, path.stem.partition("_")[2].replace("_", " "))
    with Image.open(path) as image:
        description = str(image.info.get("Description") or caption)
        return {
            "name": path.stem,
            "path": f"figures/{path.name}",
            "caption": caption,
            "alt": " ".join(description.split()),
            "plot": image.info.get("Kind") == "plot",
            "width": image.width,
            "height": image.height,
        }


def _folded(table: pd.DataFrame, run: Run) -> str:
    return "" if table.empty else folded(table, chain_rows(table, run.config.attention)).data

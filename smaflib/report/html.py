"""The report of a run: HTML pages that load nothing from a network."""

from __future__ import annotations

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

CAPTIONS = files.read_json(Path(__file__).parent / "templates" / "captions.json", {})  # of figures, by file name


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
        peak=max((stage["peak_memory_mb"] or 0 for stage in stages), default=0),
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
    recorded = dict.fromkeys(("reused_from", "seconds", "peak_memory_mb")) | {"status": "not run"} | entry
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

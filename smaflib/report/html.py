"""The report of a run: pages that a browser reads without a network."""

from __future__ import annotations

import re
import warnings
from html import escape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
from PIL import Image

from smaflib import files
from smaflib.config import dump_config
from smaflib.files import duration
from smaflib.report.tables import class_table, labelled, results_table
from smaflib.runs import Run
from smaflib.runs.manifest import read_manifest
from smaflib.runs.stages import Stage


def write_index(run: Run, command: str | None = None) -> Path:
    """Write ``index.html`` and, for each executed notebook, a page without code.

    Args:
        run: whose folder takes them.
        command: that makes it again; by default ``smaf run`` with the run's settings.

    Returns:
        The path of ``index.html``.
    """
    from smaflib.report.notebook import notebook_body  # a second to import, and the explorer's page needs none of it

    manifest = read_manifest(run.folder)
    metrics = run.metrics()
    stages = [_stage_facts(run, stage, manifest["stages"].get(stage.name, {})) for stage in run.stages]
    pages = [stage for stage in stages if stage["page"]]
    for number, stage in enumerate(pages):
        neighbours = {"previous": pages[number - 1] if number else None, "next": (pages + [None])[number + 1]}
        body = notebook_body(run.path(f"{stage['name']}.ipynb"))
        write_page(run.path(stage["page"]), "notebook.html.j2", run=run, stage=stage, body=body, **neighbours)
    return write_page(
        run.path("index.html"),
        "index.html.j2",
        run=run,
        manifest=manifest,
        stages=stages,
        pages=pages,
        total=duration(sum(stage["seconds"] or 0 for stage in stages)),
        peak=max((stage["peak_memory_mb"] or 0 for stage in stages), default=0),
        results=_table_html(results_table(metrics), "IoU, precision and recall in percent", best=True),
        explorer="explorer.html" if run.path("explorer.html").is_file() else None,
        classes=_table_html(class_table(metrics), "IoU by class, in percent"),
        config=dump_config(run.config),
        command=command or run.command(),
    )


def network_references(html: str) -> list[str]:
    """What a page would load from a network; links that a reader may click do not count."""
    finder = _Loads()
    finder.feed(html)
    return finder.found


class _Loads(HTMLParser):
    """Collects addresses that a browser loads by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self._inside = ""

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self._inside = tag if tag in ("style", "script") else ""
        for name, value in attributes:
            loads = name in ("src", "srcset", "poster", "data", "action") or (
                name == "href" and tag not in ("a", "area")
            )
            if loads and re.match(r"\s*(https?:)?//", value or ""):
                self.found.append(f"{tag} {name}={value}")
            if name == "style":
                self._find_in_css(value or "")
            if name == "srcdoc":
                self.found += network_references(value or "")

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "style":
            self._find_in_css(data)
        elif self._inside == "script":
            self.found += re.findall(r"https?://[^\s\"')]+", data)

    def _find_in_css(self, css: str) -> None:
        self.found += re.findall(r"(?:@import|url\()\s*[\"']?(?:https?:)?//[^\s\"')]+", css)


def page_text(template: str, **values: Any) -> str:
    """One of ``templates/``, filled."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("smaflib.report"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["duration"] = duration
    return environment.get_template(template).render(**values)


def write_page(path: Path, template: str, **values: Any) -> Path:
    """Fill one of ``templates/`` and write it, all or nothing; warns if the page asks for anything from the network."""
    html = page_text(template, **values)
    if found := network_references(html):
        warnings.warn(f"{path.name} cannot be read in full without a network: {', '.join(found)}", stacklevel=2)
    files.write_text(path, html)
    return path


def _stage_facts(run: Run, stage: Stage, entry: dict[str, Any]) -> dict[str, Any]:
    number, _, word = stage.name.partition("_")
    figures = sorted(path for path in run.path("figures").glob(f"{number}_*") if path.suffix in (".png", ".webp"))
    return {
        "name": stage.name,
        "number": number,
        "title": word.replace("_", " "),
        "question": stage.question,
        "status": entry.get("status", "not run"),
        "reused_from": entry.get("reused_from"),
        "seconds": entry.get("seconds"),
        "peak_memory_mb": entry.get("peak_memory_mb"),
        "page": f"{stage.name}.html" if run.path(f"{stage.name}.ipynb").is_file() else None,
        "figures": [_figure_facts(path) for path in figures],
    }


def _figure_facts(path: Path) -> dict[str, Any]:
    caption = path.stem.partition("_")[2].replace("_", " ")
    with Image.open(path) as image:
        description = str(image.info.get("Description") or caption)
        return {
            "path": f"figures/{path.name}",
            "caption": caption,
            "alt": " ".join(description.split()),
            "width": image.width,
            "height": image.height,
        }


def _table_html(table: pd.DataFrame, caption: str, best: bool = False) -> str:
    """A table of percentages; with ``best`` the highest number of each column and split stands out."""
    if table.empty:
        return ""
    table = labelled(table)
    named = "".join(f"<th scope='col' class='name'>{escape(str(name))}</th>" for name in table.index.names)
    head = named + "".join(f"<th scope='col'>{escape(str(name))}</th>" for name in table.columns)
    highest = table.groupby(level="split").transform("max")
    rows = []
    for key, values, tops in zip(table.index, table.to_numpy(), highest.to_numpy(), strict=True):
        cells = [f"<th scope='row'>{escape(str(part))}</th>" for part in key]
        for value, top in zip(values, tops, strict=True):
            mark = " class='best'" if best and value == top else ""
            cells.append(f"<td{mark}>{'–' if pd.isna(value) else f'{value:.1f}'}</td>")
        rows.append(f"<tr>{''.join(cells)}</tr>")
    head = f"<caption>{escape(caption)}</caption><thead><tr>{head}</tr></thead>"
    return f"<table>{head}<tbody>{''.join(rows)}</tbody></table>"

"""Pages of the documentation that are made, not written: tutorial, API, command line, settings.

``docs/conf.py`` calls :func:`write_pages` before each build. What it makes lies in ``docs/generated``; git ignores it.
"""

from __future__ import annotations

import ast
import inspect
import io
import json
import re
import shutil
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import latex2mathml.converter
import typer
from pydantic import BaseModel
from typer.cli import get_docs_for_click

from smaflib import config as schema
from smaflib.apps.cli import app
from smaflib.files import RUNS_FOLDER, write_text
from smaflib.runs.stages import STAGES

NINE = "open_image wrap multi_scale_cams fuse_cams denoise reactivate pseudo_mask show_scales evaluate".split()
"""What a newcomer calls, in that order; the API page begins with it."""

API = {
    "Attention maps": ("cams", "maps"),
    "Denoising and reactivation": ("reactivation", "thresholds"),
    "Training": ("classifier", "self_training", "segmentation", "training"),
    "Pseudo masks and their refinement": (
        "pseudo_masks",
        "refinement.crf",
        "refinement.par",
        "refinement.parallel",
    ),
    "Evaluation": ("evaluation", "report.tables"),
    "Data": ("data", "data.sample", "data.masks", "data.transforms", "data.views"),
    "Networks": ("models.networks", "models.backbones", "models.pretrained", "models.wrap"),
    "Attention sources": (
        "sources",
        "sources.imagenet",
        "sources.gradcam",
        "sources.vit",
        "sources.clip",
        "sources.caa",
    ),
    "Figures and the explorer": (
        "report.plots",
        "explorer.state",
        "explorer.widget",
        "explorer.page",
        "explorer.sliders",
    ),
    "The chain over a folder": ("pipeline", "workspace", "runs.run", "runtime"),
}
"""Modules whose public names are documented, by the part of the method that they belong to."""

TUTORIAL = """# Tutorial

The notebooks as executed in the reference run, on drawn images. Each asks one question, answers it with a picture,
and ends with two exercises whose solutions are folded. `make lab` opens them.

```{{toctree}}
:maxdepth: 1

{}
```
"""


def write_pages(folder: Path) -> None:
    """Make every page anew; what was made before goes."""
    shutil.rmtree(folder, ignore_errors=True)
    for stage in STAGES:
        write_tutorial(folder / "tutorial", f"{stage.name}.ipynb")
    write_text(folder / "tutorial" / "index.md", TUTORIAL.format("\n".join(stage.name for stage in STAGES)))
    write_text(folder / "api.md", api_page())
    write_text(folder / "command_line.md", command_line_page())
    write_text(folder / "settings.md", settings_page())


# ------------------------------------------------------------------------------------------------------------ tutorial


def write_tutorial(folder: Path, name: str) -> None:
    """An executed notebook of the reference run, as the site shows it."""
    notebook = json.loads((RUNS_FOLDER / "reference" / name).read_text(encoding="utf-8"))
    for cell in notebook["cells"]:
        tags = set(cell["metadata"].get("tags", []))
        hidden = {"parameters", "injected-parameters", "exercise", "check"} & tags
        folded = {"solution"} & tags
        cell["metadata"]["tags"] = [*tags, *(["remove-cell"] if hidden else []), *(["hide-cell"] if folded else [])]
        if cell["cell_type"] == "markdown":
            cell["source"] = without_missing_links("".join(cell["source"]))
    write_text(folder / name, json.dumps(notebook, indent=1))


def without_missing_links(text: str) -> str:
    """Links to files of a run or of the checkout become plain text: they are not part of the site."""
    return re.sub(r"(?<!!)\[([^\]]+)\]\((?!https?://|#)[^)]*\)", r"\1", text)


# ----------------------------------------------------------------------------------------------------------- reference


def api_page() -> str:
    """Docstrings of every public module, for autodoc to fill in."""
    lines = [f".. autofunction:: smaflib.{name}\n   :noindex:" for name in NINE]
    begin = (
        "Nine functions take an image and a classifier to a mask, its picture and its score; `import smaflib` has them."
    )
    parts = [f"# API\n\n{begin}\n\n" + "\n".join(["```{eval-rst}", *lines, "```"])]
    for title, modules in API.items():
        parts.append(f"## {title}")
        for module in modules:
            options = ("members", "ignore-module-all", "member-order: bysource")  # what it imports is elsewhere
            lines = [f".. automodule:: smaflib.{module}", *(f"   :{each}{':' * (':' not in each)}" for each in options)]
            parts.append("\n".join([f"### `smaflib.{module}`", "", "```{eval-rst}", *lines, "```"]))
    return "\n\n".join(parts) + "\n"


def command_line_page() -> str:
    """Every command with its options, as ``--help`` says them."""
    command = typer.main.get_command(app)
    context = command.make_context("smaf", ["--help"], resilient_parsing=True)
    text = get_docs_for_click(obj=command, ctx=cast(Any, context), name="smaf")
    return re.sub(r"^# `smaf`", "# The command `smaf`", text, count=1)


def settings_page() -> str:
    """Every setting with its type, default and the comment that stands at it in the schema."""
    parts = ["# Settings", "A config file in `configs/` holds them, `--set key=value` sets one for a run."]
    for path, model in models(schema.Config):
        notes = comments_of(model)
        lines = ["| setting | type | default | |", "|---|---|---|---|"]
        for name, annotation, default in declared(model):
            cells = [f"`{path}{name}`", f"`{annotation}`", f"`{default}`", notes.get(name, "")]
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        parts.append(f"## {path.rstrip('.') or 'the run'}\n\n{inspect.cleandoc(model.__doc__ or '')}")
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def models(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, type[BaseModel]]]:
    """A model of settings and those inside it, each with what stands before its settings."""
    yield prefix, model
    for name, field in model.model_fields.items():
        inner = field.annotation
        if inspect.isclass(inner) and issubclass(inner, BaseModel):
            yield from models(inner, f"{prefix}{name}.")


def declared(model: type[BaseModel]) -> Iterator[tuple[str, str, str]]:
    """Name, type and default of a model's settings, base classes first, as the source writes them."""
    for cls in reversed(model.__mro__):
        if issubclass(cls, schema.StageConfig) and cls is not schema.StageConfig:
            tree = ast.parse(inspect.getsource(cls)).body[0]
            assert isinstance(tree, ast.ClassDef)
            for node in tree.body:
                if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                    default = ast.unparse(node.value) if node.value else "none: must be given"
                    kind = re.sub(r"Annotated\[(.+), Field\((.+)\)\]", r"\1, \2", ast.unparse(node.annotation))
                    yield node.target.id, kind, default


def comments_of(model: type[BaseModel]) -> dict[str, str]:
    """The comments above and behind each setting of a model."""
    notes: dict[str, str] = {}
    for cls in reversed(model.__mro__):
        if not issubclass(cls, schema.StageConfig):
            continue
        above: list[str] = []
        lines: dict[int, str] = {}
        source = inspect.getsource(cls)
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            if token.type == tokenize.COMMENT:
                lines[token.start[0]] = token.string.lstrip("# ")
        for number, line in enumerate(source.splitlines(), start=1):
            name = re.match(r"    (\w+): ", line)
            if name:
                notes[name[1]] = " ".join([*above, *([lines[number]] if number in lines else [])])
                above = []
            elif line.strip().startswith("#"):
                above.append(lines[number])
            else:
                above = []
    return notes


# ---------------------------------------------------------------------------------------------------------------- math


def mathml(formula: str, display: str) -> str:
    """A LaTeX formula as MathML, which browsers show without a script from elsewhere."""
    return latex2mathml.converter.convert(formula, display=display)

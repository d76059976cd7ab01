"""Copy the readable parts of a run into ``papermill_runs/reference``, the one run that git keeps: ``make reference``.

Executed notebooks, pages, tables and figures; no checkpoints, maps or masks. Pictures are recompressed, because git
keeps every version: JPEG or PNG in notebooks, WebP elsewhere.
"""

from __future__ import annotations

import base64
import copy
import dataclasses
import io
import json
import re
import shutil
import sys
import tempfile
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from smaflib import files
from smaflib.apps.ablation import command
from smaflib.errors import RunError
from smaflib.files import PROJECT_ROOT, RUNS_FOLDER, display_path
from smaflib.report.html import write_index
from smaflib.runs import Run, read_run
from smaflib.runs.manifest import read_manifest
from smaflib.runs.stages import ABLATION

REFERENCE = RUNS_FOLDER / "reference"
MAX_BYTES = 6_000_000
NOTEBOOK_WIDTH = 1000  # pixels; wider pictures in notebooks are shrunk
JPEG_QUALITY, WEBP_QUALITY = 60, 60

README = """# The reference run

The mini preset with seed 0 and its ablation, made by `make reference`. Open `index.html` in a browser (it needs no
network), or the notebooks on GitHub or in JupyterLab. `metrics.json` and `ablation/ablation.json` hold the numbers,
`config.yaml` the settings.

`manifest.json` also lists artifacts that are too large for a repository (checkpoints, attention maps, masks); its
hashes are those of the original pictures and notebooks, which are recompressed here. Do not edit this folder, and do
not run into it.
"""


def export_reference(run_folder: Path, target: Path = REFERENCE) -> Path:
    """Copy the readable parts of a complete run with an ablation, replacing the target.

    Raises:
        RunError: if a stage or the ablation is missing, or the result is larger than :data:`MAX_BYTES`.
    """
    run = read_run(run_folder)
    _check_complete(run)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".reference-") as work:
        folder = Path(work) / target.name
        folder.mkdir()
        explorer = ["explorer.html"] if run.path("explorer.html").is_file() else []
        for name in ("config.yaml", "metrics.json", "manifest.json", ABLATION, *explorer):
            files.write_text(folder / name, without_local_paths(run.path(name).read_text(encoding="utf-8")))
        (folder / "figures").mkdir()
        for picture in sorted(run.path("figures").glob("*.png")):
            (folder / "figures" / f"{picture.stem}.webp").write_bytes(to_webp(picture.read_bytes()))
        _write_notebooks_and_pages(run, folder)
        files.write_text(folder / "README.md", README)
        size = folder_size(folder)
        if size > MAX_BYTES:
            raise RunError(
                f"the reference run would have {size / 1e6:.1f} MB; at most {MAX_BYTES / 1e6:.0f} MB may be kept"
            )
        shutil.rmtree(target, ignore_errors=True)
        shutil.move(folder, target)
    return target


def folder_size(folder: Path) -> int:
    """Bytes of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def without_local_paths(text: str) -> str:
    """Make paths of this machine relative to the checkout."""
    return text.replace(f"{PROJECT_ROOT}/", "").replace(str(PROJECT_ROOT), ".")


def code_of(notebook: Path) -> list[str]:
    """Sources of a notebook's code cells, without the parameters that papermill injects."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return [
        "".join(cell["source"])
        for cell in cells
        if cell["cell_type"] == "code" and "injected-parameters" not in cell["metadata"].get("tags", [])
    ]


def _check_complete(run: Run) -> None:
    stages = read_manifest(run.folder)["stages"]
    missing = [stage.name for stage in run.stages if stages.get(stage.name, {}).get("status") != "complete"]
    if missing:
        raise RunError(
            f"{display_path(run.folder)} is not complete: {', '.join(missing)}; run it first:\n  {run.command()}"
        )
    if not run.path(ABLATION).is_file():
        raise RunError(f"{display_path(run.folder)} has no ablation; make it first:\n  {command(run)}")
    if "08_ablation" not in {path.stem for path in run.path("figures").glob("*.png")}:
        raise RunError(f"notebook 08 has not shown the ablation yet:\n  {run.command()}")


def _write_notebooks_and_pages(run: Run, folder: Path) -> None:
    """Write pages from notebooks whose pictures are files, then the notebooks with recompressed pictures."""
    originals = {}
    for stage in run.stages:
        name = f"{stage.name}.ipynb"
        originals[name] = json.loads(without_local_paths(run.path(name).read_text(encoding="utf-8")))
        files.write_json(folder / name, _for_page(originals[name], folder / "figures"))
    write_index(dataclasses.replace(run, folder=folder), command="make reference")
    for name, notebook in originals.items():
        files.write_json(folder / name, _packed(notebook))


def _for_page(notebook: dict[str, Any], figures: Path) -> dict[str, Any]:
    """A copy whose pictures are files in ``figures/`` where the run saved them, else WebP inside the page."""
    changed, heading = copy.deepcopy(notebook), "figure"
    for cell in changed["cells"]:
        source = "".join(cell["source"])
        if titles := re.findall(r"^#+ (.+)$", source, re.MULTILINE):
            heading = titles[-1] if cell["cell_type"] == "markdown" else heading
        saved = re.findall(r'save_figure\([^)]*"(\w+)"\)', source)
        for output in cell.get("outputs", []):
            if "image/png" not in output.get("data", {}):
                continue
            webp = to_webp(base64.b64decode(output["data"]["image/png"]))
            address = f"data:image/webp;base64,{base64.b64encode(webp).decode()}"
            if len(saved) == 1 and (figures / f"{saved[0]}.webp").is_file():
                address = f"figures/{saved[0]}.webp"
            output["data"] = {"text/html": [f'<img src="{address}" alt="{escape(heading, quote=True)}">']}
    return changed


def _packed(notebook: dict[str, Any]) -> dict[str, Any]:
    """A copy with small pictures."""
    changed = copy.deepcopy(notebook)
    for cell in changed["cells"]:
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):
                kind, packed = to_small(base64.b64decode(output["data"].pop("image/png")))
                output["data"] = {kind: base64.b64encode(packed).decode(), **output["data"]}
                output["metadata"] = {}  # the size in pixels of the original
    return changed


def to_webp(png: bytes) -> bytes:
    """A picture as lossy WebP."""
    return _encoded(Image.open(io.BytesIO(png)).convert("RGB"), "webp", quality=WEBP_QUALITY, method=6)


def to_small(png: bytes) -> tuple[str, bytes]:
    """MIME type and bytes of a picture for a notebook: PNG of 256 colours or JPEG, whichever is smaller."""
    picture = Image.open(io.BytesIO(png)).convert("RGB")
    if picture.width > NOTEBOOK_WIDTH:
        height = round(picture.height * NOTEBOOK_WIDTH / picture.width)
        picture = picture.resize((NOTEBOOK_WIDTH, height), Image.Resampling.LANCZOS)
    packed = {
        "image/png": _encoded(picture.quantize(256, dither=Image.Dither.NONE), "png", optimize=True),
        "image/jpeg": _encoded(picture, "jpeg", quality=JPEG_QUALITY, optimize=True),
    }
    kind = min(packed, key=lambda kind: len(packed[kind]))
    return kind, packed[kind]


def _encoded(picture: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


if __name__ == "__main__":
    print(f"reference run: {display_path(export_reference(Path(sys.argv[1]).absolute()))}")

"""The reference run that git keeps is that of the present notebooks; and its export."""

from __future__ import annotations

import base64
import functools
import io
import json
import re
from pathlib import Path

import nbformat
import numpy as np
import pytest
from helpers import network_references
from nbformat import v4
from PIL import Image

from smaflib.files import PROJECT_ROOT
from smaflib.runs import Run, open_run
from smaflib.runs.manifest import write_manifest
from smaflib.runs.stages import ABLATION, STAGES
from tools.export_reference_run import (
    MAX_BYTES,
    REFERENCE,
    code_of,
    export_reference,
    folder_size,
)

NAMES = [stage.name for stage in STAGES]
RENEW = "this command renews it: make reference"


def dangling(folder: Path) -> list[str]:
    """Addresses in pages that lead to no file."""
    found = []
    for page in folder.glob("*.html"):
        for address in re.findall(r'(?:href|src)="([^"#:]+)(?:#[^"]*)?"', page.read_text()):
            if not (folder / address).is_file():
                found.append(f"{page.name}: {address}")
    return found


# --- the one that git keeps -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_reference_run_has_the_code_of_the_notebook(name: str) -> None:
    executed = REFERENCE / f"{name}.ipynb"
    assert executed.is_file(), f"{executed} is missing; {RENEW}"
    assert code_of(executed) == code_of(PROJECT_ROOT / "notebooks" / f"{name}.ipynb"), f"{name} has changed; {RENEW}"


def test_reference_run_is_small_and_reads_without_a_network_or_this_machine() -> None:
    assert (REFERENCE / "index.html").is_file(), f"papermill_runs/reference is missing; {RENEW}"
    assert folder_size(REFERENCE) <= MAX_BYTES
    assert dangling(REFERENCE) == []
    for path in REFERENCE.rglob("*"):
        if path.suffix in (".html", ".ipynb", ".json", ".yaml", ".md"):
            text = path.read_text(encoding="utf-8")
            assert not re.search(r"[\"' (=](/home/|/root/|/work/|/Users/)", text), f"{path} names a folder of a machine"
        if path.suffix == ".html":
            assert network_references(path.read_text(encoding="utf-8")) == []


def test_reference_run_is_the_mini_preset_with_its_ablation() -> None:
    assert (REFERENCE / "config.yaml").is_file(), f"papermill_runs/reference is missing; {RENEW}"
    manifest = json.loads((REFERENCE / "manifest.json").read_text())
    assert manifest["config_file"] == "configs/mini.yaml" and manifest["seed"] == 0
    assert json.loads((REFERENCE / ABLATION).read_text())["seeds"] == [0, 1, 2]


# --- the export -------------------------------------------------------------------------------------------------------


@functools.cache
def png(width: int = 1200, height: int = 100) -> bytes:
    """Noise, as photos have it."""
    pixels = np.random.default_rng(0).normal(128, 20, (height, width, 3)).clip(0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png")
    return buffer.getvalue()


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A folder that looks like a complete run."""
    run = open_run(tmp_path / "runs" / "whole", PROJECT_ROOT / "configs" / "mini.yaml")
    picture = base64.b64encode(png()).decode()
    for stage in STAGES:
        cells = [v4.new_markdown_cell("## What it shows")]
        for code in (f'run.save_figure(figure, "{stage.name[:2]}_thing")', "another_figure"):
            outputs = [
                v4.new_output("display_data", data={"image/png": picture}, metadata={}),
                v4.new_output("stream", name="stdout", text=f"read {PROJECT_ROOT}/configs/mini.yaml"),
            ]
            cells.append(v4.new_code_cell(code, outputs=outputs))
        nbformat.write(v4.new_notebook(cells=cells), run.path(f"{stage.name}.ipynb"))
        run.path("figures").mkdir(exist_ok=True)
        run.path("figures", f"{stage.name[:2]}_thing.png").write_bytes(png())
    run.path("figures", "08_ablation.png").write_bytes(png())
    run.path("ablation").mkdir()
    run.path(ABLATION).write_text(json.dumps({"seeds": [0], "records": []}))
    run.path("metrics.json").write_text("[]")
    run.path("explorer.html").write_text("<p>maps, and the code that shows them</p>")
    run.path("checkpoints").mkdir()
    run.path("checkpoints", "teacher.safetensors").write_text("large")
    write_manifest(run.folder, {"run": "whole", "stages": {stage.name: {"status": "complete"} for stage in STAGES}})
    return run


def test_export_holds_what_people_read_and_nothing_else(run: Run, tmp_path: Path) -> None:
    target = tmp_path / "kept" / "reference"
    target.mkdir(parents=True)
    (target / "old.txt").write_text("of the last time")
    export_reference(run.folder, target)
    files = {path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_file()}
    pages = {f"{name}.{ending}" for name in NAMES for ending in ("ipynb", "html")}
    figures = {f"figures/{name[:2]}_thing.webp" for name in NAMES} | {"figures/08_ablation.webp"}
    others = {"index.html", "explorer.html", "metrics.json", "manifest.json", "config.yaml", "README.md", ABLATION}
    others |= {"figures/README.md"}  # the captions
    assert files == pages | figures | others
    assert [path.name for path in target.parent.iterdir()] == ["reference"]
    assert dangling(target) == []
    assert "make reference" in (target / "index.html").read_text()
    assert 'src="explorer.html"' in (target / "index.html").read_text()
    assert all(network_references(page.read_text()) == [] for page in target.glob("*.html"))

    # Notebooks keep their code and lose bytes and local paths.
    for name in NAMES:
        before, after = run.path(f"{name}.ipynb"), target / f"{name}.ipynb"
        assert code_of(after) == code_of(before)
        assert after.stat().st_size < before.stat().st_size
        assert str(PROJECT_ROOT) not in after.read_text() and "read configs/mini.yaml" in after.read_text()
        nbformat.validate(nbformat.read(after, as_version=4))
    page = (target / "03_multi_scale_attention.html").read_text()
    assert page.count('src="figures/03_thing.webp"') == 1  # saved by the run: not a second time inside the page
    assert page.count('src="data:image/webp;base64,') == 1
    assert page.count('alt="What it shows"') == 2

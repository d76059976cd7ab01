"""The reference run that git keeps is that of the present notebooks, small and readable."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from helpers import network_references

from smaflib.files import PROJECT_ROOT
from smaflib.runs.stages import ABLATION, STAGES
from tools.export_reference_run import MAX_BYTES, REFERENCE, code_of, folder_size

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

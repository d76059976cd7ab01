"""*Run All Cells* in a real JupyterLab: no solution is seen before it is asked for, and git finds nothing to commit."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import nbformat
from conftest import ROOT
from driving import open_notebook
from playwright.sync_api import Browser, expect

SMALL = ["data.num_train=8", "data.num_val=4", "data.image_size=64"]


def test_run_all_neither_spoils_nor_changes_a_notebook(browser: Browser, lab: str, lab_work: Path) -> None:
    checkout = lab_work / "checkout"
    (checkout / "notebooks").mkdir(parents=True)
    for name in ("Makefile", ".gitattributes"):
        shutil.copy(ROOT / name, checkout)
    (checkout / ".venv").symlink_to(ROOT / ".venv")
    notebook = nbformat.read(ROOT / "notebooks" / "01_data.ipynb", as_version=4)
    (parameters,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    parameters.source = parameters.source.replace("overrides: list = []", f"overrides: list = {SMALL}")
    parameters.source = re.sub(r'run_dir: str = ".*?"', f'run_dir: str = "{lab_work}/run"', parameters.source)
    nbformat.write(notebook, checkout / "notebooks" / "01_data.ipynb")

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=checkout, check=True, capture_output=True, text=True).stdout

    git("init", "-q")
    subprocess.run(["make", "-s", "gitfilter"], cwd=checkout, check=True)
    git("add", "notebooks", ".gitattributes")
    git("-c", "user.name=t", "-c", "user.email=t@t", "commit", "-qm", "all")
    watched = open_notebook(browser, lab, "checkout/notebooks/01_data.ipynb")
    page = watched.page
    try:
        expect(page.get_by_text("No answer yet.")).to_have_count(2)
        solutions = page.locator(".jp-OutputArea details.solution")
        expect(solutions).to_have_count(2)
        told = solutions.nth(0).get_by_text("images have other labels than their masks", exact=False).last
        expect(told).not_to_be_visible()
        expect(page.get_by_text("Elsewhere, objects too small")).to_have_count(2)  # in the code, and in its output
        for number in range(2):
            expect(page.get_by_text("Elsewhere, objects too small").nth(number)).not_to_be_visible()
        solutions.nth(0).locator("summary").click()
        expect(told).to_be_visible()
        page.evaluate("() => window.jupyterapp.commands.execute('docmanager:save')")
        saved = checkout / "notebooks" / "01_data.ipynb"
        page.wait_for_function("() => !window.jupyterapp.shell.currentWidget.context.model.dirty")
        assert '"output_type"' in saved.read_text()  # it was saved, with outputs
        assert git("diff") == ""
        git("add", "--update")  # as `git commit -a` does; until then `git status` goes by the size of a file
        assert git("status", "--porcelain", "--untracked-files=no") == ""
        assert watched.errors == []
    finally:
        page.context.close()

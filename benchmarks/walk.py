"""The README's three walks with a clock: a student in JupyterLab, somebody's own photos, a fusion rule of one's own.

    python benchmarks/walk.py --photos folder/with/labels.csv

In a checkout after the set-up. JupyterLab and Chromium (``SMAF_CHROMIUM`` names one) start as the README says, menus
and a slider are moved by mouse and keyboard, commands are those of the pages. What is made goes into a folder that is
removed, ``--pictures`` keeps screenshots. Results go to results/walk.json, the tables to the pages that
have a place for them. ``--only`` walks a part and keeps what is known of the others.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from playwright.sync_api import Page, sync_playwright

from smaflib.files import PROJECT_ROOT, read_json, write_json
from smaflib.report.markdown import fill_page, markdown_table
from smaflib.runs.environment import git_state
from smaflib.runs.manifest import read_manifest
from smaflib.runs.stages import STAGES
from smaflib.runtime import num_cores

RESULTS = PROJECT_ROOT / "benchmarks" / "results" / "walk.json"
EXAMPLES = PROJECT_ROOT / "docs" / "extend.md"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")  # as in the Makefile
PATIENCE = 60  # seconds for one step in the browser

GOALS = {
    "first picture": ("student", "`make lab`, *Run All Cells* in notebook 00", 20),
    "first slider moved": ("student", "the same, then `explore`", 60),
    "own masks": ("photos", "`smaf masks` with {photos} photos, the report is open", 60),
    "own fusion rule": (
        "researcher",
        "a file of [Extend it](extend.md), `smaf run`, `smaf run --reuse`, `smaf compare`",
        600,
    ),
}
"""What is measured, whose it is, what is done for it, and the seconds that it should take on two cores."""


class Walk:
    """A clock, and a folder for screenshots."""

    def __init__(self, pictures: Path | None) -> None:
        self.pictures, self.seconds, self.facts = pictures, dict[str, float](), dict[str, Any]()
        self.start = time.monotonic()

    def mark(self, step: str, page: Page | None = None) -> None:
        """Note how long it took from the start of the walk to here."""
        self.seconds[step] = round(time.monotonic() - self.start, 1)
        print(f"{self.seconds[step]:6.1f} s  {step}", file=sys.stderr, flush=True)
        if self.pictures and page:
            self.pictures.mkdir(parents=True, exist_ok=True)
            page.screenshot(path=self.pictures / f"{step.replace(' ', '_')}.png")


@contextlib.contextmanager
def new_page() -> Iterator[Page]:
    """A page of a laptop's size."""
    path = next(filter(None, map(shutil.which, (os.environ.get("SMAF_CHROMIUM", ""), *BROWSERS))), None)
    if path is None:
        raise SystemExit("there is no Chromium: `make browser` gets one where apt-get can; SMAF_CHROMIUM names one")
    with sync_playwright() as playwright:
        # No sandbox: in containers there is no user namespace for it, and the pages are this project's own.
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 1366, "height": 768})
        page.set_default_timeout(1000 * PATIENCE)
        yield page
        browser.close()


# ------------------------------------------------------------------------------------------------------------- student


@contextlib.contextmanager
def jupyter_lab(home: Path) -> Iterator[str]:
    """What ``make lab`` starts, with the settings of nobody; gives the address that it would open."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    made = subprocess.run(["make", "--dry-run", "lab"], cwd=PROJECT_ROOT, check=True, capture_output=True, text=True)
    words = made.stdout.splitlines()[-1].split()[1:]  # after the program
    options = ["--no-browser", f"--port={port}", "--ServerApp.port_retries=0", "--IdentityProvider.token=walk"]
    command = [sys.executable, "-m", "jupyter", *words, *options, "--allow-root"]
    folders = ("CONFIG_DIR", "DATA_DIR", "RUNTIME_DIR", "LAB_SETTINGS_DIR", "LAB_WORKSPACES_DIR")
    env = os.environ | {f"JUPYTER{'' if each.startswith('LAB') else '_'}{each}": str(home / each) for each in folders}
    with (home / "log").open("w") as log:
        server = subprocess.Popen(
            command, cwd=PROJECT_ROOT, env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        while f"127.0.0.1:{port}" not in (home / "log").read_text():
            if server.poll() is not None:
                raise SystemExit(f"JupyterLab did not start:\n{(home / 'log').read_text()[-2000:]}")
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port}/lab/tree/notebooks/00_one_image_end_to_end.ipynb?token=walk"
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(20)


def run_all_cells(page: Page) -> None:
    """By the menu *Run*, once the kernel is there."""
    page.locator('.jp-NotebookPanel:not(.lm-mod-hidden) .jp-Notebook-ExecutionIndicator[data-status="idle"]').wait_for()
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()


def walk_student(walk: Walk, photos: Path, home: Path) -> None:
    """To the first picture in notebook 00, then to a move of a slider in ``explore``."""
    with new_page() as page, jupyter_lab(home) as address:
        page.goto(address)
        page.get_by_role("heading", name="One image, end to end").wait_for()
        walk.mark("notebook 00 is open", page)
        run_all_cells(page)
        page.locator(".jp-OutputArea-output img").first.wait_for()
        page.locator(".jp-OutputArea-output img").first.scroll_into_view_if_needed()
        walk.mark("first picture", page)
        page.locator(".jp-DirListing-item").get_by_text("explore.ipynb").dblclick()
        page.get_by_role("heading", name="Which scale finds what").wait_for()
        walk.mark("explore is open", page)
        run_all_cells(page)
        page.locator(".smaf-board[data-drawn]").first.wait_for()
        page.locator(".smaf-explorer").first.scroll_into_view_if_needed()  # JupyterLab has gone on to the last cell
        walk.mark("explorer is drawn", page)
        page.evaluate(WATCH)
        slider = page.locator(".smaf-explorer .widget-hslider").filter(has_text="background")
        slider.locator(".noUi-handle").press("ArrowRight")
        page.wait_for_function("() => window.drawn")
        walk.mark("first slider moved", page)


WATCH = """() => {
  new MutationObserver(() => { window.drawn = true; })
    .observe(document, { subtree: true, attributes: true, attributeFilter: ["data-drawn"] });
}"""
"""The whole page is watched: JupyterLab may take a cell that is out of sight out of the page, and put it back."""


# -------------------------------------------------------------------------------------------------------------- photos


def smaf(*words: str, folder: Path) -> str:
    """A command of the pages, in a folder; it may not fail."""
    command = [sys.executable, "-m", "smaflib", *words]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"smaf {' '.join(words)} failed:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    return done.stdout


def walk_photos(walk: Walk, photos: Path, home: Path) -> None:
    """``smaf masks`` as the README has it, then its page."""
    images = photos / "JPEGImages" if (photos / "JPEGImages").is_dir() else photos
    smaf("masks", "--images", str(images), "--labels", str(photos / "labels.csv"), "--out", "my_masks", folder=home)
    walk.mark("smaf masks is done")
    walk.facts["photos"] = len(list((home / "my_masks" / "masks").glob("*.png")))
    with new_page() as page:
        page.goto((home / "my_masks" / "index.html").as_uri())
        page.wait_for_function(
            "() => document.images.length && [...document.images].slice(0, 4).every(i => i.complete)"
        )
        walk.mark("own masks", page)


# ---------------------------------------------------------------------------------------------------------- researcher


MINI = str(PROJECT_ROOT / "configs" / "mini.yaml")


def run_mini(walk: Walk, photos: Path, home: Path) -> None:
    """The run that the researcher compares with: what ``make reproduce`` does after the set-up."""
    smaf("run", MINI, "--runs", str(home / "papermill_runs"), folder=home)
    walk.mark("smaf run")
    entries = read_manifest(home / "papermill_runs" / "mini")["stages"].values()
    walk.facts["memory_mb"] = max(entry["peak_memory_mb"] for entry in entries)
    walk.facts["environment_gb"] = round(sum(path.lstat().st_size for path in Path(sys.prefix).rglob("*")) / 1e9, 1)


def walk_researcher(walk: Walk, photos: Path, home: Path) -> None:
    """After that run: the page's rule in a file, the run with the rule, the comparison."""
    name, code = re.findall(r"```python\n# (\w+\.py)\n(.*?)```", EXAMPLES.read_text(encoding="utf-8"), re.DOTALL)[0]
    (home / name).write_text(code, encoding="utf-8")
    runs, rule = home / "papermill_runs", "attention.fusion=my_rules:softmax_sum"
    smaf("run", MINI, "--name", "mine", "--set", rule, "--reuse", "mini", "--runs", str(runs), folder=home)
    walk.mark("smaf run with the rule")
    print(smaf("compare", str(runs / "mini"), str(runs / "mine"), folder=home))
    walk.mark("own rule is compared")


# --------------------------------------------------------------------------------------------------- notebooks again


def run_again(walk: Walk, photos: Path, home: Path) -> None:
    """Every notebook on the run that is finished, in a new kernel."""
    run = home / "papermill_runs" / "mini"
    if not run.is_dir():
        raise SystemExit("'run' in the same --work folder first: it makes the run")
    for stage in STAGES:
        notebook = nbformat.read(PROJECT_ROOT / "notebooks" / f"{stage.name}.ipynb", as_version=4)
        cell = next(cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
        cell.source += f"\nrun_dir = {str(run)!r}"
        walk.seconds[f"again {stage.name}"] = execution_seconds(notebook)
        walk.seconds[f"first {stage.name}"] = round(read_manifest(run)["stages"][stage.name]["seconds"], 1)
        print(stage.name, {each: walk.seconds[f"{each} {stage.name}"] for each in ("first", "again")}, file=sys.stderr)


def execution_seconds(notebook: nbformat.NotebookNode) -> float:
    """From the start of a kernel to the end of the last cell."""
    start = time.monotonic()
    NotebookClient(notebook, resources={"metadata": {"path": str(PROJECT_ROOT / "notebooks")}}).execute()
    return round(time.monotonic() - start, 1)


# -------------------------------------------------------------------------------------------------------------- tables


PARTS: dict[str, Callable[[Walk, Path, Path], None]] = {
    "student": walk_student,
    "photos": walk_photos,
    "run": run_mini,
    "researcher": walk_researcher,
    "again": run_again,
}
DOCS = PROJECT_ROOT / "docs"
PAGES = {
    DOCS / "start.md": ("walks",),
    DOCS / "runs.md": ("time", "notebooks"),
}
"""The tables that each page has a place for."""


def tables(result: dict[str, Any]) -> dict[str, str]:
    """What the walks took, a run of the mini preset, and the notebooks on that run."""
    parts = result["parts"]
    seconds = {step: taken for part in parts.values() for step, taken in part["seconds"].items()}
    seconds["own fusion rule"] = seconds["smaf run"] + seconds["own rule is compared"]
    rows = [
        [
            who,
            step,
            how.format(photos=parts["photos"]["photos"]),
            f"{goal} s",
            f"{seconds[step]:.0f} s",
            parts[who]["load"],
        ]
        for step, (who, how, goal) in GOALS.items()
    ]
    notebooks = [
        [f"`{stage.name}`", f"{seconds[f'first {stage.name}']:.0f} s", f"{seconds[f'again {stage.name}']:.0f} s"]
        for stage in STAGES
    ]
    return {
        "walks": f"{markdown_table(['who', 'to', 'by', 'goal', 'took', 'the machine was'], rows)}\n\n"
        f"{_source(parts, 'student')}",
        "time": f"The set-up takes {parts['run']['environment_gb']:.1f} GB of disk. `make reproduce` took "
        f"{seconds['smaf run']:.0f} s after the set-up, and "
        f"{parts['run']['memory_mb'] / 1000:.1f} GB of memory. {_source(parts, 'run')}",
        "notebooks": f"{markdown_table(['notebook', 'in `smaf run`', '*Run All Cells* afterwards'], notebooks)}\n\n"
        f"*Run All Cells* starts a kernel and imports the library first; `smaf run` keeps a kernel ready. "
        f"{_source(parts, 'again')}",
    }


def _source(parts: dict[str, Any], name: str) -> str:
    facts = parts[name]
    where = f"{facts['machine']}, {facts['load']}, {facts['date']}, commit `{(facts['commit'] or '?')[:8]}`"
    return f"`python benchmarks/walk.py`, {where}."


def machine() -> str:
    """Cores, and the processor's name where the system says it."""
    with contextlib.suppress(OSError):
        found = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        if found:
            return f"{num_cores()} cores of {found[1]}"
    return f"{num_cores()} cores"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--photos", type=Path, required=True, help="a folder with images, or JPEGImages, and labels.csv"
    )
    parser.add_argument("--only", nargs="+", choices=tuple(PARTS), default=tuple(PARTS), help="and keep the others")
    parser.add_argument("--load", default="idle", help="what the machine does beside, for the tables")
    parser.add_argument("--work", type=Path, help="make everything here, and leave it")
    parser.add_argument("--pictures", type=Path, help="folder for screenshots")
    arguments = parser.parse_args()
    photos = arguments.photos.resolve()
    with tempfile.TemporaryDirectory(prefix="smaf-walk-") as temporary:
        home = (arguments.work or Path(temporary)).resolve()
        home.mkdir(parents=True, exist_ok=True)
        for name in arguments.only:
            walk = Walk(arguments.pictures)
            PARTS[name](walk, photos, home)
            facts = {"date": datetime.date.today().isoformat(), "commit": git_state()["git_commit"]}
            result: dict[str, Any] = read_json(RESULTS, {}) or {"parts": {}}
            result["parts"][name] = {"seconds": walk.seconds, "machine": machine(), "load": arguments.load}
            result["parts"][name] |= facts | walk.facts
            write_json(RESULTS, result)
    if set(result["parts"]) == set(PARTS):
        made = tables(result)
        for page, names in PAGES.items():
            fill_page(page, "benchmarks/walk.py", {name: made[name] for name in names})


if __name__ == "__main__":
    main()

"""Names that are markup, on the pages of a run and of ``smaf masks``: shown as they are, run by nobody."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import nbformat
import pytest
import torch
from driving import Watched
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from PIL import Image
from playwright.sync_api import Browser

from smaflib.apps import masks as masks_module
from smaflib.config import load_config
from smaflib.data import load_samples, make_data
from smaflib.explorer.page import write_explorer
from smaflib.files import PROJECT_ROOT, save_image
from smaflib.report.html import write_index
from smaflib.report.plots import picture
from smaflib.report.tables import class_table, folded
from smaflib.runs import open_run
from smaflib.workspace import Workspace

SCRIPT = "window.hit=1"
FILE = f"<img src=x onerror={SCRIPT}>&quot;'{{{{7*7}}}}"
FOLDER = f"<img src=x onerror={SCRIPT}>&amp;"
CLASSES = (
    f'cat" onmouseover="{SCRIPT}',
    f"dog' onerror='{SCRIPT}",
    "A &ltb onerror &amp B",
    "javascript:window.hit=1",
    "#{window.hit=1}",
    "{{7*7}} %3Cscript%3E",
)


@pytest.fixture(scope="module")
def pages(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:  # no Chromium: nothing is made
    folder = tmp_path_factory.mktemp("hostile")
    mini = PROJECT_ROOT / "configs" / "mini.yaml"
    drawn = load_config(mini, ["data.num_train=3", "data.num_val=1", "data.image_size=64"])
    make_data(drawn, folder)
    images, out = folder / "photos", folder / "out"
    images.mkdir()
    (out / "masks").mkdir(parents=True)
    with (folder / "labels.csv").open("w", newline="", encoding="utf-8") as table:
        rows = csv.writer(table)
        rows.writerow(["image", "labels"])
        for number, files in enumerate(load_samples(drawn, "train", folder).files):
            assert files.mask is not None
            shutil.copy(files.image, images / f"{FILE}{number}{files.image.suffix}")
            shutil.copy(files.mask, out / "masks" / f"{FILE}{number}.png")
            rows.writerow([f"{FILE}{number}{files.image.suffix}", ";".join(CLASSES[label] for label in files.labels)])
    data = {"kind": "folder", "images": images, "labels": folder / "labels.csv", "masks": out / "masks"}
    settings = [f"data.{name}={value}" for name, value in data.items()] + [f"data.class_names={json.dumps(CLASSES)}"]
    settings += ["classifier.pretraining=plain", "pseudo_masks.saliency_weight=0", "data.longest_side=null"]
    config = folder / f"{FOLDER}.yaml"
    shutil.copy(mini, config)

    run = open_run(folder / FOLDER / "hostile", config, settings)
    run.record("06", [{"variant": "crf", "metric": "iou", "value": 0.5, "class_name": name} for name in CLASSES])
    figures = folded(class_table(run.metrics())).data  # as in notebook 08
    outputs = [new_output("display_data", data={"text/html": figures})]
    notebook = new_notebook(cells=[new_markdown_cell("# Results"), new_code_cell("", outputs=outputs)])
    nbformat.write(notebook, run.path("08_results.ipynb"))
    for image_id in run.samples("train").image_ids:
        run.maps("teacher").write(
            image_id, [torch.ones(len(CLASSES), 2, 2)] * len(run.config.attention.scales), (64, 64)
        )
    write_explorer(run, 2)
    write_index(run)
    samples, record = run.samples("train"), {}
    for index, file in enumerate(samples.files):
        for part in masks_module.SHOWN[1:]:
            save_image(out / part / f"{file.image_id}.jpg", Image.fromarray(picture(samples[index].image)))
        record[file.image_id] = {"signs": [[0.1, 0.0, 0.0, 0.0, 1.0]] * len(file.labels), "corrected": None}
    masks_module.write_sheet(Workspace(out, run.config), samples, {"photos": record})
    return [run.path(f"{name}.html") for name in ("index", "explorer", "08_results")] + [out / "index.html"]


def test_names_that_are_markup_are_shown_as_written_and_not_run(pages: list[Path], browser: Browser) -> None:
    context = browser.new_context(offline=True)
    report, explorer, results, sheet = pages
    # The table of the notebook shows "&lt" as "<": pandas does not escape headers, and a class name holds no "<".
    shown = {report: [FOLDER, *CLASSES], explorer: CLASSES[:1], results: CLASSES[:2], sheet: [f"{FILE}0"]}
    for path, names in shown.items():
        watched = Watched(context.new_page(), (path.parent.as_uri(),))
        watched.page.on("dialog", lambda dialog: pytest.fail(dialog.message))
        watched.page.goto(path.as_uri())
        watched.page.wait_for_load_state("load")
        for frame in watched.page.frames:
            for element in frame.locator("[onmouseover], [onerror]").all():
                pytest.fail(f"{path.name}: {element.evaluate('it => it.outerHTML')[:300]}")
            assert frame.evaluate("() => window.hit") is None, path.name
            assert not frame.locator("img[src=x]").count(), path.name
        text = watched.page.locator("body").text_content() or ""
        assert [name for name in names if name not in text] == [], path
        assert (watched.errors, watched.requests) == ([], []), path.name
        watched.page.close()
    context.close()

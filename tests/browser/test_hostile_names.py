"""Names that are markup, over every page that a run and ``smaf masks`` write: shown as they are, run by nobody."""

from __future__ import annotations

import csv
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
from driving import Watched
from playwright.sync_api import Browser
from test_notebooks import TINY

from smaflib.apps.masks import make_masks
from smaflib.config import load_config
from smaflib.data import load_samples, make_data
from smaflib.files import PROJECT_ROOT
from smaflib.runs.runner import run_notebooks

SCRIPT = "window.hit=1"
FILE = f"<img src=x onerror={SCRIPT}>&quot;'{{{{7*7}}}}"
FOLDER = f"<img src=x onerror={SCRIPT}>&amp;"
CLASSES = (
    f'cat" onmouseover="{SCRIPT}',
    f"dog' onerror='{SCRIPT}",
    "A &ltb onerror &amp B",
    "javascript:window.hit=1",
    "${window.hit=1}".replace("$", "#"),
    "{{7*7}} %3Cscript%3E",
)


@dataclass(frozen=True)
class Pages:
    """Folders of pages with hostile names in them."""

    run: Path
    masks: Path

    @property
    def all(self) -> list[Path]:
        return sorted([*self.run.glob("*.html"), *self.masks.glob("*.html")])


@pytest.fixture(scope="module")
def pages(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Pages:  # no Chromium: nothing is made
    folder = tmp_path_factory.mktemp("hostile")
    drawn = load_config(PROJECT_ROOT / "configs" / "mini.yaml", [*TINY, "data.num_train=12"])
    make_data(drawn, folder)
    samples = load_samples(drawn, "train", folder)
    assert len(samples.class_names) == len(CLASSES)
    images, masks = folder / "photos", folder / "masks"
    images.mkdir()
    masks.mkdir()
    with (folder / "labels.csv").open("w", newline="", encoding="utf-8") as table:
        rows = csv.writer(table)
        rows.writerow(["image", "labels"])
        for number, files in enumerate(samples.files):
            assert files.mask is not None
            shutil.copy(files.image, images / f"{FILE}{number}{files.image.suffix}")
            shutil.copy(files.mask, masks / f"{FILE}{number}.png")
            rows.writerow([f"{FILE}{number}{files.image.suffix}", ";".join(CLASSES[label] for label in files.labels)])
    data = {"kind": "folder", "images": images, "labels": folder / "labels.csv", "masks": masks}
    settings = [f"data.{name}={value}" for name, value in data.items()]
    settings.append(f"data.class_names={json.dumps(CLASSES)}")
    tiny = [each for each in TINY if not each.startswith("data.")]
    config = folder / f"{FOLDER}.yaml"
    config.write_text((PROJECT_ROOT / "configs" / "mini.yaml").read_text(encoding="utf-8"), encoding="utf-8")
    tiny += ["classifier.pretraining=plain", "self_training.control=false", "pseudo_masks.saliency_weight=0"]
    run = run_notebooks(config, "hostile", [*tiny, *settings], runs=folder / FOLDER)
    quick = ["model.backbone=slim", "model.weights=null", "self_training.iterations=4", *settings]
    small = load_config(PROJECT_ROOT / "configs" / "custom.yaml", quick)
    return Pages(run.folder, make_masks(small, folder / "out").parent)


def test_names_that_are_markup_are_shown_as_written_and_not_run(pages: Pages, browser: Browser) -> None:
    assert {"index.html", "explorer.html", "00_one_image_end_to_end.html", "08_results.html"} <= {
        p.name for p in pages.all
    }
    context = browser.new_context(offline=True)
    for path in pages.all:
        watched = Watched(context.new_page(), (path.parent.as_uri(), path.as_uri()))
        watched.page.on("dialog", lambda dialog: pytest.fail(dialog.message))
        watched.page.goto(path.as_uri())
        watched.page.wait_for_load_state("load")
        for frame in watched.page.frames:
            for element in frame.locator("[onmouseover], [onerror]").all():
                pytest.fail(f"{path.name}: {element.evaluate('it => it.outerHTML')[:300]}")
            assert frame.evaluate("() => window.hit") is None, path.name
            assert not frame.locator("img[src=x]").count(), path.name
        text = watched.page.locator("body").text_content() or ""
        if path.parent == pages.run:
            for name in {"index.html": [FOLDER], "08_results.html": [CLASSES[0], CLASSES[2]]}.get(path.name, []):
                assert name in text
        assert (watched.errors, watched.requests) == ([], []), path.name
        watched.page.close()
    context.close()

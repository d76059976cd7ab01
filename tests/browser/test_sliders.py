"""The sliders of notebooks 03, 04 and 06 in a real JupyterLab: each of them changes the picture."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
from driving import START_SECONDS, Watched, run_notebook
from playwright.sync_api import Browser, Locator, expect

SETUP = """
from pathlib import Path
from smaflib.cams import fuse_cams, multi_scale_cams
from smaflib.data import load_samples, make_data
from smaflib.explorer.sliders import crf_sliders, row_sliders, scale_sliders
from smaflib.maps import AttentionMaps
from smaflib.models.pretrained import pretrained_network, short_config
from smaflib.reactivation import denoise

config = short_config(Path("drawn"))
make_data(config, Path("."))
samples = load_samples(config, "train").with_ground_truth()[:3]
maps = AttentionMaps(Path("cams"), config.attention.scales)
for each in samples:
    size = tuple(each.image.shape[-2:])
    maps.write(each.image_id, multi_scale_cams(pretrained_network("teacher"), each.image, maps.scales), size)
sample, names = samples[0], samples.class_names
fused = fuse_cams(maps.read(sample.image_id)[0], size)
"""
CELLS = (
    "scale_sliders(samples, maps, 0.35)",
    "row_sliders(sample, fused, 0.35, names)",
    "crf_sliders(sample, denoise(fused, sample.image_label), 0.35, config.pseudo_masks, names)",
)
# Per cell its sliders and the key that each gets; in this order every move of the CRF's changes the mask.
MOVES: tuple[dict[str, str], ...] = (
    {"image": "End"} | {f"weight of scale {scale}": "PageDown" for scale in ("0.5", "1", "1.5", "2")},
    {"bg_score": "PageUp", "row": "PageUp"},
    {
        "bilateral_srgb": "End",
        "bilateral_compat": "End",
        "bilateral_sxy": "Home",
        "gaussian_sxy": "End",
        "gaussian_compat": "End",
        "gt_prob": "Home",
        "iterations": "Home",
    },
)


@pytest.fixture(scope="module")
def notebook(browser: Browser, lab: str, lab_work: Path) -> Iterator[Locator]:
    cells = [nbformat.v4.new_code_cell(source) for source in (SETUP, *CELLS)]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3"}}  # else JupyterLab asks which
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), lab_work / "sliders.ipynb")
    context = browser.new_context(viewport={"width": 1600, "height": 1000})
    context.set_default_timeout(START_SECONDS * 1000)  # of all waits that name none: a machine with other work
    watched = Watched(context.new_page(), (lab, lab.replace("http", "ws")))
    run_notebook(watched, lab, "sliders.ipynb")
    yield watched.page.locator(".jp-Notebook")
    assert watched.errors == [] and watched.requests == []
    context.close()


@pytest.mark.parametrize("number", range(3), ids=["scales", "row", "crf"])
def test_each_slider_changes_the_picture(notebook: Locator, number: int) -> None:
    root = notebook.locator(".smaf-sliders").nth(number)
    root.scroll_into_view_if_needed()
    root.locator("img").wait_for()
    assert root.locator(".widget-hslider").count() == len(MOVES[number])
    for name, key in MOVES[number].items():
        label = root.page.locator(".widget-label", has_text=re.compile(f"^{re.escape(name)}$"))
        before = root.locator("img").get_attribute("src")
        root.locator(".widget-hslider", has=label).locator(".noUi-handle").press(key)
        expect(root.locator("img")).not_to_have_attribute("src", before or "")
        assert root.locator("img").count() == 1

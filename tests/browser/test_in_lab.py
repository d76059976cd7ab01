"""The explorer and the sliders of notebooks 03, 04 and 06 in a real JupyterLab.

Controls change the picture, and the explorer's numbers are the library's.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest
from driving import BoardPage, Watched, agrees, expected_iou, keep_screenshot, open_notebook
from PIL import Image
from playwright.sync_api import Browser, Locator, expect

from smaflib.explorer.state import LIKELIEST_CLASSES, PHOTOS, Exploration, Gallery

FIRST = 2  # the drawn image that the tests begin with
AWAIT_SECONDS = 20.0
CHIPS, SEARCH = "div.jupyter-widget-tag", "input[list]:not(.jupyter-widget-taginput)"


class Lab:
    """The notebook in the browser, and the same settings in this process."""

    def __init__(self, watched: Watched) -> None:
        self.watched, self.page = watched, watched.page
        self.root = self.page.locator(".smaf-explorer")
        self.board = BoardPage(self.root.locator(".smaf-board"))
        self.gallery = Gallery.pretrained(8)
        self.index = FIRST
        self.field = self.root.locator(".jupyter-widget-taginput")
        self.settings = self.gallery.first_settings(FIRST)

    def expected(self) -> Exploration:
        return self.gallery.explore(self.index, "teacher", self.settings)

    def change(self, panel: str, act: Any, also: Callable[[], bool] = lambda: True, **settings: Any) -> None:
        """Act, and wait for another picture and the IoU of the new settings; earlier answers may come in between."""
        before = self.board.picture(panel)
        act()
        self.settings = replace(self.settings, **settings)
        expected, deadline = expected_iou(self.expected(), self.gallery.class_names), time.monotonic() + AWAIT_SECONDS
        while not (agrees(self.board.iou(), expected, 0.05001) and self.board.picture(panel) != before and also()):
            assert time.monotonic() < deadline, (self.board.iou(), expected, self.settings)
            self.page.wait_for_timeout(50)

    def box(self, text: str) -> Locator:
        return self.root.get_by_role("checkbox", name=text, exact=True)

    def menu(self, text: str) -> Locator:
        return self._named(".widget-dropdown", text).locator("select")

    def handle(self, text: str) -> Locator:
        return self._named(".widget-hslider", text).locator(".noUi-handle")

    def tab(self, title: str, num_images: int) -> None:
        """Open a tab and wait until its images and its controls are there."""
        self.root.get_by_role("button", name=title, exact=True).click()
        expect(self.board.root.locator(".smaf-strip button")).to_have_count(num_images)
        wanted = 1 if title == "photos" else 0
        expect(self.root.locator(SEARCH)).to_have_count(wanted)

    def chips(self) -> list[str]:
        return self.root.locator(CHIPS).all_inner_texts()

    def add_chip(self, name: str) -> None:
        self.field.fill(name)
        self.field.press("Enter")

    def remove_chip(self, name: str) -> None:
        self.root.locator(CHIPS, has_text=name).locator("i").click()

    def _named(self, kind: str, text: str) -> Locator:
        label = self.page.locator(".widget-label", has_text=re.compile(f"^{text}$"))
        return self.root.locator(kind, has=label)


@pytest.fixture(scope="module")
def lab_page(browser: Browser, lab: str) -> Iterator[Lab]:
    watched = open_notebook(browser, lab, "explore.ipynb")
    watched.page.locator(".smaf-board[data-drawn]").first.wait_for(timeout=30_000)
    watched.page.evaluate("() => window.jupyterapp.commands.execute('application:toggle-left-area')")
    page = Lab(watched)
    page.root.scroll_into_view_if_needed()
    page.tab("drawn set", 8)
    page.board.after(lambda: page.board.root.locator(".smaf-strip button").nth(FIRST).click())
    yield page
    watched.page.context.close()


def test_controls_change_picture_and_numbers(lab_page: Lab) -> None:
    lab, bg_score = lab_page, lab_page.settings.bg_score
    weights = lab.root.locator(".widget-hbox", has=lab.page.locator(".widget-checkbox", has_text="scale "))
    lab.change("mask", lambda: lab.handle("background").press("ArrowRight"), bg_score=bg_score + 0.01)
    lab.change("fused", lambda: lab.box("scale 0.5").click(), weights=(0.0, 1.0, 1.0, 1.0))
    expect(lab.board.root.locator('figure[data-key="scale 0.5"] figcaption')).to_contain_text("off")
    last = weights.nth(3).locator(".noUi-handle")
    lab.change("fused", lambda: last.press("ArrowLeft"), weights=(0.0, 1.0, 1.0, 0.9))
    lab.change("scale 1", lambda: lab.menu("class").select_option("crane"), class_number=2)
    assert lab.chips() == ["llama", "crane"]
    lab.change("mask", lambda: lab.add_chip("ram"), image_label=(0, 1, 2))
    lab.change("mask", lambda: lab.remove_chip("crane"), image_label=(0, 1))
    lab.add_chip("unicorn")  # no class of these images
    expect(lab.field).to_have_value("unicorn")
    lab.field.fill("")
    lab.change("mask", lambda: lab.add_chip("crane"), image_label=(0, 1, 2))
    assert lab.chips() == ["llama", "ram", "crane"]


def test_crf_follows_when_nothing_moves(lab_page: Lab) -> None:
    lab, crf = lab_page, lab_page.gallery.config.pseudo_masks.crf
    note = lab.board.root.locator('figure[data-key="mask"] figcaption span span')
    lab.change("mask", lambda: lab.box("CRF").click(), lambda: note.inner_text() == "CRF", crf=crf)
    lab.root.get_by_text("CRF settings").click()
    none, done = crf.model_copy(update={"iterations": 0}), lambda: note.inner_text() == "CRF"
    lab.change("mask", lambda: lab.handle("iterations").press("Home"), done, crf=none)
    lab.root.get_by_text("CRF settings").click()
    lab.box("CRF").click()
    expect(note).to_have_text("no CRF")
    lab.settings = replace(lab.settings, crf=None)


def test_pixel_and_keyboard(lab_page: Lab) -> None:
    lab = lab_page
    active = "() => window.jupyterapp.shell.currentWidget.content.activeCellIndex"
    before, panels = lab.page.evaluate(active), lab.board.root.locator(".smaf-panels")
    lab.board.after(lambda: lab.board.click_pixel(80, 60, (128, 128)))
    row, col = await_reading(lab)
    assert abs(row - 80) <= 1 and abs(col - 60) <= 1 and lab.board.num_markers() == 8
    expected, names = lab.expected(), ("background", *lab.gallery.class_names)
    expect(lab.board.root.locator("[data-mask]")).to_have_text(names[int(expected.mask[row, col])])
    lab.board.after(lambda: lab.board.click_pixel(80, 60, (128, 128)))  # the same pixel: the kernel does not answer
    assert await_reading(lab) == (row, col)
    panels.press("Shift+ArrowRight")
    assert await_reading(lab) == (row, col + 8)

    lab.index = FIRST + 1
    first = lab.gallery.first_settings(lab.index)
    change = {"image_label": first.image_label, "class_number": first.class_number}
    lab.change("image", lambda: panels.press("PageDown"), **change)
    assert lab.page.evaluate(active) == before  # JupyterLab did not take the keys


def await_reading(lab: Lab) -> tuple[int, int]:
    """Wait for the values of the marked pixel, which the kernel sends; compare them with the library's."""
    lab.page.wait_for_function("() => document.querySelectorAll('.smaf-explorer .smaf-reading tr').length === 6")
    row, col = lab.board.pixel()
    assert lab.board.values() == pytest.approx(lab.expected().read(row, col), abs=0.0005001)  # three decimals
    return row, col


def test_screenshot_for_the_readme(lab_page: Lab, screenshots: Path | None) -> None:
    if screenshots is None:
        pytest.skip("SMAF_SCREENSHOTS names no folder; `make screenshots` does")
    lab = lab_page
    lab.tab("photos", len(PHOTOS))
    lab.board.after(lambda: lab.board.click_pixel(150, 200, (300, 451), "image"))
    lab.root.scroll_into_view_if_needed()
    keep_screenshot(lab.root, screenshots / "explorer.png")
    lab.tab("drawn set", 8)


def test_photos_are_the_first_tab_with_search_and_a_crf(lab_page: Lab, lab_work: Path) -> None:
    lab = lab_page
    lab.tab("photos", len(PHOTOS))
    board, note = lab.board.root, lab.board.root.locator('figure[data-key="mask"] figcaption span span')
    expect(board.locator("[data-likely]")).to_have_count(LIKELIEST_CLASSES)
    expect(board.locator("[data-likely]").first).to_contain_text("Egyptian cat")
    before = lab.board.picture("mask")
    lab.box("CRF").click()
    expect(note).to_have_text("CRF")
    assert lab.board.picture("mask") != before
    lab.box("CRF").click()
    expect(note).to_have_text("no CRF")

    search = lab.root.locator(SEARCH)
    search.fill("lens cap")
    lab.board.after(lambda: search.press("Enter"))
    expect(board.locator('figure[data-key="scale 1"]')).not_to_have_class(re.compile("smaf-off"))
    expect(lab.menu("class").locator("option:checked")).to_have_text("lens cap")
    expect(lab.root.locator(CHIPS)).to_have_text(["Egyptian cat", "lens cap"])

    lab.root.get_by_role("button", name="save as page").click()
    expect(board.locator(".smaf-status")).to_contain_text("explorer_photos.html")
    page = lab.page.context.new_page()
    page.goto((lab_work / "explorer_photos.html").as_uri())
    page.locator(".smaf-board[data-drawn]").wait_for()
    expect(page.locator(".smaf-strip button")).to_have_count(len(PHOTOS))
    expect(page.locator("[data-likely]").first).to_contain_text("Egyptian cat")
    page.close()


def test_custom_image_and_a_file_that_is_none(lab_page: Lab, tmp_path: Path) -> None:
    lab = lab_page
    lab.tab("drawn set", 8)
    shown = lab.board.picture("mask")
    (tmp_path / "letter.jpg").write_bytes(b"dear")
    pixels = np.random.default_rng(0).integers(0, 255, (60, 90, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "mine.png")

    def give(path: Path) -> None:
        with lab.page.expect_file_chooser() as chosen:
            lab.root.locator(".jupyter-widget-upload, .widget-upload").first.click()
        chosen.value.set_files(path)

    give(tmp_path / "letter.jpg")
    lab.root.get_by_text("cannot be read as").wait_for()
    assert lab.board.picture("mask") == shown
    lab.board.after(lambda: give(tmp_path / "mine.png"))
    lab.root.get_by_text("mine.png: the network predicts").wait_for()
    # JupyterLab swaps the controls for those of the other network on its own time.
    expect(lab.board.root.locator(".smaf-iou")).to_contain_text("No ground truth")
    expect(lab.board.root.locator(".smaf-strip button")).to_have_count(len(PHOTOS) + 1)  # it has joined the photos
    expect(lab.root.locator(".jupyter-widget-tagsinput option")).to_have_count(LIKELIEST_CLASSES)


def test_at_1280_pixels_panels_are_large_with_one_pixel_beside_them_and_a_click_enlarges_one(lab_page: Lab) -> None:
    lab = lab_page
    lab.tab("drawn set", 8)
    lab.page.set_viewport_size({"width": 1280, "height": 900})
    board = lab.board.root
    expect(board).to_have_class(re.compile("smaf-wide"))
    figure = board.locator("figure").nth(2)
    boxes = [figure.bounding_box(), board.locator(".smaf-reading").bounding_box()]
    assert boxes[0] and boxes[1] and boxes[0]["width"] >= 240
    panels = board.locator(".smaf-panels").bounding_box()
    assert panels and boxes[1]["x"] >= panels["x"] + panels["width"]
    figure.get_by_role("button", name="enlarge").click()
    expect(figure).to_have_class(re.compile("smaf-large"))
    large = figure.bounding_box()
    assert large and large["width"] > 1.8 * boxes[0]["width"]
    figure.get_by_role("button", name="enlarge").click()
    lab.page.set_viewport_size({"width": 1600, "height": 1000})
    assert lab.watched.errors == [] and lab.watched.requests == []


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
    {f"weight of scale {scale}": "PageDown" for scale in ("0.5", "1", "1.5", "2")},
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
def sliders(browser: Browser, lab: str, lab_work: Path) -> Iterator[Locator]:
    cells = [nbformat.v4.new_code_cell(source) for source in (SETUP, *CELLS)]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3"}}  # else JupyterLab asks which
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), lab_work / "sliders.ipynb")
    watched = open_notebook(browser, lab, "sliders.ipynb")
    yield watched.page.locator(".jp-Notebook")
    assert watched.errors == [] and watched.requests == []
    watched.page.context.close()


@pytest.mark.parametrize("number", range(3), ids=["scales", "row", "crf"])
def test_each_slider_changes_the_picture(sliders: Locator, number: int) -> None:
    root = sliders.locator(".smaf-sliders").nth(number)
    root.scroll_into_view_if_needed()
    root.locator("img").wait_for()
    for label in root.locator(".widget-label").all():  # none is cut off
        assert label.evaluate("each => each.scrollWidth <= each.clientWidth"), label.inner_text()
    assert root.locator(".widget-hslider").count() == len(MOVES[number])
    for name, key in MOVES[number].items():
        label = root.page.locator(".widget-label", has_text=re.compile(f"^{re.escape(name)}$"))
        before = root.locator("img").get_attribute("src")
        root.locator(".widget-hslider", has=label).locator(".noUi-handle").press(key)
        expect(root.locator("img")).not_to_have_attribute("src", before or "")
        assert root.locator("img").count() == 1

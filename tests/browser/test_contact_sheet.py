"""The contact sheet of `smaf masks`, by keyboard, on a desk and on a phone."""

from __future__ import annotations

from pathlib import Path

import pytest
from driving import Watched
from playwright.sync_api import Browser
from test_custom_images import config_of

from smaflib.apps.corrections import write_correction
from smaflib.apps.masks import make_masks


@pytest.fixture
def sheet(browser: Browser, masks_folder: Path) -> Path:
    write_correction(masks_folder / "out", "3", leave_out=True)
    return make_masks(config_of(masks_folder), masks_folder / "out")


@pytest.mark.parametrize("width", [400, 1200])
def test_sheet_by_keyboard(sheet: Path, browser: Browser, width: int) -> None:
    watched = Watched(browser.new_page(viewport={"width": width, "height": 800}), (sheet.parent.as_uri(),))
    page = watched.page
    page.goto(sheet.as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") == width
    pictures, opened = page.locator(".zoom"), page.locator("dialog img")
    assert pictures.count() == 5 and page.get_by_text("left out").count() == 1
    pictures.first.focus()
    page.keyboard.press("Enter")
    first = opened.get_attribute("src")
    page.keyboard.press("ArrowRight")
    second = opened.get_attribute("src")
    assert first != second and page.locator("dialog[open]").is_visible()
    page.keyboard.press("Escape")
    assert pictures.nth(1).evaluate("it => it === document.activeElement")
    page.keyboard.press("Tab")
    page.keyboard.press("Space")  # the box below that picture
    shown = [["block", "none"], ["none", "block"]]
    styles = "all => all.map(it => [...it.children].map(image => getComputedStyle(image).display))"
    assert pictures.evaluate_all(styles) == [shown[0], shown[1], *shown[:1] * 3]
    page.get_by_label("All before the CRF").check()
    assert pictures.evaluate_all(styles) == [shown[1]] * 5
    assert (watched.errors, watched.requests) == ([], [])
    page.close()

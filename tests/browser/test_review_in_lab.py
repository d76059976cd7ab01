"""Masks of ``smaf masks`` reviewed in a real JupyterLab: what the keys decide is in the tables at once."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
from driving import BoardPage, open_notebook
from playwright.sync_api import Browser, Locator, expect

from smaflib.apps.corrections import Correction, read_corrections
from smaflib.apps.review import MaskGallery


@pytest.fixture(scope="module")
def out(masks_kept: Path) -> Path:
    folder = masks_kept.with_name("work")
    shutil.rmtree(folder, ignore_errors=True)
    return shutil.copytree(masks_kept, folder) / "out"


@pytest.fixture(scope="module")
def review(browser: Browser, lab: str, lab_work: Path, out: Path) -> Iterator[Locator]:
    """The notebook's review of six tiny photos."""
    cells = [nbformat.v4.new_code_cell(f"from smaflib.apps.review import Review\nReview({str(out)!r})")]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3"}}  # else JupyterLab asks which
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), lab_work / "review.ipynb")
    watched = open_notebook(browser, lab, "review.ipynb")
    watched.page.locator(".smaf-board[data-drawn]").wait_for()
    yield watched.page.locator(".smaf-explorer")
    assert watched.errors == [] and watched.requests == []
    watched.page.context.close()


def test_enter_accepts_delete_leaves_out_and_both_show_the_next_photo(review: Locator, out: Path) -> None:
    ids = [sample.image_id for sample in MaskGallery(out).samples]
    photos, status = review.locator(".smaf-strip button"), review.locator(".smaf-status")
    panels, board = review.locator(".smaf-panels"), BoardPage(review.locator(".smaf-board"))
    board.click_pixel(5, 5, (40, 48), "mask")  # the keys go to the panels
    for index, (key, said) in enumerate([("Enter", "accepted"), ("Delete", "left out")]):
        review.page.keyboard.press(key)
        expect(photos.nth(index + 1)).to_have_attribute("aria-pressed", "true")
        expect(status).to_have_text(f"{ids[index]}: {said}; {index + 1} of 6 reviewed")
    decided = {ids[0]: Correction(), ids[1]: Correction(leave_out=True)}
    assert read_corrections(out) == decided

    review.locator(".smaf-panels button").first.press("Enter")  # enlarges a panel, as a button does
    expect(review.locator("figure.smaf-large")).to_have_count(1)
    panels.press("PageDown")
    expect(photos.nth(3)).to_have_attribute("aria-pressed", "true")
    assert read_corrections(out) == decided
    review.get_by_role("button", name="leave out").click()
    expect(status).to_have_text(f"{ids[3]}: left out; 3 of 6 reviewed")
    assert [*read_corrections(out)] == [*ids[:2], ids[3]]


def test_chips_go_into_the_table_when_they_are_accepted_and_enter_in_their_field_accepts_nothing(
    review: Locator, out: Path
) -> None:
    photos, chips = review.locator(".smaf-strip button"), review.locator("div.jupyter-widget-tag")
    field, decided = review.locator(".jupyter-widget-taginput"), read_corrections(out)
    review.locator(".smaf-panels").press("PageUp")
    shown = [each.get_attribute("title") or "" for each in photos.all()]
    (present,) = [n for n, each in enumerate(photos.all()) if each.get_attribute("aria-pressed") == "true"]
    before = chips.all_inner_texts()
    assert before in (["red"], ["blue"])
    expect(review.locator(".jupyter-widget-tagsinput option")).to_have_count(2)
    field.fill("kayak")
    field.press("Enter")
    expect(chips).to_have_text([*before, "kayak"])
    field.press("Enter")  # with nothing in it
    chips.nth(0).locator("i").click()
    expect(chips).to_have_text(["kayak"])
    expect(review.locator(".jupyter-widget-tagsinput option")).to_have_count(3)
    assert read_corrections(out) == decided and "kayak" not in (out.parent / "labels.csv").read_text()
    review.get_by_role("button", name="accept").click()
    expect(review.locator(".smaf-status")).to_contain_text("a new class (kayak) needs make_masks(..., retrain=True)")
    assert f"{shown[present]}.png,kayak\n" in (out.parent / "labels.csv").read_text()


def test_a_strip_of_many_photos_is_low_and_shows_the_present_one(review: Locator) -> None:
    strip, panels = review.locator(".smaf-strip"), review.locator(".smaf-panels")
    strip.evaluate("it => { it.style.width = '60px'; }")  # a row per photo: 54 pixels, 6 between, 5 at both ends
    for key, times, photo, scrolled in [("PageUp", 6, 0, 0), ("PageDown", 2, 2, 71), ("PageDown", 3, 5, 364 - 162)]:
        for _ in range(times):
            panels.press(key)
        expect(strip.locator("button").nth(photo)).to_have_attribute("aria-pressed", "true")
        # The middle of the thumbnail is in the middle of the strip: 2 * 60 + 5 + 27 - 162 / 2.
        assert strip.evaluate("it => [it.clientHeight, it.scrollHeight, it.scrollTop]") == [162, 364, scrolled]

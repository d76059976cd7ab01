"""The explorer inside a report: nothing is cut off, and a dark page is dark."""

from __future__ import annotations

from pathlib import Path

import pytest
from matplotlib.figure import Figure
from playwright.sync_api import Browser, Page

from smaflib.explorer.page import explorer_page
from smaflib.explorer.state import Gallery
from smaflib.report.html import write_index
from smaflib.runs import open_run

DARK = "rgb(20, 23, 29)"


@pytest.fixture(scope="module")
def index(pretrained: Gallery, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    (folder / "tiny.yaml").write_text("data: {kind: mini, num_train: 2, num_val: 2}\n")
    run = open_run(folder / "runs" / "tiny", folder / "tiny.yaml")
    for name, draw in (("08_sizes", "plot"), ("03_scales", "imshow")):
        figure = Figure()
        getattr(figure.subplots(), draw)([[0, 1], [1, 0]])
        run.save_figure(figure, name)
    run.path("explorer.html").write_text(explorer_page(pretrained), encoding="utf-8")
    return write_index(run)


def await_fit(page: Page) -> None:
    """Wait until the frame is as high as the page in it."""
    (frame,) = page.frames[1:]
    frame.locator(".smaf-board[data-drawn]").wait_for(timeout=30_000)
    frame.wait_for_function(
        """() => { const inside = document.body.getBoundingClientRect().height;
          return inside > 300 && Math.abs(window.innerHeight - inside) <= 8
            && document.documentElement.scrollHeight <= window.innerHeight; }""",
        timeout=30_000,
    )


def test_a_reports_frame_is_as_high_as_the_explorer_and_needs_no_sideways_scroll(browser: Browser, index: Path) -> None:
    context = browser.new_context(viewport={"width": 1900, "height": 900}, offline=True)
    page = context.new_page()
    page.goto(index.as_uri())
    page.locator("iframe").scroll_into_view_if_needed()
    heights = []
    for width in (1900, 700, 400):
        page.set_viewport_size({"width": width, "height": 900})
        await_fit(page)
        frame = page.locator("iframe").bounding_box()
        assert frame and frame["x"] >= 0 and abs(2 * frame["x"] + frame["width"] - width) <= 2  # in the middle
        assert page.evaluate("document.documentElement.scrollWidth") == width
        picture = page.locator("figure.wide img").first.bounding_box()  # scrolls by itself where it is too wide
        assert picture and picture["width"] >= min(600, width - 80)
        heights.append(frame["height"])
    assert heights[1] > heights[0] + 200  # the numbers are below the panels now
    context.close()


def test_a_dark_report_inverts_plots_and_dims_pictures(browser: Browser, index: Path) -> None:
    context = browser.new_context(color_scheme="dark", offline=True)
    page = context.new_page()
    page.goto(index.as_uri())
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == DARK
    filters = {
        name: page.locator(f"img[src$='{name}.png']").evaluate("img => getComputedStyle(img).filter")
        for name in ("08_sizes", "03_scales")
    }
    assert "invert" in filters["08_sizes"] and "invert" not in filters["03_scales"]
    context.close()

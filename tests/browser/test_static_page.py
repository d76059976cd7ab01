"""The explorer without a kernel, opened from the disk and offline: its numbers are the library's on the same maps.

The page keeps maps in 8 bits and computes in the browser. Against the library on the very same 8-bit maps its IoU must
agree within :data:`SAME_MAPS` points (a pixel on a tie may fall the other way); against the library on the maps before
they were cut to 8 bits within :data:`FULL_MAPS` points.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from driving import BoardPage, Watched, agrees, expected_iou, keep_screenshot, shown_values
from playwright.sync_api import Browser, Locator

from smaflib.cams import FUSIONS
from smaflib.explorer.page import explorer_page, quantize
from smaflib.explorer.state import Exploration, Gallery
from smaflib.models.pretrained import Role

SAME_MAPS = 0.1
FULL_MAPS = 1.0
FIRST = 2
REDRAW_SECONDS = 1.0


class Static:
    """The page, and beside it the same settings in this process on the same 8-bit maps."""

    def __init__(self, watched: Watched, gallery: Gallery, path: Path) -> None:
        self.watched, self.page = watched, watched.page
        self.page.goto(path.as_uri())
        self.page.locator(".smaf-board[data-drawn]").wait_for(timeout=20_000)
        self.board = BoardPage(self.page.locator(".smaf-board"))
        self.form = self.page.locator("#smaf-controls")
        self.full, self.gallery = gallery, replace(gallery, _cams={})
        for index in range(len(gallery.samples)):
            for role in gallery.roles:
                self.gallery._cams[index, role, True] = dequantize(*quantize(gallery.cams(index, role, True)))
        self.index, self.role = min(FIRST, len(gallery.samples) - 1), "teacher"
        self.settings = gallery.first_settings(self.index)

    def expected(self, gallery: Gallery) -> Exploration:
        role: Role = "student" if self.role == "student" else "teacher"
        return gallery.explore(self.index, role, self.settings)

    def assert_right(self) -> None:
        shown, names = self.board.iou(), self.gallery.class_names
        assert agrees(shown, expected_iou(self.expected(self.gallery), names), SAME_MAPS + 0.05), (shown, self.settings)
        assert abs(shown["mean"] - 100 * self.expected(self.full).miou) <= FULL_MAPS

    def change(self, panel: str, act: Any, **settings: Any) -> None:
        before = self.board.picture(panel)
        self.board.after(act)
        self.settings = replace(self.settings, **settings)
        assert self.board.picture(panel) != before, (panel, settings)
        self.assert_right()

    def field(self, name: str) -> Locator:
        return self.form.locator(f"[name={name}]")

    def slide(self, name: str, value: float) -> None:
        self.field(name).fill(str(value))


@pytest.fixture(scope="module")
def static(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Static]:
    gallery = Gallery.pretrained(4)
    path = tmp_path_factory.mktemp("page") / "explorer.html"
    path.write_text(explorer_page(gallery, "Attention explorer", FIRST), encoding="utf-8")
    context = browser.new_context(viewport={"width": 1500, "height": 760}, offline=True)
    watched = Watched(context.new_page(), (path.as_uri(),))
    yield Static(watched, gallery, path)
    context.close()


def test_each_kind_of_control_changes_picture_and_numbers(static: Static) -> None:
    static.assert_right()
    static.change("mask", lambda: static.slide("bg", 0.5), bg_score=0.5)
    static.change("fused", lambda: static.field("on_0").uncheck(), weights=(0.0, 1.0, 1.0, 1.0))
    assert "off" in static.board.root.locator('figure[data-key="scale 0.5"] figcaption').inner_text()
    static.change("fused", lambda: static.slide("weight_3", 0.4), weights=(0.0, 1.0, 1.0, 0.4))
    for rule in FUSIONS[::-1] if static.settings.fusion != FUSIONS[-1] else FUSIONS:
        static.change("fused", lambda rule=rule: static.field("fusion").select_option(rule), fusion=rule)
        if rule == "size_adaptive":
            assert "size-adaptive" in static.board.root.locator('figure[data-key="fused"]').inner_text()
    static.change("scale 1", lambda: static.field("cls").select_option("crane"), class_number=2)
    static.change("mask", lambda: static.field("denoise").uncheck(), denoise=False)
    static.change("mask", lambda: static.field("denoise").check(), denoise=True)
    mask = static.board.picture("mask")
    static.change("target", lambda: static.field("reactivate").uncheck(), reactivate=False)
    assert static.board.picture("mask") == mask
    static.role = "student"
    static.change("scale 1", lambda: static.field("role").select_option("student"))
    numbers = static.board.iou()
    static.change("fused", lambda: static.field("colormap").select_option("cividis"))
    static.change("fused", lambda: static.slide("opacity", 0.3))
    assert static.board.iou() == numbers


def test_curve_is_the_librarys(static: Static) -> None:
    at = static.board.root.locator(".smaf-key")
    assert float(at.get_attribute("data-at") or 0) == pytest.approx(static.settings.bg_score)
    iou = expected_iou(static.expected(static.gallery), static.gallery.class_names)
    name = static.gallery.class_names[static.settings.class_number]
    said = at.locator(".smaf-key-shown").inner_text()
    assert said.startswith(f"{name} ") and abs(float(said.split()[-2]) - iou[name]) <= SAME_MAPS + 0.05
    mean = at.locator(".smaf-key-mean").inner_text()
    assert abs(float(mean.split()[-2]) - iou["mean"]) <= SAME_MAPS + 0.05


def test_pixel_and_keyboard(static: Static) -> None:
    static.board.after(lambda: static.board.click_pixel(80, 60, (128, 128)))
    row, col = static.board.pixel()
    assert abs(row - 80) <= 1 and abs(col - 60) <= 1
    panels = static.board.root.locator(".smaf-panels")
    for key, (down, right) in {"ArrowUp": (-1, 0), "Shift+ArrowLeft": (0, -8)}.items():
        row, col = row + down, col + right
        static.board.after(lambda key=key: panels.press(key))
        assert static.board.pixel() == (row, col)
        reading = static.expected(static.gallery).read(row, col)
        assert static.board.values() == pytest.approx(shown_values(reading), abs=0.0011)
    assert static.board.num_markers() == 8
    names = ("background", *static.gallery.class_names)
    assert static.board.root.locator("[data-truth]").inner_text() == names[reading.ground_truth or 0]
    static.board.after(lambda: panels.press("Escape"))
    assert static.board.num_markers() == 0

    static.index = FIRST + 1
    first = static.gallery.first_settings(static.index)
    change = {"image_label": first.image_label, "class_number": first.class_number}
    static.change("image", lambda: panels.press("PageDown"), **change)
    slider = static.field("bg")
    static.change("mask", lambda: slider.press("ArrowRight"), bg_score=round(static.settings.bg_score + 0.01, 2))


def test_no_scale_at_all_is_said_and_reset_helps(static: Static) -> None:
    for number in range(4):
        if static.field(f"on_{number}").is_checked():
            static.field(f"on_{number}").uncheck()
    status = static.board.root.locator(".smaf-status")
    static.page.wait_for_function(
        "() => document.querySelector('.smaf-status').textContent.includes('no scale takes part')"
    )
    assert status.get_attribute("data-kind") == "error"
    static.role = "teacher"
    first = static.gallery.first_settings(static.index)
    static.settings = replace(first, bg_score=static.gallery.first_settings(FIRST).bg_score)
    static.board.after(lambda: static.field("reset").click())
    static.assert_right()
    assert status.inner_text() == ""


def test_moves_are_fast_and_nothing_was_asked_of_a_network(static: Static, record_property: Any) -> None:
    steps = iter(range(10**6))
    medians = {
        "background": static.board.median(lambda: static.slide("bg", round(0.2 + 0.01 * (next(steps) % 40), 2))),
        "weight": static.board.median(lambda: static.slide("weight_1", round(0.1 * (1 + next(steps) % 10), 1))),
        "opacity": static.board.median(lambda: static.slide("opacity", round(0.05 * (next(steps) % 15), 2))),
    }
    for name, seconds in medians.items():
        record_property(f"redraw_{name}", round(seconds, 3))
        print(f"{name}: {1000 * seconds:.0f} ms from event to picture, median of 20")
    assert max(medians.values()) < REDRAW_SECONDS, medians
    assert static.watched.errors == []
    assert static.watched.requests == []


def test_void_pixels_images_without_ground_truth_and_a_teacher_alone(browser: Browser, tmp_path: Path) -> None:
    gallery = Gallery.pretrained(3)
    del gallery.networks["student"]
    mask = gallery.samples[2].mask
    assert mask is not None
    mask[60:90, 30:80] = 255  # on the llama's body
    gallery.samples[0] = replace(gallery.samples[0], mask=None)
    path = tmp_path / "page.html"
    path.write_text(explorer_page(gallery), encoding="utf-8")
    context = browser.new_context(offline=True)
    static = Static(Watched(context.new_page(), (path.as_uri(),)), gallery, path)
    assert "No ground truth" in static.board.root.locator(".smaf-iou").inner_text()
    # Without a table of IoU the legend says what is shown.
    labels = static.gallery.explore(0, "teacher", gallery.first_settings(0)).mask.unique().tolist()
    legend = static.board.root.locator(".smaf-iou .smaf-class").all_inner_texts()
    assert legend == [gallery.class_names[label - 1] for label in labels if label] != []
    assert static.board.root.locator(".smaf-curve").inner_text() == ""
    assert static.field("role").locator("option").all_inner_texts() == ["classifier (teacher)"]
    static.board.after(lambda: static.board.root.locator(".smaf-strip button").nth(2).click())
    static.settings = replace(static.settings, bg_score=gallery.first_settings(0).bg_score)
    static.assert_right()
    static.change("mask", lambda: static.slide("bg", 0.15), bg_score=0.15)
    static.board.after(lambda: static.board.click_pixel(75, 55, (128, 128)))
    assert static.board.root.locator("[data-truth]").inner_text() == "void"
    assert static.watched.errors == []
    context.close()


def test_background_score_between_the_steps_of_the_slider_is_kept(browser: Browser, tmp_path: Path) -> None:
    gallery = Gallery.pretrained(1)
    attention = gallery.config.attention.model_copy(update={"bg_score": 0.345})
    gallery.config = gallery.config.model_copy(update={"attention": attention})
    path = tmp_path / "page.html"
    path.write_text(explorer_page(gallery), encoding="utf-8")
    context = browser.new_context(offline=True)
    static = Static(Watched(context.new_page(), (path.as_uri(),)), gallery, path)
    at, shown = static.board.root.locator(".smaf-key"), static.form.locator("label:has([name=bg]) output")
    static.board.after(lambda: static.field("colormap").select_option("cividis"))
    assert at.get_attribute("data-at") == shown.inner_text() == "0.345"
    static.board.after(lambda: static.slide("bg", 0.5))
    assert at.get_attribute("data-at") == shown.inner_text() == "0.5"
    context.close()


def own_gallery(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, num: int) -> Gallery:
    """The pretrained networks, fused by a rule that only Python knows: the weakest response over scales."""
    (tmp_path / "own_page_rule.py").write_text("def least(maps, scales): return maps.amin(dim=0)\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    gallery = Gallery.pretrained(num)
    attention = gallery.config.attention.model_copy(update={"fusion": "own_page_rule:least"})
    gallery.config = gallery.config.model_copy(update={"attention": attention})
    return gallery


def test_a_rule_that_only_python_knows_is_shown_by_the_maps_that_python_made(
    browser: Browser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gallery = own_gallery(monkeypatch, tmp_path, 3)
    path = tmp_path / "page.html"
    path.write_text(explorer_page(gallery, index=FIRST), encoding="utf-8")
    context = browser.new_context(offline=True)
    static = Static(Watched(context.new_page(), (path.as_uri(),)), gallery, path)
    assert static.settings.fusion == "own_page_rule:least"
    shown = static.board.iou()
    assert agrees(shown, expected_iou(static.expected(gallery), gallery.class_names), FULL_MAPS), shown
    static.settings = replace(static.settings, fusion="sum")
    assert abs(100 * static.expected(gallery).miou - shown["mean"]) > FULL_MAPS  # so the sum would be noticed
    assert "own_page_rule:least is Python" in static.page.locator(".smaf-status").inner_text()
    assert static.field("on_0").is_disabled() and static.field("weight_3").is_disabled()
    static.board.after(lambda: static.field("fusion").select_option("sum"))
    assert static.field("on_0").is_enabled()
    assert agrees(static.board.iou(), expected_iou(static.expected(gallery), gallery.class_names), FULL_MAPS)
    static.board.after(lambda: static.field("fusion").select_option("own_page_rule:least"))
    assert static.board.iou() == shown
    static.board.after(lambda: static.field("denoise").uncheck())
    static.settings = replace(static.settings, fusion="own_page_rule:least", denoise=False)
    expected = expected_iou(static.expected(gallery), gallery.class_names)
    assert agrees(static.board.iou(), expected, FULL_MAPS), (static.board.iou(), expected)
    assert static.watched.errors == []
    context.close()


def test_a_rule_that_the_page_does_not_know_is_said_and_not_taken_for_the_sum(browser: Browser, tmp_path: Path) -> None:
    gallery = Gallery.pretrained(1)
    page = explorer_page(gallery).replace('["mean", "mean"]', '["median", "median"]')
    path = tmp_path / "page.html"
    path.write_text(page, encoding="utf-8")
    context = browser.new_context(offline=True)
    static = Static(Watched(context.new_page(), (path.as_uri(),)), gallery, path)
    before = static.board.picture("fused")
    static.field("fusion").select_option("median")
    said = static.page.locator(".smaf-status")
    said.get_by_text("this page cannot compute the fusion rule median").wait_for(timeout=20_000)
    assert static.board.picture("fused") == before
    assert any("cannot compute the fusion rule median" in error for error in static.watched.errors)
    context.close()


def test_screenshot_for_the_readme(static: Static, screenshots: Path | None) -> None:
    if screenshots is None:
        pytest.skip("SMAF_SCREENSHOTS names no folder; `make screenshots` does")
    static.board.root.locator(".smaf-strip button").nth(FIRST).click()
    static.board.after(lambda: static.field("reset").click())
    static.board.after(lambda: static.field("cls").select_option("crane"))
    static.board.after(lambda: static.board.click_pixel(58, 86, (128, 128), "image"))
    keep_screenshot(static.page, screenshots / "explorer_static.png")

"""The explorer without a kernel, opened from the disk and offline: its numbers are the library's on the same maps.

The page keeps maps in 8 bits and computes in the browser. Against the library on the same 8-bit maps its IoU must agree
within :data:`SAME_MAPS` points (a pixel on a tie may fall the other way); against the original maps within
:data:`FULL_MAPS` points.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from driving import BoardPage, Watched, agrees, expected_iou, keep_screenshot
from playwright.sync_api import Browser, BrowserContext, Locator

from smaflib.explorer.page import explorer_page, quantize
from smaflib.explorer.state import Exploration, Gallery
from smaflib.models.pretrained import Role

SAME_MAPS = 0.1
FULL_MAPS = 1.0
FIRST = 2


class Static:
    """The page, and the same settings in this process on the same 8-bit maps."""

    def __init__(self, context: BrowserContext, gallery: Gallery, path: Path, index: int = 0) -> None:
        path.write_text(explorer_page(gallery, index), encoding="utf-8")
        self.watched = Watched(context.new_page(), (path.as_uri(),))
        self.page = self.watched.page
        self.page.goto(path.as_uri())
        self.page.locator(".smaf-board[data-drawn]").wait_for(timeout=20_000)
        self.board = BoardPage(self.page.locator(".smaf-board"))
        self.full, self.gallery = gallery, replace(gallery, _cams={})
        for number in range(len(gallery.samples)):
            for role in gallery.roles:
                levels, peaks = quantize(gallery.cams(number, role, True))
                cams = [level / 255 * peak[:, None, None] for level, peak in zip(levels, peaks, strict=True)]
                self.gallery._cams[number, role, True] = cams
        self.index, self.role = index, "teacher"
        self.settings = gallery.first_settings(index)

    def expected(self, gallery: Gallery) -> Exploration:
        role: Role = "student" if self.role == "student" else "teacher"
        return gallery.explore(self.index, role, self.settings)

    def assert_right(self, tolerance: float = SAME_MAPS + 0.05) -> None:
        shown, names = self.board.iou(), self.gallery.class_names
        assert agrees(shown, expected_iou(self.expected(self.gallery), names), tolerance), (shown, self.settings)
        assert abs(shown["mean"] - 100 * self.expected(self.full).miou) <= FULL_MAPS

    def change(self, panel: str, act: Any, **settings: Any) -> None:
        before = self.board.picture(panel)
        self.board.after(act)
        self.settings = replace(self.settings, **settings)
        assert self.board.picture(panel) != before, (panel, settings)
        self.assert_right()

    def field(self, name: str) -> Locator:
        return self.page.locator(f"#smaf-controls [name={name}]")

    def slide(self, name: str, value: float) -> None:
        self.field(name).fill(str(value))

    def status(self) -> str:
        return self.page.locator(".smaf-status").inner_text()


@pytest.fixture(scope="module")
def offline(browser: Browser) -> Iterator[BrowserContext]:
    context = browser.new_context(viewport={"width": 1500, "height": 760}, offline=True)
    yield context
    context.close()


@pytest.fixture(scope="module")
def static(offline: BrowserContext, pretrained: Gallery, tmp_path_factory: pytest.TempPathFactory) -> Static:
    return Static(offline, pretrained, tmp_path_factory.mktemp("page") / "explorer.html", FIRST)


def test_each_control_changes_picture_and_numbers(static: Static) -> None:
    static.assert_right()
    static.change("mask", lambda: static.slide("bg", 0.5), bg_score=0.5)
    static.change("fused", lambda: static.field("on_0").uncheck(), weights=(0.0, 1.0, 1.0, 1.0))
    assert "off" in static.board.root.locator('figure[data-key="scale 0.5"] figcaption').inner_text()
    static.change("fused", lambda: static.slide("weight_3", 0.4), weights=(0.0, 1.0, 1.0, 0.4))
    for rule in ("max", "mean", "sum", "size_adaptive"):
        if rule != static.settings.fusion:
            static.change("fused", lambda rule=rule: static.field("fusion").select_option(rule), fusion=rule)
    static.change("scale 1", lambda: static.field("cls").select_option("crane"), class_number=2)
    static.change("mask", lambda: static.field("denoise").uncheck(), denoise=False)
    static.change("mask", lambda: static.field("denoise").check(), denoise=True)
    static.change("target", lambda: static.field("reactivate").uncheck(), reactivate=False)
    static.role = "student"
    static.change("scale 1", lambda: static.field("role").select_option("student"))
    numbers = static.board.iou()
    static.change("fused", lambda: static.slide("opacity", 0.3))
    assert static.board.iou() == numbers
    at = static.board.root.locator(".smaf-key")  # the curve's point at the threshold
    assert float(at.get_attribute("data-at") or 0) == static.settings.bg_score
    shown = {"crane": at.locator(".smaf-key-shown"), "mean": at.locator(".smaf-key-mean")}
    assert {name: float(key.inner_text().split()[-2]) for name, key in shown.items()} == {k: numbers[k] for k in shown}


def test_pixel_and_keyboard(static: Static) -> None:
    static.board.after(lambda: static.board.click_pixel(80, 60, (128, 128)))
    row, col = static.board.pixel()
    assert abs(row - 80) <= 1 and abs(col - 60) <= 1
    panels = static.board.root.locator(".smaf-panels")
    for key, (down, right) in {"ArrowUp": (-1, 0), "Shift+ArrowLeft": (0, -8)}.items():
        row, col = row + down, col + right
        static.board.after(lambda key=key: panels.press(key))
        assert static.board.pixel() == (row, col)
        expected = static.expected(static.gallery)
        assert static.board.values() == pytest.approx(expected.read(row, col), abs=0.0016)
    assert static.board.num_markers() == 8
    names = ("background", *static.gallery.class_names)
    assert expected.ground_truth is not None
    assert static.board.root.locator("[data-truth]").inner_text() == names[int(expected.ground_truth[row, col])]
    static.board.after(lambda: panels.press("Escape"))
    assert static.board.num_markers() == 0

    static.index = FIRST - 1
    first = static.gallery.first_settings(static.index)
    number = static.settings.class_number if static.settings.class_number in first.image_label else first.class_number
    change = {"image_label": first.image_label, "class_number": number}
    static.change("image", lambda: panels.press("PageUp"), **change)
    bg_score = round(static.settings.bg_score + 0.01, 2)
    static.change("mask", lambda: static.field("bg").press("ArrowRight"), bg_score=bg_score)


def test_no_scale_is_refused_and_reset_helps(static: Static) -> None:
    for number in range(4):
        static.field(f"on_{number}").uncheck()
    static.page.get_by_text("no scale takes part").wait_for()
    static.role, static.settings = "teacher", static.gallery.first_settings(static.index)
    static.board.after(lambda: static.field("reset").click())
    static.assert_right()
    assert static.status() == ""
    assert static.watched.errors == [] and static.watched.requests == []


def test_void_images_without_ground_truth_a_teacher_alone_and_a_threshold_between_steps(
    offline: BrowserContext, pretrained: Gallery, tmp_path: Path
) -> None:
    attention = pretrained.config.attention.model_copy(update={"bg_score": 0.345})  # the slider has steps of 0.01
    config = pretrained.config.model_copy(update={"attention": attention})
    one, two, three = pretrained.samples
    assert three.mask is not None
    mask = three.mask.clone()
    mask[60:90, 30:80] = 255  # on the llama's body
    samples, networks = [replace(one, mask=None), two, replace(three, mask=mask)], dict(pretrained.networks)
    del networks["student"]
    gallery = replace(pretrained, samples=samples, config=config, networks=networks)
    static = Static(offline, gallery, tmp_path / "page.html")
    assert "No ground truth" in static.board.root.locator(".smaf-iou").inner_text()
    labels = static.gallery.explore(0, "teacher", gallery.first_settings(0)).mask.unique().tolist()
    legend = static.board.root.locator(".smaf-iou .smaf-class").all_inner_texts()
    assert legend == [gallery.class_names[label - 1] for label in labels if label] != []
    assert static.board.root.locator(".smaf-curve").inner_text() == ""
    assert static.field("role").locator("option").all_inner_texts() == ["classifier (teacher)"]
    static.board.after(lambda: static.board.root.locator(".smaf-strip button").nth(2).click())
    static.index, static.settings = 2, gallery.first_settings(2)
    static.assert_right()
    assert static.board.root.locator(".smaf-key").get_attribute("data-at") == "0.345"
    static.change("mask", lambda: static.slide("bg", 0.15), bg_score=0.15)
    static.board.after(lambda: static.board.click_pixel(75, 55, (128, 128)))
    assert static.board.root.locator("[data-truth]").inner_text() == "void"


def test_a_custom_rule_is_shown_by_maps_from_python_and_an_unknown_one_is_refused(
    offline: BrowserContext, pretrained: Gallery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_page_rule.py").write_text("def least(maps, scales): return maps.amin(dim=0)\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    rule = "own_page_rule:least"
    attention = pretrained.config.attention.model_copy(update={"fusion": rule})
    gallery = replace(pretrained, config=pretrained.config.model_copy(update={"attention": attention}))
    static = Static(offline, gallery, tmp_path / "page.html", FIRST)
    static.assert_right(FULL_MAPS)
    shown = static.board.iou()
    assert f"{rule} is Python" in static.status()
    assert static.field("on_0").is_disabled() and static.field("weight_3").is_disabled()
    static.board.after(lambda: static.field("fusion").select_option("sum"))
    static.settings = replace(static.settings, fusion="sum")
    static.assert_right()
    assert static.field("on_0").is_enabled() and abs(shown["mean"] - static.board.iou()["mean"]) > FULL_MAPS
    static.field("fusion").locator("option[value=mean]").evaluate("option => { option.value = 'median'; }")
    before = static.board.picture("fused")
    static.field("fusion").select_option("median")
    static.page.get_by_text("this page cannot compute the fusion rule median").wait_for()
    assert static.board.picture("fused") == before


def test_screenshot_for_the_readme(static: Static, screenshots: Path | None) -> None:
    if screenshots is None:
        pytest.skip("SMAF_SCREENSHOTS names no folder; `make screenshots` does")
    static.board.root.locator(".smaf-strip button").nth(FIRST).click()
    static.board.after(lambda: static.field("reset").click())
    static.board.after(lambda: static.field("cls").select_option("crane"))
    static.board.after(lambda: static.board.click_pixel(58, 86, (128, 128), "image"))
    keep_screenshot(static.page, screenshots / "explorer_static.png")

"""What the browser tests share: watching a page, running a notebook in it, moving controls, reading numbers."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import Browser, Locator, Page

from smaflib.explorer.state import Exploration

START_SECONDS = 180  # a machine with other work


@dataclass
class Watched:
    """A page, its errors, and its requests to other addresses."""

    page: Page
    allowed: tuple[str, ...]
    errors: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", lambda said: self.errors.append(said.text) if said.type == "error" else None)
        self.page.on("request", lambda request: self._note(request.url))
        self.page.on("websocket", lambda socket: self._note(socket.url))

    def _note(self, url: str) -> None:
        if not url.startswith((*self.allowed, "data:", "blob:", "about:")):
            self.requests.append(url)


def open_notebook(browser: Browser, base: str, name: str) -> Watched:
    """Open a notebook in JupyterLab and run all its cells; none may fail."""
    context = browser.new_context(viewport={"width": 1600, "height": 1000})
    context.set_default_timeout(START_SECONDS * 1000)  # of all waits that name none: a machine with other work
    page = context.new_page()
    watched = Watched(page, (base, base.replace("http", "ws")))
    page.goto(f"{base}/lab/tree/{name}?token=test&reset")
    # A kernel is "idle" before the page is connected to it; run-all would then wait for ever.
    page.wait_for_function(
        """() => { const panel = window.jupyterapp?.shell.currentWidget, session = panel?.sessionContext;
          const kernel = session?.session?.kernel;
          return kernel && session.isReady && kernel.connectionStatus === "connected" && kernel.status === "idle"; }""",
        timeout=START_SECONDS * 1000,
    )
    page.evaluate(
        """() => { window.ran = null; window.jupyterapp.commands.execute("notebook:run-all-cells")
          .then(() => { window.ran = "ok"; }, (error) => { window.ran = String(error); }); }"""
    )
    page.wait_for_function("() => window.ran !== null", timeout=START_SECONDS * 1000)
    assert page.evaluate("() => window.ran") == "ok"
    assert page.locator('[data-mime-type="application/vnd.jupyter.error"]').count() == 0
    return watched


class BoardPage:
    """The board in a page: what it shows, and how long a control takes to change it."""

    def __init__(self, root: Locator) -> None:
        self.root, self.page = root, root.page
        root.evaluate(
            """root => {
              window.drawnAt = 0;
              new MutationObserver(() => { window.drawnAt = performance.now(); })
                .observe(root, { attributes: true, attributeFilter: ["data-drawn"] });
              for (const kind of ["keydown", "click", "input", "change"])
                document.addEventListener(kind, () => { window.movedAt ??= performance.now(); }, true);
            }"""
        )

    @property
    def drawn(self) -> int:
        return int(self.root.get_attribute("data-drawn") or 0)

    def picture(self, panel: str) -> str:
        """The pixels of a panel, as text."""
        return self.root.locator(f'figure[data-key="{panel}"] canvas').evaluate("canvas => canvas.toDataURL()")

    def after(self, act: Callable[[], Any]) -> float:
        """Do something, wait until the board has been drawn again; seconds from the first event to the new picture."""
        before = self.drawn
        self.page.evaluate("() => { window.drawnAt = 0; window.movedAt = null; }")
        act()
        self.page.wait_for_function(
            "([root, before]) => Number(root.dataset.drawn) > before && window.drawnAt",
            arg=[self.root.element_handle(), before],
            timeout=20_000,
        )
        return float(self.page.evaluate("() => window.drawnAt - window.movedAt")) / 1000

    def iou(self) -> dict[str, float]:
        """IoU in percent by label and ``mean``, as shown."""
        return self._table(".smaf-iou tr", "label")

    def values(self) -> dict[str, float]:
        """Values of the marked pixel by name, as shown."""
        return self._table(".smaf-reading tr", "value")

    def _table(self, rows: str, name: str) -> dict[str, float]:
        cells = self.root.locator(rows).evaluate_all(
            f"rows => rows.map(row => [row.dataset.{name}, row.querySelector('td:last-child').textContent])"
        )
        return {name: float(text.removesuffix(" %")) for name, text in cells}

    def pixel(self) -> tuple[int, int]:
        """Row and column of the marked pixel, as shown."""
        text = self.root.locator(".smaf-reading").inner_text()
        found = re.search(r"row (\d+), column (\d+):", text)
        assert found, text
        return int(found[1]), int(found[2])

    def num_markers(self) -> int:
        """Panels in which the marker is drawn."""
        return self.root.locator("figure svg .smaf-dot").count()

    def click_pixel(self, row: int, col: int, size: tuple[int, int], panel: str = "fused") -> None:
        """Click into the middle of a pixel; where pixels are small on the screen, its neighbour may be hit."""
        canvas = self.root.locator(f'figure[data-key="{panel}"] canvas')
        box = canvas.bounding_box()
        assert box is not None
        where = {"x": (col + 0.5) / size[1] * box["width"], "y": (row + 0.5) / size[0] * box["height"]}
        canvas.click(position=where)  # type: ignore[arg-type]


def keep_screenshot(target: Locator | Page, path: Path) -> None:
    """Keep a small screenshot for the README, in 256 colours."""
    with Image.open(io.BytesIO(target.screenshot())) as picture:
        small = picture.convert("RGB").quantize(256, dither=Image.Dither.FLOYDSTEINBERG)
    small.save(path, optimize=True)


def expected_iou(result: Exploration, class_names: tuple[str, ...]) -> dict[str, float]:
    """What the page should show, unrounded: percent by label and ``mean``."""
    assert result.iou is not None
    values = zip(("background", *class_names), (100 * result.iou).tolist(), strict=True)
    return {name: value for name, value in values if value == value} | {"mean": 100 * result.miou}


def agrees(shown: dict[str, float], expected: dict[str, float], tolerance: float) -> bool:
    """Whether a page shows just these labels, each within ``tolerance`` points."""
    return shown.keys() == expected.keys() and all(abs(shown[k] - expected[k]) <= tolerance for k in shown)

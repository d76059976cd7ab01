"""A real Chromium, and a real JupyterLab for it to open: the fixtures of the browser tests.

Where there is no Chromium these tests are skipped with a reason; in CI (``CI=true``) that is a failure. ``make browser``
gets one, ``SMAF_CHROMIUM`` names one. ``SMAF_SCREENSHOTS=docs`` keeps pictures of what the tests see (``make
screenshots``).
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

ROOT = Path(__file__).parents[2]
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")  # as in the Makefile
START_SECONDS = 90


def find_chromium() -> str | None:
    candidates = [os.environ.get("SMAF_CHROMIUM"), *NAMES]
    return next((found for name in candidates if name and (found := shutil.which(name))), None)


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    path = find_chromium()
    if path is None:
        what = "there is no Chromium: `make browser` gets one where apt-get can; SMAF_CHROMIUM names one"
        if os.environ.get("CI", "").lower() not in ("", "0", "false"):
            pytest.fail(what)
        pytest.skip(what)
    with sync_playwright() as playwright:
        # No sandbox: in containers there is no user namespace for it, and the pages are this project's own.
        arguments = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking"]
        chromium = playwright.chromium.launch(executable_path=path, headless=True, args=arguments)
        yield chromium
        chromium.close()


@dataclass
class Watched:
    """A page, what it complained about, and what it asked of other machines."""

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


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """JupyterLab at work in a folder of its own with a copy of explore.ipynb, and none of the user's settings."""
    home = tmp_path_factory.mktemp("lab")
    work = home / "work"
    work.mkdir()
    shutil.copy(ROOT / "notebooks" / "explore.ipynb", work)
    settings = home / "settings" / "@jupyterlab" / "apputils-extension"
    settings.mkdir(parents=True)
    quiet = {"fetchNews": "false", "checkForUpdates": False, "doNotDisturbMode": True}
    (settings / "notification.jupyterlab-settings").write_text(json.dumps(quiet))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = {
        "ServerApp.ip": "127.0.0.1",
        "ServerApp.port": port,
        "ServerApp.port_retries": 0,
        "ServerApp.open_browser": False,
        "ServerApp.allow_root": True,
        "ServerApp.root_dir": str(work),
        "IdentityProvider.token": "test",
        "LabApp.expose_app_in_browser": True,
    }
    (home / "config.py").write_text("".join(f"c.{name} = {value!r}\n" for name, value in options.items()))
    folders = {"CONFIG": "config", "DATA": "data", "RUNTIME": "runtime"}
    env = os.environ | {f"JUPYTER_{name}_DIR": str(home / folder) for name, folder in folders.items()}
    env |= {"JUPYTERLAB_SETTINGS_DIR": str(home / "settings"), "JUPYTERLAB_WORKSPACES_DIR": str(home / "workspaces")}
    env |= {"PYTHONPATH": str(ROOT), "IPYTHONDIR": str(home / "ipython"), "OMP_NUM_THREADS": "1"}
    with (home / "log").open("w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", f"--config={home / 'config.py'}"],
            env=env,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    base = f"http://127.0.0.1:{port}"
    try:
        _await_server(server, base, home / "log")
        yield base
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(20)


def _await_server(server: subprocess.Popen[bytes], base: str, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"{base}/api/status?token=test", timeout=1):
                return
        except OSError:
            assert server.poll() is None, log.read_text()[-2000:]
            time.sleep(0.2)
    raise AssertionError(f"JupyterLab did not start: {log.read_text()[-2000:]}")


def run_notebook(watched: Watched, base: str, name: str) -> None:
    """Open a notebook and run all its cells."""
    page = watched.page
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
    page.locator(".smaf-board[data-drawn]").first.wait_for(timeout=30_000)


@pytest.fixture(scope="session")
def screenshots() -> Path | None:
    """Where to keep pictures of the explorer; None: nowhere."""
    folder = os.environ.get("SMAF_SCREENSHOTS")
    return ROOT / folder if folder else None

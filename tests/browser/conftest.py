"""A real Chromium, and a real JupyterLab for it to open: the fixtures of the browser tests.

Where there is no Chromium these tests are skipped with a reason; in CI (``CI=true``) that is a failure. ``make
browser`` gets one, ``SMAF_CHROMIUM`` names one. ``SMAF_SCREENSHOTS=docs`` keeps pictures of what the tests see (``make
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
from pathlib import Path
from typing import Any

import pytest
from driving import START_SECONDS
from playwright.sync_api import Browser, expect, sync_playwright

ROOT = Path(__file__).parents[2]
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")  # as in the Makefile


def find_chromium() -> str | None:
    candidates = [os.environ.get("SMAF_CHROMIUM"), *NAMES]
    return next((found for name in candidates if name and (found := shutil.which(name))), None)


@pytest.fixture(scope="session")
def chromium_path() -> str:
    path = find_chromium()
    if path is None:
        what = "there is no Chromium: `make browser` gets one where apt-get can; SMAF_CHROMIUM names one"
        if os.environ.get("CI", "").lower() not in ("", "0", "false"):
            pytest.fail(what)
        pytest.skip(what)
    return path


# Not for the session: playwright keeps an event loop running in this thread, and later tests want none.
@pytest.fixture(scope="module")
def browser(chromium_path: str) -> Iterator[Browser]:
    with sync_playwright() as playwright:
        # No sandbox: in containers there is no user namespace for it, and all pages are from this project.
        arguments = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking"]
        expect.set_options(timeout=START_SECONDS * 1000)
        chromium = playwright.chromium.launch(executable_path=chromium_path, headless=True, args=arguments)
        yield chromium
        chromium.close()


@pytest.fixture(scope="session")
def lab_work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that JupyterLab shows."""
    work = tmp_path_factory.mktemp("lab") / "work"
    work.mkdir()
    return work


@pytest.fixture(scope="session")
def lab(lab_work: Path, chromium_path: str) -> Iterator[Any]:
    """JupyterLab in a new folder with a copy of explore.ipynb, and without the user's settings."""
    work, home = lab_work, lab_work.parent
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
    while server.poll() is None and time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"{base}/api/status?token=test", timeout=1):
                return
        except OSError:
            time.sleep(0.2)
    raise AssertionError(f"JupyterLab did not start: {log.read_text()[-2000:]}")


@pytest.fixture(scope="session")
def screenshots() -> Path | None:
    """Where to keep pictures of the explorer; None: nowhere."""
    folder = os.environ.get("SMAF_SCREENSHOTS")
    return ROOT / folder if folder else None

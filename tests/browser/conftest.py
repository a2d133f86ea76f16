"""One Chromium for all browser tests, and servers on loopback with free ports that stop with their fixture."""

from __future__ import annotations

import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import uvicorn
from playwright.sync_api import Browser, Page, sync_playwright

from tests.browser.sample import TOKEN, sample_app

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
ARGUMENTS = [
    "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
    "--disable-sync", "--no-first-run",
]  # fmt: skip
START_S = 20.0


@contextmanager
def serving(app: Any) -> Iterator[str]:
    """Serve `app` on a free loopback port; yields its address."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        config = uvicorn.Config(app, log_level="warning", lifespan="on", timeout_graceful_shutdown=2)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=lambda: server.run(sockets=[listener]), name="page server")
        thread.start()
        deadline = time.monotonic() + START_S
        while not server.started and thread.is_alive() and time.monotonic() < deadline:
            time.sleep(0.02)
        try:
            assert server.started, "the server did not start"
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(START_S)


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """Headless Chromium; tests are skipped with a clear line where there is none."""
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine: apt install chromium")
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield chromium
        chromium.close()


@pytest.fixture(scope="session")
def sample_url() -> Iterator[str]:
    """The pages over sample documents."""
    with serving(sample_app()) as url:
        yield url


@pytest.fixture
def open_page(browser: Browser, sample_url: str) -> Iterator[Callable[..., Page]]:
    """Opens a signed-in page: `open_page(path, width=1280)`. A script error on it fails the test."""
    contexts, complaints = [], []

    def open_it(path: str, *, width: int = 1280, color_scheme: Any = "light") -> Page:
        context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=color_scheme)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda m: complaints.append(m.text) if "Content Security Policy" in m.text else None)
        sign_in(page, sample_url, TOKEN)
        page.goto(sample_url + path)
        return page

    yield open_it
    for context in contexts:
        context.close()
    assert complaints == []


def sign_in(page: Page, url: str, token: str) -> None:
    """Sign in with the keyboard alone: the field has the focus."""
    page.goto(url + "/login")
    page.keyboard.type(token)
    page.keyboard.press("Enter")
    page.wait_for_url(url + "/")

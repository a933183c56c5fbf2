"""What Debian's Chromium has to say of a page: `python -m tests.browser page.html` fails where it is not content."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

_ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]

Open = Callable[..., Page]
"""Opens an address in a window of its own; takes what Playwright's `new_context` takes: viewport, has_touch, ..."""


@contextmanager
def started() -> Generator[Browser]:
    """The browser; where there is none a test is skipped, but in CI it fails."""
    path = shutil.which("chromium")
    if path is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("there is no chromium: apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=_ARGUMENTS)
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def windows(browser: Browser) -> Generator[tuple[Open, list[str]]]:
    """Opens pages, and tells what is wrong with them: what the console says, errors, requests to other hosts."""
    contexts, said = list[Any](), list[str]()

    def open_page(address: str, **settings: Any) -> Page:
        home = address.split("?")[0]
        contexts.append(browser.new_context(**settings))
        page: Page = contexts[-1].new_page()
        page.set_default_timeout(60_000)
        page.on("console", lambda message: said.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: said.append(f"error: {error}"))
        page.on(
            "request", lambda request: None if _at_home(request.url, home) else said.append(f"asked for {request.url}")
        )
        page.goto(address)
        return page

    try:
        yield open_page, said
    finally:
        for context in contexts:
            context.close()


def _at_home(address: str, home: str) -> bool:
    return address.startswith((home, "data:", "blob:"))


def problems(page: Path) -> list[str]:
    """Errors on the console, pictures without width, addresses outside of the page; an empty page is one, too."""
    with started() as browser, windows(browser) as (open_page, said):
        shown = open_page(page.absolute().as_uri())
        pictures: list[tuple[float, str]] = shown.evaluate(
            """[...document.querySelectorAll("img, svg")].map((element) => [
                element.naturalWidth ?? element.getBoundingClientRect().width, element.outerHTML.slice(0, 80)])"""
        )
        said += [f"picture without width: {start}" for width, start in pictures if not width]
        return said if pictures else [*said, "no picture at all"]


if __name__ == "__main__":
    for line in (found := problems(Path(sys.argv[1]))):
        print(line)
    sys.exit(bool(found))

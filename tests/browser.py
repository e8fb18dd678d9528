"""Opens pages in a real browser without a window; tests skip or fail where there is none."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

REQUIRE = "CMPOSE_REQUIRE_BROWSER"
_NAMES = ("chromium", "chromium-browser", "google-chrome")


def require_browser() -> str:
    """The path of a Chromium. Without one the test is skipped.

    ``CMPOSE_BROWSER`` names one. With ``CMPOSE_REQUIRE_BROWSER=1``, which CI sets, the test fails
    in place of being skipped.
    """
    named = os.environ.get("CMPOSE_BROWSER", "")
    paths = [shutil.which(name) for name in ([named] if named else _NAMES)]
    path = next(filter(None, paths), None)
    missing = ""
    if path is None:
        missing = f"no browser {named or ' or '.join(_NAMES)}: install Debian's chromium"
    else:
        try:
            import playwright.sync_api  # noqa: F401
        except ImportError:
            missing = "no playwright, which drives the browser: pip install -e '.[dev]'"
    if not missing:
        assert path is not None
        return path
    if os.environ.get(REQUIRE) == "1":
        pytest.fail(f"{REQUIRE}=1, but there is {missing}")
    pytest.skip(f"there is {missing}")


class Watch:
    """What a page writes to the console, and what it wants to load; both should stay empty."""

    def __init__(self, page: Any) -> None:
        self.messages: list[str] = []
        self.requests: list[str] = []
        page.on("console", lambda message: self.messages.append(message.text))
        page.on("pageerror", lambda error: self.messages.append(str(error)))
        page.on("request", self._request)

    def _request(self, request: Any) -> None:
        # data: URIs are part of the page, and the page itself is the only file that is read.
        if not request.url.startswith("data:") and not request.is_navigation_request():
            self.requests.append(request.url)


@contextmanager
def open_browser() -> Iterator[Any]:
    """Playwright's ``Browser``, offline."""
    path = require_browser()
    from playwright.sync_api import sync_playwright

    # As root, as in a container, Chromium has no sandbox.
    sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=sandbox)
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def open_page(browser: Any, file: Path, **options: Any) -> Iterator[tuple[Any, Watch]]:
    """Opens a file in a context of its own, and watches it.

    There is no network. The page scrolls at once, so that a click does not fall where something
    was before.
    """
    context = browser.new_context(offline=True, reduced_motion="reduce", **options)
    page = context.new_page()
    page.set_default_timeout(15_000)
    watch = Watch(page)
    page.goto(file.resolve().as_uri())
    try:
        yield page, watch
    finally:
        context.close()

"""The browser that the tests of one file share; tests/support/page.py has what they do with it."""

from collections.abc import Iterator

import pytest
from playwright.sync_api import BrowserContext, Page

from tests.support.page import FORBIDDEN, App, chromium, open_page


@pytest.fixture(scope="module")
def browser() -> Iterator[BrowserContext]:
    """A Chromium for the tests of one file. Cookies go with each page that is opened, so that each is a new visitor's.

    Not for all files of a process: Playwright's loop runs as long as its browser does, and other tests run their own.
    """
    with chromium() as opened:
        yield opened


@pytest.fixture(scope="module")
def url(app: App) -> str:
    """Where the page of the file's `app` is, once both arms are warm."""
    return app.warm_url()


@pytest.fixture
def page(browser: BrowserContext, url: str) -> Iterator[Page]:
    """A fresh visitor's page."""
    opened = open_page(browser, url)
    yield opened
    opened.close()
    assert not FORBIDDEN

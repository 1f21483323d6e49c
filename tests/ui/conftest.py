"""The browser that the tests of one file share; tests/support/page.py has what they do with it."""

from collections.abc import Iterator

import pytest
from playwright.sync_api import BrowserContext

from tests.support.page import chromium


@pytest.fixture(scope="module")
def browser() -> Iterator[BrowserContext]:
    """A Chromium for the tests of one file. Cookies go with each page that is opened, so that each is a new visitor's.

    Not for all files of a process: Playwright's loop runs as long as its browser does, and other tests run their own.
    """
    with chromium() as opened:
        yield opened

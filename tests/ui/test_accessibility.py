"""What axe-core finds on the page, and whether it fits every screen: all tabs, all parts open, light and dark."""

from collections.abc import Iterator

import pytest
from axe_playwright_python.sync_playwright import Axe  # type: ignore[import-untyped]  # it has no types
from playwright.sync_api import BrowserContext, Page, expect

from tests.conftest import TinyFactory
from tests.support.page import CHROMIUM, FORBIDDEN, open_page, running, write_config

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not CHROMIUM.exists(), reason=f"needs {CHROMIUM} (Debian's package chromium)"),
]
RUN_MS = 120_000
WIDTHS = (320, 390, 768, 1280, 1920)


@pytest.fixture(scope="module")
def url(tiny_model: TinyFactory, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    config = write_config(
        tmp_path_factory.mktemp("accessible"),
        model={"name": str(tiny_model().folder)},
        generation={"max_new_tokens": 8},
    )
    with running(config) as app:
        yield app.warm_url()


@pytest.fixture(scope="module", params=["light", "dark"])
def page(browser: BrowserContext, url: str, request: pytest.FixtureRequest) -> Iterator[Page]:
    """A page after a comparison, with every part open."""
    opened = open_page(browser, url, theme=request.param)
    opened.locator("#compare").click()
    expect(opened.locator("#time section")).to_be_visible(timeout=RUN_MS)
    yield opened
    opened.close()
    assert not FORBIDDEN


def tabs(page: Page) -> Iterator[str]:
    """Each tab in turn, with its folded parts open."""
    for tab in page.get_by_role("tab").all():
        tab.click()
        panel = page.get_by_role("tabpanel").filter(visible=True)
        for fold in panel.locator("button.label-wrap:not(.open)").all():
            if fold.is_visible():
                fold.click()
        panel.locator("details").evaluate_all("parts => parts.forEach(part => part.open = true)")
        yield tab.inner_text()


def test_axe_finds_nothing_on_any_tab_with_all_parts_open(page: Page) -> None:
    for name in tabs(page):
        found = Axe().run(page).response["violations"]
        said = [f"{each['impact']} {each['id']}: {[node['target'] for node in each['nodes']][:5]}" for each in found]
        assert not said, f"{name}: {said}"


def test_no_tab_is_wider_than_any_screen(page: Page) -> None:
    for name in tabs(page):
        for width in WIDTHS:
            page.set_viewport_size({"width": width, "height": 900})
            assert page.evaluate("document.documentElement.scrollWidth") <= width, f"{name} at {width}"

"""What a page shows of another run while it waits: of a visitor's comparison how far it is, and none of its texts; of a
request of the endpoint under its port (ui.api) that it runs."""

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from playwright.sync_api import BrowserContext, Page, expect

from tests.conftest import TinyFactory
from tests.support.page import CHROMIUM, PATIENCE_MS, App, running, write_config

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not CHROMIUM.exists(), reason=f"needs {CHROMIUM} (Debian's package of that name)"),
]
PROMPT = "The zebra asked a question."
LONG = {"max_new_tokens": 400}


@pytest.fixture(scope="module")
def app(tiny_model: TinyFactory, tmp_path_factory: pytest.TempPathFactory) -> Iterator[App]:
    model = {"name": str(tiny_model().folder)}
    config = write_config(tmp_path_factory.mktemp("waiting"), model=model, generation=LONG, ui={"api": True})
    with running(config) as started:
        yield started


@pytest.fixture
def runner(page: Page) -> Page:
    """A visitor whose comparison runs, and takes long."""
    page.locator("#pairs").get_by_text("10", exact=True).click()
    page.locator("#prompt textarea").fill(PROMPT)
    page.locator("#compare").click()
    return page


def test_who_waits_sees_how_far_the_comparison_is_and_not_what_it_says(
    browser: BrowserContext, url: str, runner: Page
) -> None:
    other = browser.new_page()
    other.goto(url)
    watched = other.locator("#watch")
    expect(watched).to_contain_text(re.compile(r"\d+ tokens, TTFT [\d.]+ m?s"))
    expect(other.locator("#compare")).to_be_enabled()
    other.locator("#compare").click()
    expect(other.locator("#status")).to_contain_text("You are number 1 in the queue")
    expect(watched).to_contain_text(re.compile(r"run \d+ of 10: measuring again"))
    answer = runner.locator("#full .sl-answer").inner_text().strip()
    assert len(answer) > 100
    seen = other.content()
    assert PROMPT not in seen and answer[:40] not in seen
    runner.locator("#stop").click()
    expect(other.locator("#full .sl-answer")).not_to_be_empty()  # her turn has come; its answer may be short
    expect(watched).to_be_hidden()
    other.close()


def test_a_page_that_nobody_runs_beside_shows_nothing_of_it(page: Page) -> None:
    expect(page.locator("#status")).to_be_visible()
    expect(page.locator("#watch")).to_be_hidden()


def ask(url: str) -> httpx.Response:
    """A short request of the OpenAI protocol, under the page's port."""
    (model, _) = (each["id"] for each in httpx.get(f"{url}/v1/models").json()["data"])
    asked = {"model": model, "prompt": "The sky", "max_tokens": 2}
    return httpx.post(f"{url}/v1/completions", json=asked, timeout=PATIENCE_MS / 1000)


def test_a_request_of_the_api_does_not_run_while_a_comparison_is_measured(url: str, runner: Page) -> None:
    status = runner.locator("#status")
    expect(status).to_contain_text("run 1 of 10")
    with ThreadPoolExecutor() as threads:
        answer = threads.submit(ask, url)
        expect(status).to_contain_text(re.compile(r"run [2-9] of 10"))
        assert not answer.done()
        runner.locator("#stop").click()
        assert answer.result().status_code == 200
    expect(status).to_have_text(re.compile("Stopped|Done"))


def test_the_page_says_that_a_request_of_the_api_runs_and_a_comparison_waits_for_it(
    app: App, url: str, page: Page
) -> None:
    with ThreadPoolExecutor() as threads:
        children = app.children()
        for child in children:
            child.suspend()
        try:
            answer = threads.submit(ask, url)
            # A page that is open looks only while it waits; one that is opened looks at once.
            page.reload()
            expect(page.locator("#status")).to_contain_text("A request of the API (/v1) is running. If you press")
            page.locator("#compare").click()
            expect(page.locator("#status")).to_contain_text("(/v1) is running. You are number 1 in the queue")
        finally:
            for child in children:
                child.resume()
        assert answer.result().status_code == 200
    expect(page.locator("#full .sl-answer")).not_to_be_empty()

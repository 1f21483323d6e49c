"""The panel "Choose another model" in a real browser: another visitor's comparison first, then the other model."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import BrowserContext, Page, expect

from tests.conftest import TinyFactory
from tests.support.page import CHROMIUM, FORBIDDEN, open_page, running, setting, write_config

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not CHROMIUM.exists(), reason=f"needs {CHROMIUM} (Debian's package chromium)"),
]
RUN_MS = 120_000
NO_HUB = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_DISABLE_TELEMETRY": "1"}
"""A port where nobody listens."""


@pytest.fixture(scope="module")
def url(tiny_model: TinyFactory, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """An app with a Llama, and a GPT-2 in its cache."""
    folder: Path = tmp_path_factory.mktemp("models")
    shutil.copytree(tiny_model("gpt2").folder, folder / "cache" / "v1" / "other")
    config = write_config(
        folder, model={"name": str(tiny_model().folder)}, generation={"max_new_tokens": 100, "chat": False}
    )
    with running(config, environment={**NO_HUB, "SPLITLEARN_CACHE": str(folder / "cache")}, fresh=True) as app:
        yield app.warm_url()


def open_list(page: Page) -> None:
    page.get_by_role("tab", name="Model and cut").click()
    page.locator("#models > button").click()
    expect(page.locator("#models-list tbody tr").first).to_be_visible()


def test_another_model_is_chosen_by_keyboard_and_waits_for_another_visitors_comparison(
    browser: BrowserContext, url: str
) -> None:
    other, owner = open_page(browser, url), open_page(browser, url)
    open_list(owner)
    rows = owner.locator("#models-list tbody tr")
    expect(rows.filter(has_text="gpt2").first).to_contain_text("no: the model hub cannot be reached")
    expect(rows.first).to_contain_text("in use")
    other.locator("#settings > button").click()
    other.get_by_label("Ignore the end token").check()
    other.locator("#compare").click()
    expect(other.locator("#full .sl-answer")).not_to_be_empty(timeout=RUN_MS)
    owner.get_by_label("other", exact=True).focus()
    owner.keyboard.press("Space")
    owner.locator("#models-load").focus()
    owner.keyboard.press("Enter")
    status = owner.locator("#models-status").get_by_role("status")
    expect(status).to_contain_text("You are number 1 in line")
    expect(other.locator("#result .sl-verdict")).to_contain_text("Identical", timeout=RUN_MS)
    expect(status).to_contain_text("In use:", timeout=RUN_MS)
    expect(owner.locator("#facts")).to_contain_text("other")
    expect(owner.locator("#model-facts")).to_contain_text("LayerNorm")
    expect(owner.locator("#model-yaml textarea")).to_have_value("split:\n  start: 2\n  end: 4")
    expect(rows.filter(has_text="in use")).to_contain_text("other")
    owner.get_by_role("tab", name="Answers").click()
    setting(owner, "prompt", "Once")
    owner.locator("#compare").click()
    expect(owner.locator("#result .sl-verdict")).to_contain_text("Identical", timeout=RUN_MS)
    expect(owner.locator("#command-cut")).to_contain_text("other")
    for page in (other, owner):
        page.close()
    assert not FORBIDDEN


def test_who_comes_through_a_proxy_without_a_login_sees_the_model_and_cannot_change_it(
    browser: BrowserContext, url: str
) -> None:
    browser.set_extra_http_headers({"X-Forwarded-For": "203.0.113.7"})
    try:
        page = open_page(browser, url)
        open_list(page)
        expect(page.locator("#models-note")).to_contain_text("Only who runs this page may do that")
        expect(page.locator("#models-list tbody tr")).to_have_count(1)
        expect(page.locator("#models-load")).to_be_hidden()
        page.locator("#model-adopt").click()
        expect(page.locator("#model-error")).to_contain_text("Only who runs this page may do that")
        page.close()
    finally:
        browser.set_extra_http_headers({})

"""The panel "Choose another model" in a real browser: another visitor's comparison first, then the other model."""

import shutil
import socketserver
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import BrowserContext, Page, expect

from tests.conftest import TinyFactory
from tests.support.page import CHROMIUM, FORBIDDEN, open_page, running, setting, write_config

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not CHROMIUM.exists(), reason=f"needs {CHROMIUM} (Debian's package of that name)"),
]
RUN_MS = 240_000


class BrokenHub(socketserver.ThreadingTCPServer):
    """A model hub that hangs up on everybody, once `answers` is set."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), socketserver.BaseRequestHandler)
        self.answers, self.asked = threading.Event(), threading.Event()
        self.answers.set()

    def verify_request(self, request: object, client_address: object) -> bool:
        self.asked.set()
        return True

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        self.answers.wait()
        self.shutdown_request(request)


@pytest.fixture(scope="module")
def hub() -> Iterator[BrokenHub]:
    with BrokenHub() as server:
        threading.Thread(target=server.serve_forever).start()
        yield server
        server.answers.set()
        server.shutdown()


@pytest.fixture(scope="module")
def url(tiny_model: TinyFactory, hub: BrokenHub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """An app with a Llama, and a GPT-2 in its cache."""
    folder: Path = tmp_path_factory.mktemp("models")
    shutil.copytree(tiny_model("gpt2").folder, folder / "cache" / "v1" / "other")
    config = write_config(
        folder, model={"name": str(tiny_model().folder)}, generation={"max_new_tokens": 12, "chat": False}
    )
    environment = {
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_address[1]}",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "SPLITLEARN_CACHE": str(folder / "cache"),
    }
    with running(config, environment=environment) as app:
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
    setting(other, "max_new_tokens", "100")  # it runs until the owner has pressed
    other.locator("#compare").click()
    expect(other.locator("#full .sl-answer")).not_to_be_empty(timeout=RUN_MS)
    owner.get_by_label("other", exact=True).focus()
    owner.keyboard.press("Space")
    owner.locator("#models-load").focus()
    owner.keyboard.press("Enter")
    status = owner.locator("#models-status").get_by_role("status")
    expect(status).to_contain_text("You are number 1 in the queue")
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


def test_a_choice_stays_when_the_hub_answers_after_it(browser: BrowserContext, url: str, hub: BrokenHub) -> None:
    hub.answers.clear()
    hub.asked.clear()
    owner = open_page(browser, url)
    open_list(owner)
    assert hub.asked.wait(RUN_MS / 1000)
    chosen = owner.locator("#models-choice input:not(:checked)").first
    value = chosen.input_value()
    chosen.check()
    hub.answers.set()
    expect(owner.locator("#models-list tbody tr").filter(has_text="cannot be reached").first).to_be_visible()
    expect(owner.locator(f"#models-choice input[value='{value}']")).to_be_checked()
    owner.close()
    assert not FORBIDDEN


def test_an_open_page_follows_the_model_and_the_cut_that_another_visitor_chooses(
    browser: BrowserContext, url: str, tiny_model: TinyFactory
) -> None:
    other, owner = open_page(browser, url), open_page(browser, url)
    open_list(other)
    expect(other.locator("#model-facts dl")).to_be_visible()
    before = other.locator("#model-facts").inner_text()
    name = other.locator("#facts b").inner_text()
    other.get_by_role("tab", name="Answers").click()
    for part in ("network", "settings", "flags"):
        other.locator(f"#{part} > button").click()
    other.get_by_label("Ignore the end token").check()  # answers of one token show no rates
    setting(other, "flag-words", "use_cache")
    other.locator("#flag-words textarea, #flag-words input").press("Enter")
    other.locator("#compare").click()
    predicted = other.locator("#link-costs tbody tr")
    expect(predicted.first).to_be_visible(timeout=RUN_MS)
    open_list(owner)
    owner.get_by_label(str(tiny_model().folder) if name.endswith("other") else "other", exact=True).check()
    owner.locator("#models-load").click()
    news = other.locator("#model-news").get_by_role("status")
    expect(news).to_contain_text("The model has changed", timeout=RUN_MS)
    expect(other.locator("#facts b")).not_to_have_text(name)
    expect(predicted).to_have_count(0)
    expect(other.locator("#link-costs")).to_contain_text("Compare once over Loopback")
    expect(other.locator("#flag-words textarea, #flag-words input")).to_have_value("use_cache")
    other.get_by_role("tab", name="Model and cut").click()
    expect(other.locator("#model-facts")).not_to_have_text(before)
    expect(other.locator("#model-advice")).to_contain_text("Measure this machine")
    expect(owner.locator("#model-facts")).not_to_have_text(before)
    field = owner.locator("#model-start input[type=number]")
    field.fill("1")
    field.press("Enter")
    expect(owner.locator("#model-yaml textarea")).to_have_value("split:\n  start: 1\n  end: 4")
    owner.locator("#model-adopt").click()
    expect(news).to_have_text("The cut has changed: the trunk has layers [1, 4) now.", timeout=RUN_MS)
    expect(other.locator("#intro")).to_contain_text("trunk server: layers 1 to 3")
    expect(other.locator("#model-yaml textarea")).to_have_value("split:\n  start: 1\n  end: 4")
    other.get_by_role("tab", name="Answers").click()
    other.locator("#compare").click()
    expect(news).to_be_empty()
    expect(predicted.first).to_be_visible(timeout=RUN_MS)
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
        expect(page.locator("#models-note")).to_contain_text("Only the owner of this page may do that")
        expect(page.locator("#models-list tbody tr")).to_have_count(1)
        expect(page.locator("#models-load")).to_be_hidden()
        page.locator("#model-adopt").click()
        expect(page.locator("#model-error")).to_contain_text("Only the owner of this page may do that")
        page.close()
    finally:
        browser.set_extra_http_headers({})

"""The page before the login in a browser: what axe-core finds, the keyboard alone, a wrong password, both languages."""

import itertools
import re
from collections.abc import Iterator

import httpx
import pytest
from axe_playwright_python.sync_playwright import Axe  # type: ignore[import-untyped]  # it has no types
from playwright.sync_api import BrowserContext, Page, expect

from tests.conftest import TinyFactory
from tests.support.page import CHROMIUM, FORBIDDEN, running, write_config
from tests.support.tokens import ANN, entry, written
from tests.support.trunk import eventually

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not CHROMIUM.exists(), reason=f"needs {CHROMIUM} (Debian's package of that name)"),
]
PASSWORD = "cobalt-Harbor-42"
WIDTHS = (320, 1280)
HOSTS = itertools.count(1)


@pytest.fixture(scope="module")
def url(tiny_model: TinyFactory, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("login")
    api = {"tokens": str(written(folder, entry("ann", ANN)))}
    config = write_config(folder, model={"name": str(tiny_model().folder)}, ui={"api": True}, api=api)
    login = {"SPLITLEARN_AUTH": f"ada:{PASSWORD}"}
    with running(config, "--trunk", "127.0.0.1:9", environment=login) as app:  # no trunk is needed here
        yield app.url()


@pytest.fixture
def page(browser: BrowserContext) -> Iterator[Page]:
    """A visitor who has not logged in, from an address of her own: each has so many tries."""
    browser.clear_cookies()
    page = browser.new_page()
    page.on("console", lambda said: FORBIDDEN.append(said.text) if "Content Security Policy" in said.text else None)
    page.set_extra_http_headers({"X-Forwarded-For": f"192.0.2.{next(HOSTS)}"})
    yield page
    page.close()
    assert not FORBIDDEN


def log_in(page: Page, password: str) -> None:
    """From the password's field or before it, by the keyboard."""
    page.locator("[name=username]").fill("ada")
    page.locator("[name=password]").fill(password)
    page.keyboard.press("Enter")


@pytest.mark.parametrize(("language", "theme"), [("en", "light"), ("en", "dark"), ("zh", "light")])
def test_axe_finds_nothing_before_and_after_a_wrong_password(page: Page, url: str, language: str, theme: str) -> None:
    page.goto(f"{url}?language={language}&__theme={theme}")
    for shown in (0, 1):
        expect(page.locator(".sl-error").filter(visible=True)).to_have_count(shown)
        for width in WIDTHS:
            page.set_viewport_size({"width": width, "height": 800})
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            found = Axe().run(page).response["violations"]
            assert not [f"{each['id']}: {[node['target'] for node in each['nodes']]}" for each in found]
        if not shown:
            log_in(page, "wrong")


def test_the_keyboard_alone_gets_in_and_a_wrong_password_is_said_where_it_is_typed(page: Page, url: str) -> None:
    page.goto(f"{url}?language=en")
    expect(page).to_have_title("Log in to splitlearn")
    for _ in range(3):  # two languages, then the form
        page.keyboard.press("Tab")
    expect(page.get_by_label("User name")).to_be_focused()
    page.keyboard.type("ada")
    page.keyboard.press("Tab")
    page.keyboard.type("wrong")
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert")).to_have_text("The user name or the password is wrong.", use_inner_text=True)
    password = page.get_by_label("Password")
    expect(password).to_be_focused()
    expect(password).to_have_value("")
    expect(password).to_have_accessible_description("The user name or the password is wrong.")
    page.keyboard.type(PASSWORD)
    page.keyboard.press("Tab")
    page.keyboard.press("Space")
    expect(page.locator("#compare")).to_be_visible()


def test_too_many_wrong_passwords_are_said_to_be_so(page: Page, url: str) -> None:
    page.goto(f"{url}?language=en")
    said = page.get_by_role("alert")
    for _ in range(5):
        log_in(page, "wrong")
        expect(said).to_have_text("The user name or the password is wrong.", use_inner_text=True)
        expect(page.get_by_label("Password")).to_have_value("")
    log_in(page, "wrong")
    expect(said).to_have_text("Too many wrong logins. Try again in a few seconds.", use_inner_text=True)


def test_a_language_chosen_before_the_login_is_the_pages_and_so_is_the_theme(page: Page, url: str) -> None:
    page.goto(f"{url}?language=en&__theme=dark")
    page.get_by_role("link", name="中文").click()
    expect(page).to_have_title("登录 splitlearn")
    expect(page.locator("html")).to_have_attribute("lang", "zh-CN")
    expect(page.locator("html")).to_have_class("dark")
    assert not re.search("[a-z]{2,} [a-z]{2,}", page.locator("body").inner_text())
    log_in(page, PASSWORD)
    expect(page.locator("#compare")).to_have_text("比较")
    expect(page.locator("body")).to_have_class(re.compile(r"\bdark\b"))


def test_the_openai_protocol_under_the_pages_port_asks_for_a_key_and_not_for_the_login(url: str) -> None:
    def models(**headers: str) -> httpx.Response:
        return httpx.get(f"{url}/v1/models", headers=headers)

    refused = models()
    assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key")
    key = {"Authorization": f"Bearer {ANN}"}
    assert eventually(lambda: models(**key).status_code == 200, 60)
    asked = {"model": models(**key).json()["data"][0]["id"], "prompt": "The sky", "max_tokens": 2}
    assert httpx.post(f"{url}/v1/completions", json=asked, headers=key, timeout=60).status_code == 200
    assert models(**key, Host="elsewhere.example").json()["error"]["code"] == "wrong_host"
    assert httpx.get(f"{url}/config", headers=key).status_code == 401  # a key opens no other path of the page
    assert httpx.get(f"{url}/health", headers=key).status_code == 404

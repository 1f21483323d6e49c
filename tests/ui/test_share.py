"""Sharing: the login that it demands, the link, and what is said when there is none."""

import re
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from gradio import networking, tunneling
from playwright.sync_api import BrowserContext, Page, expect

from splitlearn.config import UiConfig, parse
from splitlearn.errors import SetupError
from tests.conftest import TinyFactory
from tests.support.page import CHROMIUM, launch_fails, running, write_config
from tests.support.tokens import ANN, entry, written
from ui import login
from ui.login import Sharing

PASSWORD = "cobalt-Harbor-42"
LOGIN = {"SPLITLEARN_AUTH": f"ada:{PASSWORD}"}
LINK = "https://stand-in.example"
needs_chromium = pytest.mark.skipif(not CHROMIUM.exists(), reason=f"needs {CHROMIUM}")


def stand_in_tunnel(home: Path) -> dict[str, str]:
    """An environment in which Gradio finds a tunnel client that only says that it has a link."""
    client = home / "gradio" / "frpc" / tunneling.BINARY_FILENAME
    client.parent.mkdir(parents=True)
    client.write_text("#!/bin/sh\necho 'start proxy success: http://stand-in.example'\nexec sleep 600\n")
    client.chmod(0o755)
    return {**LOGIN, "HF_HOME": str(home), "GRADIO_SHARE_SERVER_ADDRESS": "127.0.0.1:1"}


def logged_in(browser: BrowserContext, url: str) -> Page:
    """The page behind the login; without it, there is none."""
    browser.clear_cookies()
    page = browser.new_page()
    page.goto(url)
    expect(page.get_by_role("button", name="Log in")).to_be_visible(timeout=30_000)
    assert page.locator("#compare").count() == 0
    page.get_by_label("User name").fill("ada")
    page.get_by_label("Password").fill(PASSWORD)
    page.get_by_role("button", name="Log in").click()
    expect(page.locator("#compare")).to_be_enabled(timeout=30_000)
    return page


@pytest.fixture
def config(tiny_model: TinyFactory, tmp_path: Path) -> Path:
    return write_config(tmp_path, model={"name": str(tiny_model().folder)}, generation={"max_new_tokens": 8})


def test_share_without_a_login_is_refused_with_the_way_to_set_one(config: Path) -> None:
    said = launch_fails(config, "--share")
    assert "SPLITLEARN_AUTH=user:password" in said
    assert "--share-without-login" in said


@pytest.mark.browser
@needs_chromium
def test_link_is_on_the_terminal_and_on_the_page(config: Path, browser: BrowserContext, tmp_path: Path) -> None:
    environment = stand_in_tunnel(tmp_path / "home")
    nowhere = ("--trunk", "127.0.0.1:9")  # none is needed here, and starting one takes long
    with running(config, "--share", *nowhere, environment=environment) as app:
        url = app.url()
        app.wait_for(re.compile(re.escape(f"Public link: {LINK}")))
        page = logged_in(browser, url)
        expect(page.locator("#share-link a")).to_have_attribute("href", LINK)


@pytest.mark.browser
@needs_chromium
def test_without_a_tunnel_one_message_and_the_local_page_works(
    config: Path, browser: BrowserContext, tmp_path: Path
) -> None:
    nowhere = {**LOGIN, "HF_HOME": str(tmp_path), "HTTPS_PROXY": "http://127.0.0.1:9"}
    with running(config, "--share", environment=nowhere) as app:
        url = app.url()
        app.wait_for(re.compile("No public link: .* The page works on this machine"), timeout_s=35)
        page = logged_in(browser, url)
        expect(page.locator("#share-link")).to_contain_text("No public link")
        page.locator("#compare").click()
        expect(page.locator("#result .sl-verdict")).to_contain_text("Identical", timeout=60_000)
        assert sum("public link" in line.lower() for line in app.lines) == 1


def test_a_tunnel_that_says_nothing_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(networking, "setup_tunnel", lambda *_: threading.Event().wait())
    demo = SimpleNamespace(server_name="127.0.0.1", server_port=1, share_token="")
    sharing = Sharing.of(True)
    login.open_link(demo, sharing, timeout_s=0.2)
    assert sharing.state == "failed"
    assert "did not answer within 0.2 s" in sharing.message


@pytest.mark.parametrize(
    "password",
    [
        "a",
        "short-Pw-42",
        "aaaaaaaaaaaaaaaa",
        "abcabcabcabcabc",
        "123456789012",
        "abcdefghijklmnop",
        "passwordpassword",
        "Password2024!",
        "ada-ada-ada-ada",
        "qwertyqwerty123",
    ],
)
def test_a_page_that_others_reach_wants_a_password_that_is_not_easy_to_guess(
    monkeypatch: pytest.MonkeyPatch, password: str
) -> None:
    monkeypatch.setenv("SOME_LOGIN", f"ada:{password}")
    with pytest.raises(SetupError, match="SOME_LOGIN.*12 characters") as refused:
        login.login("SOME_LOGIN", share=True, without_login=False)
    assert password == "a" or password not in str(refused.value)
    with pytest.raises(SetupError, match="SOME_LOGIN.*12 characters"):
        login.check_open(UiConfig(host="0.0.0.0", auth="SOME_LOGIN"), ("ada", password))
    login.check_open(UiConfig(host="127.0.0.1", auth="SOME_LOGIN"), ("ada", password))


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.7", "page.example"])
def test_a_page_beyond_loopback_wants_a_login_or_to_be_let_open_by_name(host: str) -> None:
    with pytest.raises(
        SetupError, match=r"ui\.host.*SPLITLEARN_AUTH=user:.*127\.0\.0\.1.*--allow-open \(ui\.allow_open\)"
    ):
        login.check_open(UiConfig(host=host), None)
    login.check_open(UiConfig(host=host), ("ada", PASSWORD))
    login.check_open(UiConfig(host=host, allow_open=True), None)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.9.9.9"])
def test_a_page_on_loopback_needs_no_login(host: str) -> None:
    login.check_open(UiConfig(host=host), None)


def test_the_password_that_a_refusal_proposes_is_taken() -> None:
    for _ in range(50):
        with pytest.raises(SetupError) as refused:
            login.check_open(UiConfig(host="0.0.0.0"), None)
        user, _, password = str(refused.value).split("SPLITLEARN_AUTH=")[1].split(",")[0].partition(":")
        login.check_open(UiConfig(host="0.0.0.0"), (user, password))


@pytest.mark.parametrize("held", ["ada", "ada:", ":lovelace"])
def test_a_login_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch, held: str) -> None:
    monkeypatch.setenv("SOME_LOGIN", held)
    with pytest.raises(SetupError, match="SOME_LOGIN"):
        login.login("SOME_LOGIN", share=False, without_login=False)


def test_a_login_holds_for_the_local_page_and_a_link_without_one_must_be_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SOME_LOGIN", "ada:love:lace")
    assert login.login("SOME_LOGIN", share=False, without_login=False) == ("ada", "love:lace")
    monkeypatch.delenv("SOME_LOGIN")
    assert login.login("SOME_LOGIN", share=True, without_login=True) is None


@pytest.mark.parametrize(
    ("ui", "known", "refused"),
    [
        ({}, None, False),
        ({}, ("ada", PASSWORD), True),
        ({"share": True}, None, True),
        ({"host": "0.0.0.0"}, None, True),
        ({"host": "0.0.0.0", "allow_open": True}, None, False),
    ],
)
def test_the_endpoint_under_the_pages_port_needs_keys_where_others_reach_the_page(
    ui: dict[str, object], known: login.Login, refused: bool, tmp_path: Path
) -> None:
    settings = parse({"ui": {"api": True, **ui}})
    if refused:
        with pytest.raises(SetupError, match=r"ui\.api.*api\.tokens"):
            login.api_keys(settings, known)
    else:
        assert login.api_keys(settings, known) is not None
    keys = {"tokens": str(written(tmp_path, entry("ann", ANN)))}
    assert login.api_keys(parse({"ui": {"api": True, **ui}, "api": keys}), known) is not None
    assert login.api_keys(parse({"ui": ui}), known) is None

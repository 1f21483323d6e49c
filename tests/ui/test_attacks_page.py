"""The tab "What the server reads" in a real browser: a prompt is read; a sweep is begun, found again and stopped."""

import re
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
from playwright.sync_api import BrowserContext, Page, expect

from tests.conftest import TinyFactory
from tests.support.page import CHROMIUM, FORBIDDEN, START_S, App, measuring, open_page, setting

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not CHROMIUM.exists(), reason=f"needs {CHROMIUM} (Debian's package of that name)"),
]
RUN_MS = START_S * 1000
PROMPT = "Call Priya Raman at +44 7700 900123, or 日本語."


@pytest.fixture(scope="module")
def app(tiny_model: TinyFactory, tmp_path_factory: pytest.TempPathFactory) -> Iterator[App]:
    """An app with a model of six layers, of which the trunk has [2, 4)."""
    with measuring(tmp_path_factory.mktemp("attacks"), tiny_model().folder) as started:
        yield started


@pytest.fixture(scope="module")
def page(browser: BrowserContext, url: str) -> Iterator[Page]:
    opened = open_attacks(browser, url)
    yield opened
    opened.close()
    assert not FORBIDDEN


def open_attacks(browser: BrowserContext, url: str) -> Page:
    """A new visitor, who comes to the tab by the link of the introduction."""
    opened = open_page(browser, url)
    opened.locator("#intro").get_by_role("button", name="What the server reads").click()
    expect(opened.locator("#attacks-read")).to_be_visible()
    return opened


def test_each_attack_shows_what_it_recovered_token_by_token(page: Page) -> None:
    setting(page, "attacks-prompt", PROMPT)
    page.locator("#attacks-read").click()
    expect(page.locator("#attacks-read")).to_be_disabled()
    expect(page.locator("#attacks-readings .sl-verdict")).to_contain_text("reads the whole prompt", timeout=RUN_MS)
    expect(page.locator("#attacks-read")).to_be_enabled(timeout=RUN_MS)
    attacks = page.locator("#attacks-readings section")
    assert attacks.locator("h3").all_inner_texts() == ["linear", "answer", "search"]
    search = page.get_by_role("region", name="Attack search")
    prompt = search.locator(".sl-tokens").first
    assert "".join(prompt.locator(".sl-right").all_inner_texts()) == PROMPT
    expect(search.locator("dd").nth(1)).to_have_text("yes")
    wrong = page.get_by_role("region", name="Attack linear").get_by_role("img").first
    expect(wrong).to_have_attribute("aria-label", re.compile("wrong: '.*', the right one is '.*'"))
    expect(page.locator("#attacks-readings")).to_contain_text("Without hidden states a language model guesses")


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("attacks-cut", "0", "Layers before the trunk: 0 cannot be used; expected 1 to 5: behind no layer"),
        ("attacks-cut", "<b>two</b>", "Layers before the trunk: '<b>two</b>' cannot be used; expected a whole number."),
        ("attacks-prompt", "word " * 300, "tokens' cannot be used; expected at most 256."),
    ],
)
def test_what_cannot_be_read_is_one_line(page: Page, field: str, value: str, said: str) -> None:
    before = page.locator(f"#{field}").locator("input, textarea").first.input_value()
    setting(page, field, value)
    page.locator("#attacks-read").click()
    expect(page.locator("#attacks-error .sl-error")).to_contain_text(said, timeout=RUN_MS)
    expect(page.locator("#attacks-read")).to_be_enabled()
    setting(page, field, before)


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("sweep-cuts", "1,6", "Layers before the trunk: 6 cannot be used"),
        ("sweep-limit", "0", "Prompts: 0 cannot be used"),
    ],
)
def test_what_cannot_be_measured_is_one_line(page: Page, field: str, value: str, said: str) -> None:
    before = page.locator(f"#{field}").locator("input, textarea").first.input_value()
    setting(page, field, value)
    page.locator("#sweep-start").click()
    expect(page.locator("#sweep-error .sl-error")).to_contain_text(said)
    expect(page.locator("#sweep-start")).to_be_enabled()
    setting(page, field, before)


def test_a_sweep_goes_on_without_its_page_stops_and_goes_on_where_it_ended(
    browser: BrowserContext, url: str, tmp_path: Path
) -> None:
    first = open_attacks(browser, url)
    setting(first, "sweep-limit", "48")
    first.locator("#sweep-start").click()
    expect(first.locator("#sweep-progress")).to_contain_text("attacks", timeout=RUN_MS)
    first.close()
    page = open_attacks(browser, url)
    expect(page.locator("#sweep-stop")).to_be_enabled()
    page.locator("#sweep-stop").click()
    expect(page.locator("#sweep-progress")).to_contain_text("Ended: stopped", timeout=RUN_MS)
    setting(page, "sweep-cuts", "1")
    setting(page, "sweep-limit", "2")
    page.locator("#sweep-start").click()
    expect(page.locator("#sweep-progress")).to_contain_text("Ended: done", timeout=RUN_MS)
    rows = page.locator("#sweep-table tbody tr")
    assert [row.split("\t")[:3] for row in rows.all_inner_texts()[:2]] == [
        ["1", "none", "search"],
        ["1", "wire_dtype=int8", "search"],
    ]
    expect(page.locator("#sweep-curve .js-plotly-plot")).to_be_visible()
    expect(page.locator("#sweep-command pre")).to_contain_text("attack --config")
    expect(page.locator("#sweep-command pre")).to_contain_text("--splits 1 ")
    with page.expect_download() as download:
        page.locator("#sweep-csv").click()
    download.value.save_as(tmp_path / "attacks.csv")
    found = pd.read_csv(tmp_path / "attacks.csv")
    assert {"linear", "search", "answer", "guess"} <= set(found["attack"])
    page.close()

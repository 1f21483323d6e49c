"""The Chinese page in a browser: no English text is left before anything ran and after an experiment, and the choice
stays. test_accessibility.py looks at the other results."""

import re
from collections.abc import Iterator

import pytest
from playwright.sync_api import BrowserContext, Page, expect

from tests.conftest import TinyFactory
from tests.support.chinese import english
from tests.support.page import App, experiment, measuring, setting, unfold


@pytest.fixture(scope="module")
def app(tiny_model: TinyFactory, tmp_path_factory: pytest.TempPathFactory) -> Iterator[App]:
    with measuring(tmp_path_factory.mktemp("language"), tiny_model().folder) as started:
        yield started


@pytest.fixture(scope="module")
def chinese(browser: BrowserContext, url: str) -> Page:
    page = browser.new_page()
    page.goto(f"{url}?language=zh")
    expect(page.locator("#compare")).to_be_enabled()
    return page


@pytest.mark.browser
def test_no_tab_of_the_chinese_page_has_an_english_text(chinese: Page) -> None:
    shown = ("#full", "#chat-box", "#model-facts dl", "#lab-start", "#attacks-read", "#server-card dl")
    for number, there in enumerate(shown):
        chinese.get_by_role("tab").nth(number).click()
        expect(chinese.locator(there).first).to_be_visible()
        unfold(chinese)
        assert english(chinese) == set()


@pytest.mark.browser
def test_no_text_of_an_experiment_that_ran_on_the_chinese_page_is_english(chinese: Page, url: str) -> None:
    experiment(chinese)
    unfold(chinese)
    assert english(chinese) == set()
    chinese.goto(url)  # which shows the experiment as a table of flags, too
    expect(chinese.locator("#flag-table tbody tr").first).to_be_visible()
    unfold(chinese)
    assert english(chinese) == set()


@pytest.mark.browser
def test_what_is_wrong_with_a_field_is_said_in_chinese(chinese: Page) -> None:
    chinese.get_by_role("tab").first.click()
    unfold(chinese)
    setting(chinese, "max_new_tokens", "x")
    chinese.locator("#compare").click()
    expect(chinese.locator("#error")).to_have_text("max_new_tokens：'x' 无法使用；应为整数。")


@pytest.mark.browser
def test_the_choice_is_for_the_keyboard_and_stays(chinese: Page, url: str) -> None:
    expect(chinese.locator(".nav-holder").filter(visible=True)).to_have_count(0)
    for name, tag, text in (("English", "en", "Compare"), ("中文", "zh-CN", "比较")):
        chinese.get_by_role("link", name=name).press("Enter")
        expect(chinese.locator("#compare")).to_have_text(text)
        chinese.goto(url)
        expect(chinese.locator("#compare")).to_have_text(text)
        assert chinese.evaluate("document.documentElement.lang") == tag


@pytest.mark.browser
def test_a_change_of_language_keeps_what_else_the_address_says(browser: BrowserContext, url: str) -> None:
    page = browser.new_page()
    page.goto(f"{url}?language=en&__theme=dark&kept=a%26b")
    for name, text in (("中文", "比较"), ("English", "Compare")):
        page.get_by_role("link", name=name).click()
        expect(page.locator("#compare")).to_have_text(text)
        expect(page.locator("body")).to_have_class(re.compile(r"\bdark\b"))
        assert page.evaluate("new URLSearchParams(location.search).get('kept')") == "a&b"

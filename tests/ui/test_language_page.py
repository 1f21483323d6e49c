"""The Chinese page in a browser: no English sentence is left, and the choice stays."""

import re
from collections.abc import Iterator

import pytest
from playwright.sync_api import BrowserContext, Page, expect

from tests.support.page import App, running, setting, write_config

SENTENCE = re.compile(r"[A-Za-z]{2,}(?: [A-Za-z]{2,}){2,}")
GRADIOS = ("number input for ", "range slider for ")  # it has no other language for these names of a slider
TEXTS = """() => {
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (element && element.checkVisibility() && !element.closest('[dir=auto], pre, code, script, style, textarea'))
      found.push(walker.currentNode.textContent.trim());
  }
  for (const name of ['aria-label', 'title'])
    for (const element of document.querySelectorAll(`[${name}]`)) found.push(element.getAttribute(name));
  return found;
}"""


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[App]:
    with running(write_config(tmp_path_factory.mktemp("language"))) as started:
        yield started


@pytest.fixture(scope="module")
def chinese(browser: BrowserContext, url: str) -> Page:
    page = browser.new_page()
    page.goto(f"{url}?language=zh")
    expect(page.locator("#compare")).to_be_enabled()
    return page


def english(page: Page) -> set[str]:
    return {text for text in page.evaluate(TEXTS) if SENTENCE.search(text) and not text.startswith(GRADIOS)}


def unfold(page: Page) -> None:
    folded = page.locator("button.label-wrap:not(.open)").filter(visible=True)
    while handles := folded.element_handles():
        for handle in handles:
            handle.click()


@pytest.mark.browser
def test_no_tab_of_the_chinese_page_has_an_english_sentence(chinese: Page) -> None:
    shown = {0: "#full", 1: "#model-facts dl", 2: "#lab-start", 3: "#server-card dl"}
    for number, there in shown.items():
        chinese.get_by_role("tab").nth(number).click()
        expect(chinese.locator(there).first).to_be_visible()
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

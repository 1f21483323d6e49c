"""The Chinese page in a browser: no English text is left, also in results, and the choice stays."""

import re
from collections.abc import Iterator

import pytest
from playwright.sync_api import BrowserContext, Page, expect

from splitlearn.checkpoints.catalogue import CATALOGUE
from splitlearn.flags.registry import FLAGS
from tests.conftest import TinyFactory
from tests.support.page import App, attacks, conversation, experiment, measuring, setting, unfold
from ui.attacks.actions import DEFENCES
from ui.flags.flag_words import NAMES

SENTENCE = re.compile(r"[A-Za-z]{2,}(?: [A-Za-z]{2,}){2,}")
GRADIOS = (
    "number input for ",
    "range slider for ",
    "Box Select",
    "Lasso Select",
    "Download plot",
    "Copy",
    "Empty value",
)
"""Gradio and Plotly have no other language for these names of sliders, buttons and empty fields."""
CHOICES = {choice for flag in FLAGS.values() for choice in flag.choices}
TERMS = {*FLAGS, *NAMES, *CHOICES, *(flag.label for flag in FLAGS.values())}
TERMS |= {"English", "splitlearn", "gRPC", "Wi-Fi", "Top-k", "Top-p", "MLP", "RMSNorm", "LM head", "dtype"}
TERMS |= {"TTFT", "TPOT", "Delta", *DEFENCES}
TERMS |= {name for entry in CATALOGUE for name in (entry.name, entry.licence)}
NAME = re.compile(
    r"(?:hub|PyPI|torch|transformers) \S+|[a-z0-9_]+=\w+|[\w./-]*/[\w./-]*|\w+\.(?:csv|html|json)|[-+±\d.,]+ \w{1,2}"
)
"""Names of flags with a choice, paths, files, figures with their unit; where a model comes from; versions."""
LATIN = re.compile("[A-Za-z]{3}")
CHINESE = re.compile("[\u4e00-\u9fff\uff00-\uffef]")
RUN_MS = 120_000
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
def app(tiny_model: TinyFactory, tmp_path_factory: pytest.TempPathFactory) -> Iterator[App]:
    with measuring(tmp_path_factory.mktemp("language"), tiny_model().folder) as started:
        yield started


@pytest.fixture(scope="module")
def chinese(browser: BrowserContext, url: str) -> Page:
    page = browser.new_page()
    page.goto(f"{url}?language=zh")
    expect(page.locator("#compare")).to_be_enabled()
    return page


def english(page: Page) -> set[str]:
    """The texts with three English words in a row, and those of one or two that are no name and no term."""
    texts = {text for text in page.evaluate(TEXTS) if not text.startswith(GRADIOS)}
    words = {text for text in texts if LATIN.search(text) and not CHINESE.search(text)}
    names = {text for text in words if text.strip("()") in TERMS or NAME.fullmatch(text)}
    return {text for text in texts if SENTENCE.search(text)} | (words - names)


@pytest.mark.browser
def test_no_tab_of_the_chinese_page_has_an_english_text(chinese: Page) -> None:
    shown = ("#full", "#chat-box", "#model-facts dl", "#lab-start", "#attacks-read", "#server-card dl")
    for number, there in enumerate(shown):
        chinese.get_by_role("tab").nth(number).click()
        expect(chinese.locator(there).first).to_be_visible()
        unfold(chinese)
        assert english(chinese) == set()


@pytest.mark.browser
def test_no_result_of_the_chinese_page_has_an_english_text(chinese: Page, url: str) -> None:
    chinese.get_by_role("tab").first.click()
    chinese.locator("#compare").click()
    expect(chinese.locator("#time section")).to_be_visible(timeout=RUN_MS)
    unfold(chinese)
    assert english(chinese) == set()
    expect(chinese.locator("#compare")).to_be_enabled()
    chinese.get_by_role("tab").nth(1).click()
    conversation(chinese)
    chinese.locator(".sl-turn button[data-do=edit]").first.click()
    expect(chinese.locator("#chat-cancel")).to_be_visible()
    unfold(chinese)
    assert english(chinese) == set()
    chinese.reload()
    experiment(chinese)
    unfold(chinese)
    assert english(chinese) == set()
    attacks(chinese)
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

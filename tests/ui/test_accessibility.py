"""What axe-core finds on the page, and whether it fits every screen and is in one language: all tabs, all parts open.

Most of axe-core's time goes into the rules about colours. The dark page differs from the light one in colours alone,
and no colour depends on the width: these rules are tried on the light page where it is wide, on the dark one where it
is narrow. The Chinese page has the colours of the English one, so all other rules are tried there.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from axe_playwright_python.base import AXE_SCRIPT  # type: ignore[import-untyped]  # it has no types
from playwright.sync_api import BrowserContext, Page, expect

from tests.conftest import TinyFactory
from tests.support import lab_trials
from tests.support.chinese import english
from tests.support.page import CHROMIUM, FORBIDDEN, attacks, conversation, measuring, open_experiment, open_page, unfold

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not CHROMIUM.exists(), reason=f"needs {CHROMIUM} (Debian's package of that name)"),
]
RUN_MS = 240_000
WIDTHS = (320, 390, 768, 1280, 1920)
DRAWN = (
    "#full",
    "#chat-prompt li",
    "#model-facts dl",
    "#lab-details details",
    "#attacks-readings section",
    "#server-card dl",
)
"""What each tab has once it is drawn."""
AXE_WIDTHS = (1280, 320)
COLOURS = ["color-contrast", "link-in-text-block"]
"""The rules of axe-core about colours."""
IN_ONE_LANGUAGE = pytest.mark.parametrize("page", ["en"], indirect=True)
"""For what a keyboard does, which depends on no text."""
# As Gradio does for ?__theme=dark. Colours have transitions, some of which end by being replaced.
DARK = """async dark => {
  document.body.classList.toggle('dark', dark);
  const changes = document.getAnimations().filter(each => each instanceof CSSTransition);
  await Promise.allSettled(changes.map(each => each.finished));
}"""
# The element that has the focus: where it is on the page, and whether a line is around it or its label.
FOCUS = """() => {
  const at = document.activeElement;
  if (!at || at === document.body) return null;
  window.slKeys ??= new Map();
  if (!window.slKeys.has(at)) window.slKeys.set(at, window.slKeys.size);
  const around = [at, at.closest('label')].filter(Boolean).map(each => getComputedStyle(each));
  return {
    key: window.slKeys.get(at),
    what: at.outerHTML.slice(0, 120),
    top: at.getBoundingClientRect().top + scrollY,
    outlined: around.some(style => style.outlineStyle !== 'none' && parseFloat(style.outlineWidth) >= 2),
  };
}"""


@pytest.fixture(scope="module")
def url(browser: BrowserContext, tiny_model: TinyFactory, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """An app that has the report of an experiment."""
    folder = tmp_path_factory.mktemp("accessible")
    lab_trials.write(folder)
    with measuring(folder, tiny_model().folder, generation={"max_new_tokens": 8}) as app:
        yield app.warm_url()


@pytest.fixture(scope="module", params=["en", "zh"])
def page(browser: BrowserContext, url: str, request: pytest.FixtureRequest) -> Iterator[Page]:
    """A page in one of the languages after a comparison and two turns, with every part open."""
    opened = open_page(browser, url, new_browser=True)  # without the conversation of the other language's page
    opened.goto(f"{url}?language={request.param}&__theme=light")
    expect(opened.locator("#compare")).to_have_text({"en": "Compare", "zh": "比较"}[request.param])
    opened.locator("#compare").click()
    expect(opened.locator("#time section")).to_be_visible(timeout=RUN_MS)
    opened.get_by_role("tab").nth(1).click()
    conversation(opened)
    opened.get_by_role("tab").nth(3).click()
    open_experiment(opened)
    attacks(opened)
    yield opened
    opened.close()
    assert not FORBIDDEN


def tabs(page: Page) -> Iterator[str]:
    """Each tab in turn, with its folded parts open."""
    for number, tab in enumerate(page.get_by_role("tab").all()):
        tab.click()
        expect(page.locator(DRAWN[number]).first).to_be_visible()
        expect(page.get_by_role("tabpanel").filter(visible=True).locator(".empty")).to_have_count(0)  # a picture comes
        unfold(page)
        yield tab.inner_text()


@contextmanager
def dark(page: Page) -> Iterator[None]:
    """The page is dark for a `with` block."""
    page.evaluate(DARK, True)
    yield
    page.evaluate(DARK, False)


def violations(page: Page, **options: object) -> list[str]:
    """What axe-core finds."""
    found = page.evaluate("options => axe.run(options)", {"resultTypes": ["violations"], **options})["violations"]
    return [f"{each['impact']} {each['id']}: {[it['target'] for it in each['nodes']][:5]}" for each in found]


def test_axe_finds_nothing_on_any_tab_with_all_parts_open(page: Page) -> None:
    page.evaluate(AXE_SCRIPT)
    in_english = page.locator("html").get_attribute("lang") == "en"
    others = {"rules": {rule: {"enabled": False} for rule in COLOURS}}
    for name in tabs(page):
        for width in AXE_WIDTHS:
            page.set_viewport_size({"width": width, "height": 900})
            options = {} if in_english and width == max(AXE_WIDTHS) else others
            assert not violations(page, **options), f"{name} at {width}"
        if in_english:
            with dark(page):
                assert not violations(page, runOnly=COLOURS), f"{name} at {width}, dark"


def test_no_tab_is_wider_than_any_screen(page: Page) -> None:
    for name in tabs(page):
        for width in WIDTHS:
            page.set_viewport_size({"width": width, "height": 900})
            assert page.evaluate("document.documentElement.scrollWidth") <= width, f"{name} at {width}"


def test_a_page_with_results_has_english_texts_only_if_it_is_the_english_one(page: Page) -> None:
    in_english = page.locator("html").get_attribute("lang") == "en"
    for name in tabs(page):
        assert bool(found := english(page)) == in_english, f"{name}: {found}"
    page.get_by_role("tab").nth(1).click()
    page.locator(".sl-turn button[data-do=edit]").first.click()
    expect(page.locator("#chat-cancel")).to_be_visible()
    assert bool(found := english(page)) == in_english, f"an edit: {found}"
    page.locator("#chat-cancel").click()


def selected(page: Page) -> str:
    """The tab that is shown, which is the one that has the focus."""
    tab = page.locator("[role=tab][aria-selected=true]")
    expect(tab).to_be_focused()
    expect(tab).to_have_attribute("tabindex", "0")
    expect(page.locator("[role=tab][tabindex='0']")).to_have_count(1)
    return tab.inner_text()


@IN_ONE_LANGUAGE
def test_arrow_keys_go_from_tab_to_tab_and_one_press_of_tab_leaves_them(page: Page) -> None:
    names = page.get_by_role("tab").all_inner_texts()
    page.get_by_role("tab").first.click()
    page.keyboard.press("ArrowLeft")
    assert selected(page) == names[-1]
    page.keyboard.press("ArrowRight")
    assert selected(page) == names[0]
    for name in names[1:]:
        page.keyboard.press("ArrowRight")
        assert selected(page) == name
    page.keyboard.press("Home")
    assert selected(page) == names[0]
    page.keyboard.press("End")
    assert selected(page) == names[-1]
    page.keyboard.press("Home")
    page.keyboard.press("Tab")
    expect(page.locator("#prompt textarea")).to_be_focused()
    page.keyboard.press("Shift+Tab")
    assert selected(page) == names[0]


@IN_ONE_LANGUAGE
def test_an_accordion_says_whether_it_is_open_and_opens_by_keyboard(page: Page) -> None:
    page.get_by_role("tab").first.click()
    fold = page.locator("#settings > button")
    before = fold.get_attribute("aria-expanded")
    for said in ("true", "false", "true")[before == "true" :]:
        fold.press("Enter")
        expect(fold).to_have_attribute("aria-expanded", said)
        expect(page.locator("#max_new_tokens")).to_be_visible(visible=said == "true")


@IN_ONE_LANGUAGE
def test_the_keyboard_alone_goes_through_a_whole_tab_forwards_and_sees_where_it_is(page: Page) -> None:
    next(tabs(page))
    page.get_by_role("tab").first.focus()
    places, seen = [], set()
    while True:
        page.keyboard.press("Tab")
        found = page.evaluate(FOCUS)
        if found is None or found["key"] in seen:
            break
        seen.add(found["key"])
        places.append(found["top"])
        assert found["outlined"], found
    assert len(seen) > 40
    assert all(after >= before - 120 for before, after in zip(places, places[1:], strict=False)), places

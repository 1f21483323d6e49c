"""The tab "Model and cut" in a real browser: a cut is looked at, measured, and taken for the comparison."""

import re
from collections.abc import Iterator

import pytest
from playwright.sync_api import BrowserContext, Locator, Page, expect

from tests.conftest import TinyFactory
from tests.support.page import CHROMIUM, FORBIDDEN, open_page, running, type_into, unanswered, write_config

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not CHROMIUM.exists(), reason=f"needs {CHROMIUM} (Debian's package of that name)"),
]
RUN_MS = 240_000


@pytest.fixture(scope="module")
def page(browser: BrowserContext, tiny_model: TinyFactory, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    """The tab of an app with a model of six layers, of which the trunk has [2, 4)."""
    config = write_config(tmp_path_factory.mktemp("page"), model={"name": str(tiny_model().folder)})
    with running(config) as app:
        opened = open_page(browser, app.warm_url())
        opened.get_by_role("tab", name="Model and cut").click()
        expect(opened.locator("#model-facts dl")).to_be_visible()
        yield opened
        opened.close()
        assert not FORBIDDEN


def cut(page: Page) -> Locator:
    """The lines for config.yaml, which name the chosen cut."""
    return page.locator("#model-yaml textarea")


def lines(start: int, end: int) -> str:
    return f"split:\n  start: {start}\n  end: {end}"


def number(page: Page, name: str) -> Locator:
    return page.locator(f"#model-{name} input[type=number]")


def choose(page: Page, name: str, layer: int) -> None:
    number(page, name).fill(str(layer))


def drag(page: Page, name: str, share: float) -> None:
    """Drag a cut to this share of the picture's width."""
    handle, picture = page.locator(f"[data-cut={name}] circle"), page.locator("#model-picture svg[role=img]")
    handle.scroll_into_view_if_needed()
    box, room = handle.bounding_box(), picture.bounding_box()
    assert box is not None
    assert room is not None
    page.mouse.move(box["x"] + 6, box["y"] + 6)
    page.mouse.down()
    page.mouse.move(room["x"] + share * room["width"], box["y"], steps=3)
    page.mouse.up()


def test_the_model_is_drawn_with_its_cut_and_every_fact_has_its_definition_by_keyboard(page: Page) -> None:
    picture = page.locator("#model-picture svg[role=img]")
    assert "the trunk 2 to 4" in (picture.get_attribute("aria-label") or "")
    expect(cut(page)).to_have_value(lines(2, 4))
    fact = page.locator("#model-facts dl > div").filter(has=page.get_by_role("button", name="Attention", exact=True))
    expect(fact.locator("dd")).to_have_text("GQA: 4 heads of 12, 2 for keys and values")
    fact.get_by_role("button").focus()
    expect(fact.get_by_role("tooltip")).to_contain_text("arXiv:2305.13245")
    expect(page.locator("#model-advice")).to_contain_text("Measure this machine")


def test_a_cut_is_moved_by_keyboard_and_by_dragging_and_the_other_gives_way(page: Page) -> None:
    choose(page, "start", 5)
    expect(cut(page)).to_have_value(lines(5, 6))
    choose(page, "end", 4)
    expect(cut(page)).to_have_value(lines(3, 4))
    expect(page.locator("#model-start input[type=number]")).to_have_value("3")
    number(page, "start").press("ArrowDown")
    expect(cut(page)).to_have_value(lines(2, 4))
    drag(page, "end", 1.0)
    expect(cut(page)).to_have_value(lines(2, 6))
    expect(page.locator("#model-end input[type=number]")).to_have_value("6")
    choose(page, "end", 4)
    expect(cut(page)).to_have_value(lines(2, 4))


def test_what_is_drawn_is_the_cut_of_the_fields_however_fast_they_are_typed(page: Page) -> None:
    for start, end in ((1, 5), (0, 6), (3, 5), (2, 4)):
        choose(page, "start", start)
        choose(page, "end", end)
        expect(cut(page)).to_have_value(lines(start, end))
        label = page.locator("#model-picture svg[role=img]")
        expect(label).to_have_attribute("aria-label", re.compile(f"the trunk {start} to {end}"))


def test_cuts_that_are_moved_before_the_page_has_answered_are_where_they_were_moved_last(page: Page) -> None:
    with unanswered(page, "**/queue/join*"):
        for _ in range(3):
            number(page, "start").press("ArrowUp")
        expect(number(page, "end")).to_have_value("6")
        drag(page, "start", 0.0)
        drag(page, "end", 0.0)
        expect(number(page, "start")).to_have_value("0")
        expect(number(page, "end")).to_have_value("1")
    expect(cut(page)).to_have_value(lines(0, 1))
    choose(page, "end", 4)
    choose(page, "start", 2)
    expect(cut(page)).to_have_value(lines(2, 4))


def test_an_end_that_gave_way_goes_back_when_it_can(page: Page) -> None:
    choose(page, "start", 5)
    expect(number(page, "end")).to_have_value("6")
    choose(page, "start", 2)
    expect(cut(page)).to_have_value(lines(2, 4))
    choose(page, "end", 1)
    expect(number(page, "start")).to_have_value("0")
    choose(page, "end", 4)
    expect(cut(page)).to_have_value(lines(2, 4))


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("start", "", "Trunk begins at layer: '' cannot be used; expected a whole number."),
        ("start", "1.5", "Trunk begins at layer: 1.5 cannot be used; expected a whole number."),
        ("start", "40", "Trunk begins at layer: 40 cannot be used; expected 0 to 5 for 6 layers."),
        ("end", "0", "Trunk ends before layer: 0 cannot be used; expected 1 to 6"),
        ("context", "many", "Context, tokens: 'many' cannot be used; expected a whole number."),
        ("context", "9999", "Context, tokens: 9999 cannot be used; expected 1 to 512"),
        ("memory", "-3", "Client memory limit, MB: '-3' cannot be used; expected megabytes above 0"),
        ("link", "<b>fast</b>", "Link: '<b>fast</b>' cannot be used; expected a preset"),
    ],
)
def test_what_cannot_be_used_is_named_as_its_field_is(page: Page, name: str, value: str, said: str) -> None:
    field = page.locator(f"#model-{name} textarea, #model-{name} input").first
    before = field.input_value()
    type_into(field, value)
    field.press("Enter")
    expect(page.locator("#model-error")).to_contain_text(said)
    page.locator("#model-adopt").click()
    expect(page.locator("#model-error")).to_contain_text(said)
    expect(page.locator("#model-adopt")).to_be_enabled()
    type_into(field, before)
    field.press("Enter")
    expect(page.locator("#model-error .sl-error")).to_have_count(0)


def test_a_measurement_that_is_asked_for_as_soon_as_it_can_be_is_shown(page: Page) -> None:
    page.reload()
    page.get_by_role("tab", name="Model and cut").click()
    page.locator("#model-measure").click(timeout=RUN_MS)
    expect(page.locator("#model-advice")).to_contain_text("Without a limit of memory, cut at", timeout=RUN_MS)
    expect(page.locator("#model-measure")).to_be_enabled(timeout=RUN_MS)


def test_a_measured_cut_is_chosen_by_keyboard_run_and_taken_for_the_comparison(page: Page) -> None:
    page.locator("#model-measure").click()
    expect(page.locator("#model-status progress")).to_be_visible(timeout=RUN_MS)
    expect(page.locator("#model-measure")).to_be_enabled(timeout=RUN_MS)
    expect(page.locator("#model-advice")).to_contain_text("Without a limit of memory, cut at")
    page.locator("#model-pareto [role=button][tabindex='0']").focus()
    before = cut(page).input_value()
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("Enter")
    expect(cut(page)).not_to_have_value(before)
    expect(page.locator("#model-pareto [aria-pressed=true]")).to_be_focused()
    choose(page, "start", 1)
    choose(page, "end", 5)
    expect(page.locator("#model-chosen")).to_contain_text("chosen, [1, 5)")
    page.locator("#model-measure-cut").click()
    expect(page.locator("#model-chosen")).to_contain_text("measured / predicted", timeout=RUN_MS)
    expect(page.locator("#model-adopt")).to_be_enabled()
    page.locator("#model-adopt").click()
    said = page.locator("#model-status").get_by_text("the trunk has layers [1, 5)")
    expect(said).to_be_visible(timeout=RUN_MS)
    expect(page.locator("#intro")).to_contain_text("trunk server: layers 1 to 4")
    main = page.locator("main").first
    for width, height in ((320, 800), (1280, 800)):
        page.set_viewport_size({"width": width, "height": height})
        assert (main.bounding_box() or {"width": width + 1})["width"] <= width
    page.get_by_role("tab", name="Answers").click()
    page.locator("#compare").click()
    expect(page.locator("#result .sl-verdict")).to_contain_text("Identical", timeout=RUN_MS)
    page.get_by_role("tab", name="Model and cut").click()


def test_the_link_of_the_comparison_is_that_of_the_predictions(page: Page) -> None:
    page.get_by_role("tab", name="Answers").click()
    page.locator("#network button.label-wrap").click()
    type_into(page.locator("#link-rtt_ms textarea, #link-rtt_ms input").first, "50")
    page.get_by_role("tab", name="Model and cut").click()
    expect(page.locator("#model-link input")).to_have_value("rtt=50ms")

"""The history of comparisons, their files and the Network panel in a real browser, with hostile texts."""

import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import BrowserContext, Page, expect

from tests.conftest import TinyFactory
from tests.support.page import CHROMIUM, FORBIDDEN, open_page, running, setting, type_into, unanswered, write_config

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not CHROMIUM.exists(), reason=f"needs {CHROMIUM} (Debian's package of that name)"),
]
RUN_MS = 240_000
IMAGE, FORMULA = "<img src=x onerror=alert(1)>", "=1+1"


@pytest.fixture(scope="module")
def url(tiny_model: TinyFactory, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """An app that keeps a history on disk, in a cache of its own, as it does by default."""
    folder = tmp_path_factory.mktemp("page")
    model, generation = {"name": str(tiny_model().folder)}, {"max_new_tokens": 16}
    config = write_config(folder, model=model, generation=generation, ui={"history_file": None})
    with running(config, environment={"SPLITLEARN_CACHE": str(folder / "cache")}) as app:
        yield app.warm_url()


@pytest.fixture(scope="module")
def page(browser: BrowserContext, url: str) -> Iterator[Page]:
    """A page on which two hostile prompts were compared, loaded once more since."""
    opened = open_page(browser, url)
    opened.on("dialog", lambda said: FORBIDDEN.append(f"dialog {said.message}"))
    for number, prompt in enumerate((IMAGE, FORMULA), 1):
        compare(opened, prompt, number)
    opened.reload()
    yield opened
    opened.close()
    assert not FORBIDDEN


def compare(page: Page, prompt: str, lines: int) -> None:
    """Compare once each; wait until the history has so many lines."""
    type_into(page.locator("#prompt textarea"), prompt)
    page.locator("#pairs").get_by_text("1", exact=True).click()
    page.locator("#compare").click()
    expect(page.locator("#history tbody tr")).to_have_count(lines, timeout=RUN_MS)
    expect(page.locator("#compare")).to_be_enabled()


def number(page: Page, name: str, value: str) -> None:
    """Type a figure of the link."""
    box = page.locator(f"#link-{name}").locator("input, textarea").first
    type_into(box, value)
    box.press("Enter")


def saved(page: Page, button: str, folder: Path) -> Path:
    """What a button downloads."""
    with page.expect_download() as found:
        page.locator(button).click()
    path = folder / found.value.suggested_filename
    found.value.save_as(path)
    return path


def test_a_reload_shows_every_comparison_newest_first_with_hostile_prompts_as_text(page: Page) -> None:
    lines = page.locator("#history tbody tr")
    expect(lines).to_have_count(2)
    expect(lines.nth(0)).to_contain_text(FORMULA)
    expect(lines.nth(1)).to_contain_text(IMAGE)
    expect(lines.nth(1)).to_contain_text("identical")
    expect(page.locator("#history img")).to_have_count(0)


def test_two_lines_are_pinned_by_keyboard_and_show_what_differs_and_where_the_answers_part(page: Page) -> None:
    for number in (1, 2):
        box = page.locator(f"#pin-{number} input")
        box.focus()
        expect(page.get_by_role("option").first).to_be_visible()
        for _ in range(number):
            box.press("ArrowDown")
        box.press("Enter")
        expect(box).not_to_have_value("")
    shown = page.locator("#pinned section")
    for text in (IMAGE, FORMULA, "TPOT, split", "second / first", "python -m splitlearn compare"):
        expect(shown).to_contain_text(text)
    expect(shown.locator("img")).to_have_count(0)


def test_what_is_pinned_before_the_page_has_shown_the_last_pin_is_shown(page: Page) -> None:
    expect(page.locator("#pin-1 input")).to_be_visible()
    with unanswered(page):
        for number, at in ((1, 1), (2, 0)):
            box = page.locator(f"#pin-{number} input")
            before = box.input_value()
            box.click()
            page.get_by_role("option").nth(at).click()
            expect(box).not_to_have_value(before)
            expect(page.get_by_role("option")).to_have_count(0)  # a list that closes slowly would get the next click
    expect(page.locator("#pinned tr", has_text="Prompt").first.locator("td")).to_have_text([IMAGE, FORMULA])


def test_the_history_downloads_as_json_and_as_csv_that_no_spreadsheet_computes(page: Page, tmp_path: Path) -> None:
    rows = list(csv.DictReader(saved(page, "#history-csv", tmp_path).read_text().splitlines()))
    assert [row["prompt"] for row in rows] == [f"'{FORMULA}", IMAGE]
    assert all(float(row["split_tpot_s"]) > 0 and row["identical"] == "True" for row in rows)
    kept = json.loads(saved(page, "#history-json", tmp_path).read_text())
    assert [entry["prompt"] for entry in kept] == [FORMULA, IMAGE]


def test_a_comparison_is_shared_as_one_file_that_needs_no_network(page: Page, tmp_path: Path) -> None:
    compare(page, IMAGE, 3)
    command = page.locator("#command textarea").input_value()
    assert f"--prompt '{IMAGE}'" in command
    times = list(csv.DictReader(saved(page, "#share-times", tmp_path).read_text().splitlines()))
    assert {row["arm"] for row in times} == {"full", "split"}
    file = saved(page, "#share-page", tmp_path)
    opened, said = page.context.new_page(), list[str]()
    opened.on("console", lambda message: said.append(message.text))
    opened.on("pageerror", lambda error: said.append(str(error)))
    opened.on("request", lambda asked: said.append(asked.url) if not asked.url.startswith("file:") else None)
    opened.goto(file.as_uri())
    for text in ("Identical", IMAGE, "Where the time goes", "python -m splitlearn compare", "TPS (decode)"):
        expect(opened.locator("body")).to_contain_text(text)
    expect(opened.locator("img")).to_have_count(0)
    opened.set_viewport_size({"width": 320, "height": 800})
    assert opened.evaluate("document.documentElement.scrollWidth <= innerWidth")
    opened.close()
    assert not said


def test_a_typed_link_is_answered_from_the_comparison_before_and_measured_by_the_next(page: Page) -> None:
    page.locator("#network > button").click()
    costs = page.locator("#link-costs")
    expect(costs.locator("tbody tr")).to_have_count(7)
    number(page, "rtt_ms", "20")
    expect(page.locator("#link input").first).to_have_value("rtt=20ms")
    expect(costs).to_contain_text("Over 20 ms, split would take about")
    page.locator("#link-measure").click()
    expect(page.locator("#link-real")).to_contain_text("The real link:")
    number(page, "jitter_ms", "30")
    expect(page.locator("#link-error")).to_contain_text("Jitter, ms: 30.0 cannot be used; expected a number from 0 to")
    number(page, "jitter_ms", "0")
    expect(page.locator("#link-error .sl-error")).to_have_count(0)
    compare(page, IMAGE, 4)
    row = costs.locator("tbody tr").filter(has=page.get_by_role("rowheader", name=re.compile("^20 ms")))
    expect(row).to_contain_text("chosen")
    expect(row.locator("td").nth(1)).to_contain_text("s")
    assert "--link rtt=20ms" in page.locator("#command textarea").input_value()


def test_a_page_that_opens_while_another_one_compares_says_so_and_her_place(
    browser: BrowserContext, url: str, page: Page
) -> None:
    page.locator("#settings > button").click()
    setting(page, "max_new_tokens", "400")  # it runs until it is stopped
    page.locator("#pairs").get_by_text("10", exact=True).click()
    page.locator("#compare").click()
    expect(page.locator("#stop")).to_be_enabled()
    other = browser.new_page()
    other.goto(url)
    expect(other.locator("#status")).to_contain_text("A comparison is running. If you press Compare, yours is number 1")
    page.locator("#stop").click()
    expect(page.locator("#compare")).to_be_enabled()
    expect(other.locator("#status")).not_to_contain_text("running")
    other.close()


def test_the_owner_finds_them_on_disk_and_somebody_behind_a_proxy_does_not(
    page: Page, browser: BrowserContext, url: str
) -> None:
    page.locator("#earlier > button").click()
    lines = page.locator("#earlier-list tbody tr")
    expect(lines.filter(has_text=IMAGE).last).to_contain_text("identical")
    expect(lines.filter(has_text=FORMULA).first).to_contain_text("[2, 4) of 6")
    expect(page.locator("#earlier-list img")).to_have_count(0)
    browser.set_extra_http_headers({"X-Forwarded-For": "203.0.113.7"})
    try:
        other = open_page(browser, url)
        expect(other.locator("#history tbody tr").first).to_be_visible()  # by then the page knows who she is
        expect(other.locator("#earlier")).to_be_hidden()
        other.close()
    finally:
        browser.set_extra_http_headers({})


@pytest.fixture(scope="module")
def apart(browser: BrowserContext, url: str) -> Iterator[Page]:
    """A page with two pinned comparisons that draw with one seed; the second one's hidden states are rounded."""
    opened = open_page(browser, url, new_browser=True)
    opened.locator("#settings > button").click()
    setting(opened, "temperature", "0.7")
    setting(opened, "max_new_tokens", "96")  # in which the rounding shows
    opened.locator("#flags > button").click()
    for lines, flags in enumerate(("use_cache", "use_cache,wire_dtype=int8"), 1):
        setting(opened, "flag-words", flags)
        compare(opened, "Why is the sky blue?", lines)
    pin(opened)
    yield opened
    opened.close()


def pin(page: Page) -> None:
    """Pin the first two lines."""
    for number in (1, 2):
        page.locator(f"#pin-{number} input").click()
        page.get_by_role("option").nth(number - 1).click()


def test_where_two_pinned_answers_part_the_candidates_of_both_are_shown_with_their_logits(apart: Page) -> None:
    pinned = apart.locator("#pinned")
    expect(pinned).to_contain_text("Full: the same.")
    expect(pinned).to_contain_text("Split: the first token that differs is marked.")
    apart.locator("#divergence-ask").click()
    tables = apart.locator("#divergence-found table")
    expect(tables).to_have_count(2, timeout=RUN_MS)
    expect(apart.locator("#divergence-ask")).to_be_enabled()
    expect(apart.locator("#divergence-stop")).to_be_disabled()
    expect(apart.locator("#divergence-found")).to_contain_text("Split: token ")
    chosen = tables.locator("tr").filter(has_text="(chosen)")
    expect(chosen).to_have_count(2)
    expect(chosen.nth(0)).to_have_text(re.compile(r"-?\d+\.\d{4}"))
    assert len({row.locator("b").inner_text() for row in chosen.all()}) == 2
    expect(apart.locator("#divergence-found")).not_to_contain_text("Run again here")
    expect(apart.locator("#divergence-error .sl-error")).to_have_count(0)


def test_two_prompts_have_no_common_candidates_and_the_page_says_so(apart: Page) -> None:
    compare(apart, "Who?", 3)
    expect(apart.locator("#divergence")).to_be_hidden()
    pin(apart)
    apart.locator("#divergence-ask").click()
    expect(apart.locator("#divergence-error .sl-error")).to_contain_text("different prompts")
    expect(apart.locator("#divergence-found table")).to_have_count(0)
    expect(apart.locator("#divergence-ask")).to_be_enabled()

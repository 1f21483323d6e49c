"""The Lab tab in a real browser: an experiment is begun, left, found again, stopped, resumed, and its exports read."""

import json
import re
import shlex
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
from playwright.sync_api import BrowserContext, Page, expect

from tests.conftest import TinyFactory
from tests.support.page import (
    CHROMIUM,
    FORBIDDEN,
    SETTLED_MS,
    START_S,
    App,
    measuring,
    open_page,
    setting,
    type_into,
)
from tests.support.trunk import eventually
from ui.visitors import PREFIX

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not CHROMIUM.exists(), reason=f"needs {CHROMIUM} (Debian's package of that name)"),
]

# One flag is eight arms; what other programs disturb is run again, up to three times.
FLAG = "inference_mode"
END_MS = 240_000
SECOND = re.compile(r"block ([2-9]|\d\d)")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the app runs, and so keeps its experiments."""
    return tmp_path_factory.mktemp("lab")


@pytest.fixture(scope="module")
def app(tiny_model: TinyFactory, folder: Path) -> Iterator[App]:
    with measuring(folder, tiny_model().folder) as started:
        yield started


@pytest.fixture
def page(browser: BrowserContext, url: str) -> Iterator[Page]:
    opened = open_lab(browser, url)
    yield opened
    if not opened.is_closed():
        if opened.locator("#lab-stop").is_enabled():
            opened.locator("#lab-stop").click()
            expect(opened.locator("#lab-start")).to_be_enabled(timeout=END_MS)
        opened.close()
    assert not FORBIDDEN


def open_lab(browser: BrowserContext, url: str) -> Page:
    """A new visitor with the Lab tab open."""
    opened = open_page(browser, url)
    opened.get_by_role("tab", name="Lab").click()
    expect(opened.locator("#lab-start")).to_be_visible()
    return opened


def ask(page: Page, pairs: str, flags: str = FLAG) -> None:
    """Everything that an experiment needs to be short."""
    setting(page, "lab-flags", flags)
    page.locator("#lab-advanced > button").click()
    page.get_by_label("A fixed number of pairs").check()
    setting(page, "lab-pairs", pairs)


def ends(page: Page, said: str) -> None:
    expect(page.locator("#lab-progress")).to_contain_text(said, timeout=END_MS)
    expect(page.locator("#lab-start")).to_be_enabled()


def error(page: Page) -> str:
    shown = page.locator("#lab-error .sl-error")
    expect(shown).to_be_visible()
    return shown.inner_text()


def exports(page: Page, into: Path) -> dict[str, Path]:
    """Each export, downloaded."""
    found: dict[str, Path] = {}
    for name in ("report.html", "results.json", "verdicts.csv", "pairs.csv", "trials.csv"):
        with page.expect_download() as download:
            page.locator(f"#lab-{name.replace('.', '-')}").click()
        assert download.value.suggested_filename == name
        found[name] = into / name
        download.value.save_as(found[name])
    return found


def test_before_any_experiment_a_service_level_is_checked_as_it_is_typed(page: Page) -> None:
    page.locator("#lab-levels > button").click()
    typed = page.locator("#lab-decode_tps input, #lab-decode_tps textarea").first
    type_into(typed, "many")
    typed.press("Enter")
    assert "decode_tps: 'many' cannot be used" in error(page)
    type_into(typed, "30")
    typed.press("Enter")
    expect(page.locator("#lab-error .sl-error")).to_have_count(0)


def test_an_experiment_goes_on_without_its_page_and_every_export_reads_back(
    browser: BrowserContext, app: App, url: str, page: Page, tmp_path: Path
) -> None:
    ask(page, "4")
    page.locator("#lab-start").click()
    expect(page.locator("#lab-progress")).to_contain_text("Measuring")
    page.close()
    again = open_lab(browser, url)
    ends(again, "Ended: 4 pairs, as asked")
    expect(again.locator("#lab-resume")).to_be_disabled()
    verdicts = again.locator("#lab-report [aria-label=Verdicts] tbody tr")
    assert {row.split("\t")[0] for row in verdicts.all_inner_texts()} == {FLAG}
    beside = again.locator("#lab-report [aria-label='Full and split'] tbody th")
    assert beside.all_inner_texts() == [
        "baseline again", "baseline", f"without {FLAG}"
    ]  # fmt: skip
    expect(again.locator("#lab-forest-full-ttft_s .js-plotly-plot")).to_be_visible()
    files = exports(again, tmp_path)
    (kept,) = Path(tempfile.gettempdir()).glob(f"{PREFIX}{app.process.pid}-*")
    assert len(list(kept.iterdir())) == 2  # the exports, and the flags table of the Answers tab
    results = json.loads(files["results.json"].read_text())
    assert (results["finished"], results["blocks"]) == ("4 pairs, as asked", 4)
    command = results["setup"]["command"]
    words = shlex.split(command)
    assert words[1:4] == ["-m", "splitlearn", "lab"]
    given = dict(zip(words[4::2], words[5::2], strict=True))
    assert Path(given["--config"]).name == "config.yaml"
    assert (given["--flags"], given["--pairs"], given["--max-new-tokens"]) == (FLAG, "4", "4")
    assert command in files["report.html"].read_text()
    assert command in again.locator("#lab-details").inner_text()
    assert set(pd.read_csv(files["verdicts.csv"])["flag"]) == {"A/A", FLAG}
    pairs = pd.read_csv(files["pairs.csv"])
    assert (pairs.groupby(["flag", "kind", "metric"]).size() == 4).all()
    trials = pd.read_csv(files["trials.csv"])
    assert trials["bad"].isna().sum() >= 4 * 6
    again.close()
    assert eventually(lambda: not list(kept.iterdir()), START_S), "what she could download goes with her"


def test_while_one_runs_another_is_refused_and_so_is_a_comparison_and_a_stopped_one_resumes(
    browser: BrowserContext, url: str, page: Page, folder: Path
) -> None:
    ask(page, "10000")  # it runs until it is stopped
    second = open_lab(browser, url)
    ask(second, "2")
    page.locator("#lab-start").click()
    expect(page.locator("#lab-progress")).to_contain_text("Measuring")
    second.locator("#lab-start").click()
    assert "Another experiment is running" in error(second)
    expect(second.locator("#lab-progress")).to_contain_text("Measuring")
    second.close()
    other = open_lab(browser, url)
    expect(other.locator("#lab-progress")).to_contain_text(re.compile(r"Measuring: .*; \d+ pairs, \d+ runs so far; "))
    expect(other.locator("#lab-start")).to_be_disabled()
    other.get_by_role("tab", name="Answers").click()
    setting(other, "prompt", "What I typed")
    other.locator("#compare").click()
    expect(other.locator("#error")).to_contain_text("The machine is measuring an experiment")
    assert other.locator("#prompt textarea").input_value() == "What I typed"
    other.get_by_role("tab", name="Lab").click()
    expect(other.locator("#lab-progress")).to_contain_text(SECOND, timeout=END_MS)
    other.locator("#lab-stop").click()
    # The server has it: a page that closes drops what it still sends.
    expect(other.locator("#lab-stop")).to_be_disabled()
    other.close()
    ends(page, "Ended: stopped")
    expect(page.locator("#lab-report")).to_contain_text("Not finished")
    page.locator("#lab-resume").click()
    expect(page.locator("#lab-progress")).to_contain_text("Measuring")
    expect(page.locator("#lab-progress")).to_contain_text(SECOND, timeout=END_MS)  # it does not begin anew
    page.locator("#lab-stop").click()
    ends(page, "Ended: stopped")
    assert len(list((folder / "lab").iterdir())) == 2


@pytest.fixture(scope="module")
def reading(browser: BrowserContext, url: str) -> Iterator[Page]:
    """A page that shows the newer of two experiments, then the older one beside itself."""
    opened = open_lab(browser, url)
    expect(opened.locator("#lab-report h2").first).to_be_visible()
    yield opened
    opened.close()


def test_two_experiments_are_held_against_each_other(reading: Page) -> None:
    for name, at in (("lab-chosen", 1), ("lab-other", 0)):
        reading.locator(f"#{name} input").click()
        reading.get_by_role("option").nth(at).click()
        expect(reading.locator("#lab-details")).to_contain_text("--pairs 4")  # the older one
        reading.wait_for_timeout(SETTLED_MS)  # the lists come after the report
    expect(reading.locator("#lab-beside table")).to_contain_text("B: verdict")


def test_the_service_level_that_was_typed_is_the_one_that_is_shown(reading: Page) -> None:
    reading.locator("#lab-levels > button").click()
    setting(reading, "lab-decode_tps", "0.001")
    typed = reading.locator("#lab-ttft_ms input, #lab-ttft_ms textarea").first
    for threshold, met in (("0.001", "not met"), ("60000", "met")):
        type_into(typed, threshold)
        typed.press("Enter")
        cell = reading.locator("#lab-report [aria-label='Full and split'] tbody tr").first.locator("td").last
        expect(cell).to_have_text(met)
    type_into(typed, "-5")
    typed.press("Enter")
    assert "ttft_ms: '-5' cannot be used" in error(reading)
    expect(cell).to_have_text("met")
    type_into(typed, "60000")
    typed.press("Enter")
    expect(reading.locator("#lab-error .sl-error")).to_have_count(0)


@pytest.fixture(scope="module")
def asking(reading: Page) -> Page:
    """The page with a short experiment asked for, to which each test does one wrong thing."""
    ask(reading, "2")
    return reading


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("lab-pairs", "0", "pairs: 0 "),
        ("lab-pairs", "x", "pairs: 'x' "),
        ("lab-delta", "5", "delta: 5.0 "),
        ("lab-tokens", "1", "max_new_tokens: 1 "),
        ("lab-flags", "none", "at least one flag"),
        ("lab-flags", "no_such_flag", "no_such_flag"),
    ],
)
def test_bad_input_is_named_and_nothing_is_begun(asking: Page, folder: Path, field: str, value: str, said: str) -> None:
    before = sorted((folder / "lab").glob("*"))
    box = asking.locator(f"#{field}").locator("input, textarea").first
    right = box.input_value()
    box.fill(value)
    asking.locator("#lab-start").click()
    expect(asking.locator("#lab-error .sl-error")).to_contain_text(said)
    expect(asking.locator("#lab-error .sl-error")).to_contain_text("expected")
    assert sorted((folder / "lab").glob("*")) == before
    expect(asking.locator("#lab-start")).to_be_enabled()
    box.fill(right)

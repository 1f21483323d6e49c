"""The flags table in a real browser: one press fills it, its figures are those of the lab's store, a stop keeps it."""

import csv
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import BrowserContext, Page, expect

from splitlearn.lab.analysis.flags_table import FlagsTable, flags_table
from splitlearn.lab.analysis.pairing import ServiceLevel
from splitlearn.lab.job import read_experiment
from tests.conftest import TinyFactory
from tests.support.page import CHROMIUM, FORBIDDEN, App, measuring, open_page
from ui.flag_table.view import EMPTY, plain

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not CHROMIUM.exists(), reason=f"needs {CHROMIUM} (Debian's package of that name)"),
]

# One flag is eight arms.
FLAG = "inference_mode"
END_MS = 240_000


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the app runs, and so keeps its experiments."""
    return tmp_path_factory.mktemp("flags")


@pytest.fixture(scope="module")
def app(tiny_model: TinyFactory, folder: Path) -> Iterator[App]:
    with measuring(folder, tiny_model().folder, flags=FLAG) as started:
        yield started


@pytest.fixture(scope="module")
def later(browser: BrowserContext, url: str) -> Iterator[Page]:
    """A page of somebody who comes after the experiment. Each test leaves it wide, on its first tab."""
    opened = open_page(browser, url)
    yield opened
    opened.close()
    assert not FORBIDDEN


def stored(folder: Path) -> FlagsTable:
    latest = max((folder / "lab").iterdir(), key=lambda each: each.name)
    return flags_table(read_experiment(latest, ServiceLevel()))


def stop(page: Page) -> None:
    page.locator("#ft-stop").click()
    expect(page.locator("#ft-progress")).to_contain_text("Ended", timeout=END_MS)
    expect(page.locator("#compare-flags")).to_be_enabled()


def test_one_press_fills_the_table_and_its_figures_are_those_of_the_labs_store(
    page: Page, browser: BrowserContext, url: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)  # the app's: a row's command names the interpreter as it is called from there
    expect(page.locator("#flag-table")).to_contain_text(EMPTY)
    page.locator("#compare-flags").click()
    expect(page.locator("#ft-progress")).to_contain_text(f"Measures 1 flags: {FLAG}")
    expect(page.locator("#ft-progress")).to_contain_text("Other programs use")
    expect(page.locator("#ft-progress")).to_contain_text("Measuring", timeout=END_MS)
    other = open_page(browser, url)  # one who comes later finds it
    expect(other.locator("#ft-progress")).to_contain_text("Measuring", timeout=END_MS)
    other.locator("#compare").click()
    expect(other.locator("#error")).to_contain_text("The machine is measuring an experiment")
    other.close()
    expect(page.locator("#flag-table")).to_contain_text("no verdict yet", timeout=END_MS)
    expect(page.locator("#ft-progress")).to_contain_text(re.compile(r"block \d"), timeout=END_MS)  # all rows are filled
    stop(page)
    found = stored(folder)
    table = page.get_by_role("region", name="Flags, full and split")
    assert table.locator("tbody th").all_inner_texts() == [row.name for row in found.rows]
    for line, row in zip(table.locator("tbody tr").all(), found.rows, strict=True):
        shown = line.locator("td").all_inner_texts()
        for at, (_, cells) in enumerate(sorted(row.cells.items())):
            assert cells.ttft_s and cells.tpot_s
            assert shown[at::2][3:6] == [*map(plain, (cells.ttft_s * 1e3, cells.tpot_s * 1e3, cells.tps))]
    with page.expect_download() as download:
        page.locator("#ft-csv").click()
    download.value.save_as(tmp_path / "flags.csv")
    text = (tmp_path / "flags.csv").read_text()
    assert text == found.as_csv()
    assert {line["row"] for line in csv.DictReader(text.splitlines())} >= {row.name for row in found.rows}
    page.locator("#ft-changes summary").last.click()
    expect(page.locator("#ft-changes pre").last).to_contain_text(
        f"splitlearn lab --flags 'full:{FLAG} client:{FLAG} trunk:{FLAG}' --about {FLAG}"
    )


def test_the_lab_tab_shows_the_same_experiment(later: Page, folder: Path) -> None:
    expect(later.locator("#flag-table")).to_contain_text(f"without {FLAG}")
    later.get_by_role("tab", name="Lab").click()
    (name,) = [each.name for each in (folder / "lab").iterdir()]
    expect(later.locator("#lab-progress")).to_contain_text(name)
    later.get_by_role("tab", name="Answers").click()


def test_another_order_is_shown_at_once_when_nothing_is_measured(later: Page) -> None:
    rows = later.get_by_role("region", name="Flags, full and split").locator("tbody th")
    expect(rows.first).to_be_visible()
    before = rows.all_inner_texts()
    later.get_by_label("Largest effect on TPOT first").check()
    expect(rows).to_have_count(len(before))
    assert sorted(rows.all_inner_texts()) == sorted(before)


def test_on_a_phone_the_table_scrolls_in_its_own_box_and_from_1280_pixels_on_it_fits(later: Page) -> None:
    region = later.get_by_role("region", name="Flags, full and split")
    expect(region).to_be_visible()
    assert region.evaluate("box => box.scrollWidth <= box.clientWidth")
    later.set_viewport_size({"width": 320, "height": 800})
    assert later.evaluate("document.documentElement.scrollWidth") <= 320
    first = region.locator("tbody th").first
    left = first.bounding_box()
    region.evaluate("box => box.scrollLeft = 400")
    moved = first.bounding_box()
    assert left is not None
    assert moved is not None
    assert abs(moved["x"] - left["x"]) <= 2
    later.set_viewport_size({"width": 1280, "height": 800})


def test_flags_that_do_not_exist_are_refused_beside_the_table(later: Page, folder: Path) -> None:
    before = sorted((folder / "lab").iterdir())
    later.locator("#flags > button").click()
    words = later.locator("#flag-words textarea, #flag-words input")
    words.fill("none")
    later.locator("#compare-flags").click()
    expect(later.locator("#ft-error .sl-error")).to_contain_text(re.compile("at least one flag"))
    assert sorted((folder / "lab").iterdir()) == before

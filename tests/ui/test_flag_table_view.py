"""The flags table as HTML: its figures are those of the lab's table, and nothing of it is taken for HTML."""

import re
from dataclasses import replace
from html import unescape

import pytest

from splitlearn.lab.analysis.findings import analyse
from splitlearn.lab.analysis.flags_table import ArmCells, FlagsTable, Ratio, flags_table
from splitlearn.lab.design import Design
from splitlearn.lab.records import FIRST_PASS
from tests.support.lab_trials import setup, trials
from ui.flag_table import view
from ui.format import MISSING

UNITS = (1e3, 1e3, 1, 1, 1e-6)
EFFECTS = {
    ("without use_cache, full", "tpot_s"): 1.8,
    ("without inference_mode, split", "tpot_s"): 3.0,
    ("no flags, split", "ttft_s"): 2.0,
}


def table_of(blocks: int, design: Design = "without") -> FlagsTable:
    asked = setup(design)
    first = [replace(trial, block=FIRST_PASS, attempt=0) for trial in trials(asked, EFFECTS, blocks=1)]
    return flags_table(analyse(asked, first + trials(asked, EFFECTS, blocks=blocks), {}))


def text(html: str) -> str:
    return unescape(re.sub(r"<[^>]*>", " ", html))


def rows(html: str) -> dict[str, list[str]]:
    """Each row's cells as text, by the row's name."""
    found = {}
    for row in re.findall('<tr>(<th scope="row">.*?)</tr>', html, re.DOTALL):
        name, *cells = re.findall("<t[hd][^>]*>(.*?)</t[hd]>", row, re.DOTALL)
        found[text(name).strip()] = [text(cell).strip() for cell in cells]
    return found


def figures(cells: ArmCells) -> list[str]:
    """What the table has to say of one arm, its ratios and verdict aside."""
    found = [cells.ttft_s, cells.tpot_s, cells.tps, cells.load_s, cells.added_bytes]
    in_units = [None if each is None else each * unit for each, unit in zip(found, UNITS, strict=True)]
    return [*map(view.plain, in_units), "first" if cells.first_pass else str(cells.n)]


@pytest.mark.parametrize("design", ["without", "alone"])
@pytest.mark.parametrize("blocks", [0, 1, 12])
def test_every_figure_is_that_of_the_labs_table(design: Design, blocks: int) -> None:
    found = table_of(blocks, design)
    drawn = rows(view.section(found))
    for row in (*found.rows, *found.controls):
        for at, (_, cells) in enumerate(sorted(row.cells.items())):
            ratio, verdict, ttft_ratio, *rest = drawn[row.name][at::2]
            assert rest == figures(cells)
            said = view.FIRST_RUN if cells.first_pass else cells.tpot_ratio.verdict if cells.tpot_ratio else MISSING
            assert verdict == (said if cells.tpot_ratio else MISSING)
            for shown, expected in ((ratio, cells.tpot_ratio), (ttft_ratio, cells.ttft_ratio)):
                if expected is not None and expected.ratio is not None:
                    assert shown.startswith(f"{expected.ratio:.2f}\N{MULTIPLICATION SIGN}")
                    assert ("to" in shown) == (expected.interval is not None)


@pytest.mark.parametrize(("low", "high", "shown"), [(1e-20, 6e16, ""), (0.9, 1.2, "0.90 to 1.20")])
def test_an_interval_is_shown_where_it_says_something(low: float, high: float, shown: str) -> None:
    found = table_of(1)
    row = found.rows[-1]
    wide = Ratio(1.04, low, high, 0.95, 2, "no verdict yet: n = 2", False)
    cells = {kind: replace(each, tpot_ratio=wide) for kind, each in row.cells.items()}
    drawn = rows(view.section(replace(found, rows=(replace(row, cells=cells),), controls=())))
    assert drawn[row.name][0].split("\N{MULTIPLICATION SIGN}")[1].strip() == shown


def test_by_effect_the_flag_with_the_largest_effect_comes_first_behind_the_baselines() -> None:
    found = table_of(12)
    listed, by_effect = list(rows(view.section(found))), list(rows(view.section(found, "effect")))
    assert listed[: len(found.rows)] == [row.name for row in found.rows]
    assert by_effect[:4] == [*listed[:2], "without inference_mode", "without use_cache"]
    assert sorted(by_effect) == sorted(listed)


def test_all_bars_lie_on_one_axis_with_the_largest_ratio_at_its_end() -> None:
    drawn = view.section(table_of(0))
    at = [float(x) for x in re.findall('<circle cx="([^"]*)"', drawn)]
    assert 0 <= min(at) <= max(at) == pytest.approx(view.WIDTH, abs=5)
    assert len(set(re.findall('<line class="sl-one" x1="([^"]*)"', drawn))) == 1


def test_each_row_opens_its_command_and_what_changed_in_the_breakdown() -> None:
    found = table_of(12)
    drawn = text(view.changes(found))
    assert all(row.command in drawn for row in found.rows)
    assert re.findall("<summary>(.*?)</summary>", view.changes(found)) == [row.name for row in found.rows]


def test_an_arm_that_cannot_run_is_named_with_the_reason_and_as_text() -> None:
    found = table_of(1)
    row = found.rows[-1]
    cells = {kind: replace(each, unavailable="<b>no & never</b>") for kind, each in row.cells.items()}
    drawn = view.section(replace(found, rows=(*found.rows[:-1], replace(row, cells=cells))))
    assert "<b>no" not in drawn
    assert rows(drawn)[row.name][2:4] == ["unavailable", "unavailable"]
    why = "(<b>no & never</b>)"
    assert f"Left out: {row.cells['full'].arm} {why}; {row.cells['split'].arm} {why}" in unescape(drawn)


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.456, "0.46"), (4.567, "4.57"), (9.999, "10.0"), (45.67, "45.7"), (99.99, "100"), (4567.8, "4568")],
)
def test_a_figure_has_its_unit_in_the_head_and_as_many_digits_as_a_person_reads(value: float, shown: str) -> None:
    assert view.plain(value) == shown


def test_before_the_first_experiment_it_says_what_will_be_there() -> None:
    assert text(view.section(None)).strip() == view.EMPTY


def test_a_sentence_says_which_flag_pays_where_once_that_is_decided_and_that_one_run_is_no_figure() -> None:
    decided, first = text(view.section(table_of(12))), text(view.section(table_of(0)))
    assert "Faster in full only: use_cache." in decided and "Faster in split only: inference_mode." in decided
    assert view.ONE_RUN in first and "Faster in" not in first
    assert view.ONE_RUN not in decided

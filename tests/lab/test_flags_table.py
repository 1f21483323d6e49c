"""The flags table: its figures are the store's, computed here a second way; it is there from the first run on."""

import csv
import io
import json
import shlex
from dataclasses import replace
from statistics import geometric_mean, mean, median

import pytest

from splitlearn.flags.registry import SIDES, Place
from splitlearn.flags.selection import availability, parse
from splitlearn.lab.analysis.findings import Findings, analyse
from splitlearn.lab.analysis.flags_table import ArmCells, FlagsTable, Ratio, flags_table
from splitlearn.lab.design import AA, ALL, NONE, Arm, Design
from splitlearn.lab.records import FIRST_PASS, Trial
from splitlearn.lab.request import ExperimentRequest, planned
from tests.support.lab_trials import TOKENS, setup, trials

SETUP = setup()
EFFECTS = {("without use_cache, full", "tpot_s"): 1.8, ("no flags, split", "ttft_s"): 3.0}


def larger(arm: Arm, trial: Trial) -> Trial:
    """Memory and load that differ between arms and blocks."""
    return replace(trial, peak_bytes=10**9 + len(arm.name) * 10**6 + trial.block, others_cpu=0.01 * trial.block)


def table_of(findings: Findings) -> FlagsTable:
    return flags_table(findings)


def cells(table: FlagsTable, name: str, kind: str) -> ArmCells:
    (row,) = [row for row in (*table.rows, *table.controls) if row.name == name]
    return next(found for each, found in row.cells.items() if each == kind)


def ratio(cell: ArmCells) -> Ratio:
    assert cell.tpot_ratio is not None
    return cell.tpot_ratio


def begun(blocks: int, first: bool = True) -> list[Trial]:
    made = trials(SETUP, EFFECTS, blocks=blocks, change=larger)
    before = trials(SETUP, EFFECTS, blocks=1, change=larger)
    return [replace(t, block=FIRST_PASS, attempt=0) for t in before] * first + made


def test_the_rows_are_all_none_and_each_flag_and_the_check_stands_apart() -> None:
    table = table_of(analyse(SETUP, begun(3), {}))
    flags = ["inference_mode", "use_cache", "output_hidden_states"]
    assert [row.name for row in table.rows] == [ALL, NONE, *(f"without {flag}" for flag in flags)]
    assert [row.flag for row in table.rows] == ["", "", *flags]
    assert [row.name for row in table.controls] == [AA]
    assert all(set(row.cells) == {"full", "split"} for row in table.rows)


def test_every_figure_is_that_of_the_stored_runs() -> None:
    made = begun(12)
    table = table_of(analyse(SETUP, made, {}))
    for row in (*table.rows, *table.controls):
        for cell in row.cells.values():
            own = [t for t in made if t.arm == cell.arm and t.block != FIRST_PASS]
            assert (cell.n, cell.first_pass) == (12, False)
            assert cell.ttft_s == pytest.approx(median(t.ttft_s for t in own))
            tpot = [t.tpot_s or 0.0 for t in own]
            assert cell.tpot_s == pytest.approx(median(tpot))
            assert cell.decode_tps == pytest.approx(1 / median(tpot))
            e2el = [t.ttft_s + 15 * (t.tpot_s or 0.0) for t in own]
            assert cell.tps == pytest.approx(median(16 / each for each in e2el))
            assert cell.peak_bytes == median(t.peak_bytes for t in own)
            assert cell.others_cpu == pytest.approx(mean(t.others_cpu for t in own))
            assert cell.breakdown_us is not None
            assert sum(cell.breakdown_us.values()) == pytest.approx(mean(tpot) * 1e6)
            if cell.reference is None:
                continue
            other = {t.block: t for t in made if t.arm == cell.reference and t.block != FIRST_PASS}
            change = median(t.peak_bytes for t in own) - median(t.peak_bytes for t in other.values())
            assert cell.memory_change_bytes == change
            for metric, found in (("ttft_s", cell.ttft_ratio), ("tpot_s", cell.tpot_ratio)):
                wanted = geometric_mean([getattr(t, metric) / getattr(other[t.block], metric) for t in own])
                assert found is not None and found.low is not None and found.high is not None
                assert found.ratio == pytest.approx(wanted)
                assert found.low < wanted < found.high
                assert found.pairs == 12
            assert cell.breakdown_change_us is not None
            against = mean(t.tpot_s or 0.0 for t in other.values())
            assert sum(cell.breakdown_change_us.values()) == pytest.approx((mean(tpot) - against) * 1e6, abs=1e-3)


def test_a_row_says_what_leaving_the_flag_out_costs_and_the_verdict_what_the_flag_does() -> None:
    found = ratio(cells(table_of(analyse(SETUP, begun(12), {})), "without use_cache", "full"))
    assert found.ratio == pytest.approx(1.8, rel=0.02)
    assert (found.verdict, found.decided) == ("faster", True)


def test_the_first_pass_gives_points_one_block_too_and_two_an_interval() -> None:
    first, one, two = (
        ratio(cells(table_of(analyse(SETUP, begun(blocks), {})), "without use_cache", "full")) for blocks in (0, 1, 2)
    )
    assert (first.pairs, first.low, first.verdict) == (0, None, "no verdict yet: n = 0")
    assert (one.pairs, one.low, one.verdict) == (1, None, "no verdict yet: n = 1")
    assert two.pairs == 2 and two.low is not None and two.verdict == "no verdict yet: n = 2"
    assert first.ratio == pytest.approx(1.8, rel=0.05) and one.ratio == pytest.approx(1.8, rel=0.05)


def test_of_a_first_pass_under_way_the_rows_have_what_has_run() -> None:
    made = [t for t in begun(0) if t.arm in ("baseline, full", "without use_cache, full")]
    table = table_of(analyse(SETUP, made, {"failed": {"no flags, split": "the trunk refused it"}}))
    assert cells(table, ALL, "full").first_pass
    assert ratio(cells(table, "without use_cache", "full")).ratio is not None
    assert cells(table, "without inference_mode", "full") == ArmCells("without inference_mode, full", "baseline, full")
    assert cells(table, NONE, "split").unavailable == "the trunk refused it"
    assert table_of(analyse(SETUP, [], {})).blocks == 0


@pytest.mark.parametrize(
    ("design", "row", "arm", "reference"),
    [
        ("alone", "inference_mode alone", "inference_mode alone, full", "baseline, full"),
        ("alone", "use_cache alone", "baseline, full", "no flags, full"),
        ("alone", ALL, "all flags, full", "baseline, full"),
        ("alone", NONE, "no flags, full", None),
        ("ladder", NONE, "baseline, full", None),
        ("ladder", "with use_cache", "2: with use_cache, full", "1: with inference_mode, full"),
    ],
)
def test_in_each_design_a_row_stands_against_the_arm_that_differs_in_its_flag(
    design: Design, row: str, arm: str, reference: str | None
) -> None:
    asked = setup(design)
    cell = cells(table_of(analyse(asked, trials(asked), {})), row, "full")
    assert (cell.arm, cell.reference) == (arm, reference)


def test_json_and_csv_have_each_row_with_its_command() -> None:
    table = table_of(analyse(SETUP, begun(12), {}))
    read = json.loads(json.dumps(table.as_json(), allow_nan=False))
    assert len(read["rows"]) == 5
    assert read["rows"][3]["cells"]["full"]["tpot_ratio"]["verdict"] == "faster"
    lines = list(csv.DictReader(io.StringIO(table.as_csv())))
    assert len(lines) == 2 * (5 + 1)
    assert float(lines[6]["tpot_ratio.ratio"]) == pytest.approx(1.8, rel=0.02)
    assert {line["command"] for line in lines} == {row.command for row in (*table.rows, *table.controls)}


@pytest.mark.parametrize("design", ["without", "alone", "ladder"])
def test_a_rows_command_measures_its_arms_beside_those_that_they_are_held_against(design: Design) -> None:
    """By what the command line makes of it: the arms that it plans are those of the row, and the second baselines."""
    asked, here = (
        setup(design, command="lab --config c.yaml --prompts p.txt --seed 7"),
        availability(dict.fromkeys(SIDES, Place("cpu"))),
    )
    table = table_of(analyse(asked, trials(asked), {}))
    for row in (*table.rows, *table.controls):
        words = shlex.split(row.command)
        assert words[1:4] == ["-m", "splitlearn", "lab"]
        given = dict(zip(words[4::2], words[5::2], strict=True))
        again = ExperimentRequest(
            given["--flags"],
            design=design,
            about=tuple(given["--about"].split(",")),
            pairs=int(given["--pairs"]),
        )
        made = planned(again, parse(again.flags, here))
        shown = {name for each in row.cells.values() for name in (each.arm, each.reference) if name}
        assert given["--design"] == design
        assert {asked.plan.arm(name) for name in shown} <= set(made.arms)
        if row.role == "flag" and design != "ladder":
            assert {question.flag for question in made.questions} == {AA, row.flag}
        assert (given["--config"], given["--prompts"]) == ("c.yaml", "p.txt")
        assert given["--max-new-tokens"] == str(len(TOKENS))

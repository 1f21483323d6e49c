"""What the tab "Model and cut" draws: pure functions from records to HTML."""

import re
import threading
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitlearn.errors import SetupError
from splitlearn.link.emulated import Link
from splitlearn.models.plan import SplitPlan
from splitlearn.planning.costs import cut_cost
from splitlearn.planning.measure import CutRun
from splitlearn.planning.report import CutReport, report_of
from splitlearn.runtime.progress import Progress, Step
from tests.planning.test_costs import MB, MODEL, RATES, N
from ui.model import cuts, view
from ui.model.actions import follow
from ui.model.pareto import distinct, pareto, ticks
from ui.model.picture import picture

PLAN = SplitPlan(2, 4, N)
HOSTILE = "<img src=x onerror=alert(1)>"


def report(link: Link | None = None, memory: float | None = None, *runs: CutRun) -> CutReport:
    return report_of(MODEL, PLAN, RATES, link or Link(), 100, memory, runs)


def test_the_picture_has_every_layer_where_it_runs_and_says_so_in_words() -> None:
    drawn = picture(MODEL, PLAN, 2304.0, 2310.0)
    where = re.findall(r'data-layer="(\d+)" class="sl-(\w+)"', drawn)
    assert where == [(str(n), "trunk" if 2 <= n < 4 else "client") for n in range(N)]
    assert "2.3 kB up" in drawn
    assert "2.31 kB down" in drawn
    assert "the trunk 2 to 4" in drawn[: drawn.index("<rect")]  # the label of the picture


def test_text_of_a_model_is_shown_as_text() -> None:
    odd = replace(MODEL, model=HOSTILE, architecture=HOSTILE, positions=HOSTILE)
    for drawn in (picture(odd, PLAN, 1, 1), view.facts(odd), view.parts(odd, PLAN)):
        assert "<img" not in drawn


def test_every_fact_has_its_definition_within_reach() -> None:
    drawn = view.facts(MODEL)
    terms = re.findall(r'<button type="button" aria-describedby="([^"]+)">', drawn)
    assert len(terms) == len(set(terms)) == drawn.count("<dd>")
    assert all(re.search(f'role="tooltip" id="{term}">[^<]+<', drawn) for term in terms)
    assert "GQA: 4 heads of 16, 2 for keys and values" in drawn
    assert f"{MODEL.parameters:,}" in drawn


def test_layers_that_differ_are_counted() -> None:
    uneven = replace(MODEL, layers=(replace(MODEL.layers[0], attention="MHA", kv_heads=4), *MODEL.layers[1:]))
    drawn = view.facts(uneven)
    assert "MHA: 4 heads of 16, 4 for keys and values (1 layers)" in drawn
    assert f"({N - 1} layers)" in drawn


@given(st.floats(1, 1e15))
def test_a_count_is_its_number_to_three_digits(number: float) -> None:
    value, _, unit = view.count(number).partition(" ")
    factor = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}[unit]
    assert float(value) * factor == pytest.approx(number, rel=6e-3)


@given(st.floats(0, 1e10), st.floats(1e-4, 1e10), st.integers(2, 8))
def test_ticks_are_few_and_in_range(least: float, width: float, number: int) -> None:
    most = least + width
    found = list(ticks(least, most, number))
    assert len(found) <= number + 1
    assert all(least * (1 - 1e-9) <= tick <= most * (1 + 1e-9) for tick in found)
    assert found == sorted(set(found))


def test_every_cut_is_a_point_or_beside_one_that_costs_the_same() -> None:
    shown = report()
    groups = distinct(shown.costs)
    assert sorted((c.start, c.end) for group in groups.values() for c in group) == sorted(
        (c.start, c.end) for c in shown.costs
    )
    assert pareto(shown, PLAN).count('role="button"') == len(groups)


def test_one_point_is_in_the_order_of_the_keyboard_and_it_is_the_chosen_cut() -> None:
    drawn = pareto(report(), SplitPlan(1, 5, N))
    pressed = re.findall(r'data-start="1" data-end="5" role="button" aria-pressed="true" tabindex="0"', drawn)
    assert len(pressed) == drawn.count('tabindex="0"') == drawn.count('aria-pressed="true"') == 1


def test_the_limit_of_the_client_is_drawn_where_it_is_in_the_picture() -> None:
    assert pareto(report(memory=310 * MB), PLAN).count('<line class="sl-limit"') == 2  # and in the key
    assert pareto(report(memory=1e12), PLAN).count('<line class="sl-limit"') == 1


def test_what_was_measured_stands_beside_what_was_predicted_for_its_tokens() -> None:
    long, short = report(), cut_cost(MODEL, RATES, Link(), RATES.context, 2, 4)
    predicted = long.cost(2, 4)
    assert predicted.client_memory_bytes > short.client_memory_bytes  # of 100 tokens, and of 50
    run = CutRun(2, 4, 1.1 * short.tpot_s, short.ttft_s, round(1.2 * short.client_memory_bytes), 300 * MB)
    after = report(None, None, run)
    assert {"1.10×", "1.00×", "1.20×"} <= set(re.findall(r"[\d.]+×", cuts.chosen(after, PLAN, short)))
    assert "×" not in cuts.chosen(long, PLAN, short)
    assert 'class="sl-mark"' in pareto(after, PLAN)


def test_the_advice_says_what_it_rests_on() -> None:
    drawn = cuts.advice(report(Link(rtt_ms=50)), "use_cache", 0.0, other_words=True)
    assert "use_cache" in drawn
    assert "50 ms" in drawn
    assert "measure again" in drawn
    assert "measure again" not in cuts.advice(report(), "use_cache", 0.0, other_words=False)


def test_work_in_the_background_shows_its_steps_and_gives_what_it_found() -> None:
    def work(progress: Progress) -> str:
        progress(Step("one"))
        progress(Step("two"))
        return "found"

    def collected() -> tuple[list[str], str]:
        steps, going = [], follow(work, threading.Event())
        while True:
            try:
                steps.append(next(going).label)
            except StopIteration as end:
                return steps, end.value

    assert collected() == (["one", "two"], "found")


def test_an_error_in_the_background_is_raised_here() -> None:
    def work(progress: Progress) -> None:
        raise SetupError("no room")

    with pytest.raises(SetupError, match="no room"):
        list(follow(work, threading.Event()))


def test_work_in_the_background_ends_when_nobody_follows_it() -> None:
    stop = threading.Event()

    def work(progress: Progress) -> None:
        progress(Step("begun"))
        stop.wait()

    going = follow(work, stop)
    next(going)
    going.close()
    assert stop.is_set()

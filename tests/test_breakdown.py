"""The ratio of pairs, and where a difference comes from."""

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitlearn.arms.compare import Pairs, turns
from splitlearn.breakdown import Difference, Ratio, check_pairs
from splitlearn.errors import InputError
from splitlearn.events import Done, Recovery, TokenEvent
from splitlearn.metrics import PARTS, RunMetrics
from tests.ui.test_ui_view import report

Steps = list[dict[str, float]]
SPANS = st.dictionaries(st.sampled_from(sorted(PARTS)), st.floats(0, 0.1), min_size=1)
RUNS = st.lists(SPANS, min_size=2, max_size=6)
TIMES = st.floats(1e-4, 10)


def run(steps: Steps) -> RunMetrics:
    """One token a step, each as long as its parts."""
    events, now = [], 0.0
    for spans in steps:
        now += sum(spans.values())
        events.append(TokenEvent((1,), "", now, spans))
    found = RunMetrics.from_events([*events, Done("length", "", 1)])
    assert found is not None
    return found


@given(RUNS, RUNS)
def test_the_parts_of_a_difference_add_up_to_that_of_tpot(full: Steps, split: Steps) -> None:
    one, other = run(full), run(split)
    found = Difference.of([one], [other])
    assert found is not None and one.tpot_s is not None and other.tpot_s is not None
    assert found.total == pytest.approx(other.tpot_s - one.tpot_s, abs=1e-9)


def test_a_single_token_has_no_difference() -> None:
    assert Difference.of([run([{"model": 1.0}])], [run([{"trunk": 1.0}])]) is None


def test_the_sentence_says_more_or_less_and_what_for() -> None:
    more = Difference.of([run([{"model": 0.02}] * 3)], [run([{"trunk": 0.02, "wire": 0.003}] * 3)])
    less = Difference.of([run([{"model": 0.02}] * 3)], [run([{"trunk": 0.01, "wire": 0.003}] * 3)])
    assert more is not None and "3.0 ms more" in more.sentence() and "+3.0 ms for the way" in more.sentence()
    assert less is not None and "7.0 ms less" in less.sentence() and "10.0 ms for computing" in less.sentence()


@given(st.lists(st.tuples(TIMES, TIMES), min_size=1, max_size=8))
def test_a_ratio_turned_round_is_its_inverse(pairs: list[tuple[float, float]]) -> None:
    one, other = Ratio.of(pairs), Ratio.of((split, full) for full, split in pairs)
    assert one is not None and other is not None
    assert one.mean * other.mean == pytest.approx(1)
    assert one.least <= one.mean * (1 + 1e-9) and one.mean <= one.most * (1 + 1e-9)
    assert one.n == len(pairs) and math.isclose(one.least, 1 / other.most)


def test_a_pair_with_a_lost_trunk_is_not_in_the_ratio() -> None:
    full, split = report("full", [1, 2, 3]), report("split", [1, 2, 3])
    lost = replace(split, metrics=replace(split.metrics, recoveries=((2, Recovery(9.0, "a:1", "b:1", 4)),)))
    both = Pairs((full, full), (split, lost))
    assert both.tpot is not None and both.tpot.n == 1
    assert Pairs((full,), (lost,)).tpot is None


def test_the_typical_run_is_one_that_was_seen() -> None:
    runs = [replace(report("full", [1, 2]), metrics=run([{"model": spent}] * 2)) for spent in (3.0, 1.0, 2.0)]
    assert Pairs(tuple(runs), tuple(runs)).typical("full").metrics.e2el_s == 4.0


@pytest.mark.parametrize("pairs", [0, -1, 101, True, 1.5, "3"])
def test_a_number_of_pairs_that_cannot_be_run_is_named(pairs: object) -> None:
    with pytest.raises(InputError, match="pairs"):
        check_pairs(pairs)


def test_both_arms_of_a_pair_follow_each_other() -> None:
    order = list(turns(20))
    assert all({*order[at : at + 2]} == {"full", "split"} for at in range(0, 40, 2))

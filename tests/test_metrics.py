"""The metrics follow from the events alone, by the definitions of docs/metrics.md."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitlearn.events import Done, Event, TokenEvent
from splitlearn.metrics import RunMetrics, first_divergence

EVENTS: list[Event] = [
    TokenEvent((5,), "a", 0.5, {"model": 0.4, "unattributed": 0.1}, bytes_up=100, bytes_down=200),
    TokenEvent((6, 7), "bc", 0.7, {"model": 0.2, "unattributed": 0.0}, bytes_up=10, bytes_down=20),
    TokenEvent((8,), "d", 0.8, {"model": 0.05, "unattributed": 0.05}, bytes_up=10, bytes_down=20),
    Done("eos", "e", 12),
]


def _metrics() -> RunMetrics:
    metrics = RunMetrics.from_events(EVENTS)
    assert metrics is not None
    return metrics


def test_times_follow_their_definitions() -> None:
    metrics = _metrics()
    assert metrics.ttft_s == 0.5
    assert metrics.tpot_s == pytest.approx(0.1)
    assert metrics.e2el_s == pytest.approx(metrics.ttft_s + (metrics.n_tokens - 1) * (metrics.tpot_s or 0))
    assert metrics.itl_s == pytest.approx((0.2, 0.0, 0.1))
    assert metrics.tps == pytest.approx(4 / 0.8)
    assert metrics.decode_tps == pytest.approx(10)


def test_the_ledger_sums_to_the_wall_time() -> None:
    metrics = _metrics()
    assert sum(metrics.ledger.values()) == pytest.approx(metrics.e2el_s)
    assert sum(metrics.decode_ledger.values()) == pytest.approx(metrics.e2el_s - metrics.ttft_s)
    assert (metrics.bytes_up, metrics.decode_bytes_up, metrics.decode_bytes_down) == (120, 20, 40)


def test_text_and_reason_include_what_came_at_the_end() -> None:
    metrics = _metrics()
    assert (metrics.text, metrics.finish_reason, metrics.prompt_tokens) == ("abcde", "eos", 12)


def test_a_single_token_has_no_tpot_and_no_token_no_metrics() -> None:
    one = RunMetrics.from_events(EVENTS[:1])
    assert one is not None
    assert (one.tpot_s, one.decode_tps, one.itl_p50_s, one.finish_reason) == (None, None, None, "cancelled")
    assert RunMetrics.from_events([]) is None


def test_the_first_divergence_counts_a_missing_token() -> None:
    assert first_divergence([1, 2, 3], [1, 2, 3]) is None
    assert first_divergence([1, 2, 3], [1, 9, 3]) == 1
    assert first_divergence([1, 2], [1, 2, 3]) == 2


@st.composite
def runs(draw: st.DrawFn) -> list[Event]:
    """A generation of any steps, of one token or several, whose ledgers sum to the time since the step before."""
    events: list[Event] = []
    at = 0.0
    for tokens in draw(st.lists(st.integers(1, 4), min_size=1, max_size=12)):
        parts = {name: draw(st.floats(0, 1)) for name in ("model", "sample", "unattributed")}
        at += sum(parts.values()) + 1e-6
        parts["unattributed"] += 1e-6
        events.append(TokenEvent(tuple(range(tokens)), "x" * tokens, at, parts, drafts=tokens + 1))
    return events


@given(runs())
def test_of_any_run_the_identities_hold(events: list[Event]) -> None:
    metrics = RunMetrics.from_events(events)
    assert metrics is not None
    n = metrics.n_tokens
    assert n == sum(len(event.token_ids) for event in events if isinstance(event, TokenEvent))
    assert sum(metrics.itl_s) == pytest.approx(metrics.e2el_s - metrics.ttft_s)
    assert len(metrics.itl_s) == n - 1
    assert sum(metrics.ledger.values()) == pytest.approx(metrics.e2el_s)
    assert sum(metrics.decode_ledger.values()) == pytest.approx(metrics.e2el_s - metrics.ttft_s, abs=1e-9)
    assert metrics.tps * metrics.e2el_s == pytest.approx(n)
    assert metrics.drafts_accepted <= metrics.drafts
    if metrics.tpot_s is not None:
        after = n - len(events[0].token_ids) if isinstance(events[0], TokenEvent) else 0
        assert metrics.e2el_s == pytest.approx(metrics.ttft_s + after * metrics.tpot_s)


@given(st.lists(st.integers(0, 3), max_size=8), st.lists(st.integers(0, 3), max_size=8))
def test_the_first_divergence_is_where_the_common_beginning_ends(one: list[int], other: list[int]) -> None:
    at = first_divergence(one, other)
    assert (at is None) == (one == other)
    if at is not None:
        assert one[:at] == other[:at]
        assert one[at : at + 1] != other[at : at + 1]
    assert first_divergence(other, one) == at

"""What a link is predicted to cost follows from a run without it, and from the link's own figures."""

from dataclasses import replace

import pytest
from hypothesis import given

from splitlearn.events import Done, Event, TokenEvent
from splitlearn.link.emulated import Link
from splitlearn.link.prediction import Prediction, predict
from splitlearn.metrics import RunMetrics
from tests.link.test_words import links

STEPS = 8


def run(drafted: int = 0) -> RunMetrics:
    """A prompt of 100,000 bytes each way, then STEPS steps of 2,500 bytes, each with `drafted` accepted drafts."""
    events: list[Event] = [TokenEvent((0,), "", 0.5, {}, bytes_up=100_000, bytes_down=100_000)]
    for step in range(STEPS):
        at, ids = 0.5 + 0.04 * (step + 1), tuple(range(1 + drafted))
        events.append(TokenEvent(ids, "", at, {}, bytes_up=2500, bytes_down=2500, drafts=drafted))
    found = RunMetrics.from_events([*events, Done("length", "", 5)])
    assert found is not None
    return found


def test_a_step_costs_the_round_trip_and_its_bytes_over_the_bandwidths() -> None:
    found = predict([run()], Link(rtt_ms=50, up_mbit=1, down_mbit=10))
    assert found.tpot_s == pytest.approx(0.04 + 0.050 + 8 * 2514 / 1e6 + 8 * 2514 / 10e6)


def test_the_first_token_costs_two_round_trips_and_the_prompt() -> None:
    found = predict([run()], Link(rtt_ms=50, up_mbit=10))
    assert found.ttft_s == pytest.approx(0.5 + 2 * 0.050 + 8 * 100_000 / 10e6, abs=0.001)


def test_accepted_drafts_share_a_trip() -> None:
    found = predict([run(drafted=3)], Link(rtt_ms=50))
    assert found.tpot_s == pytest.approx((0.04 + 0.050) / 4)


def test_every_sample_sends_bytes_of_its_own() -> None:
    link = Link(up_mbit=1)
    one, two = predict([run()], link), predict([run(), run()], link)
    assert two.tpot_s and one.tpot_s
    assert two.tpot_s - one.tpot_s == pytest.approx(8 * 2500 / 1e6)


def test_a_run_of_one_token_has_no_tpot() -> None:
    events: list[Event] = [TokenEvent((0,), "", 0.5, {}, bytes_up=10, bytes_down=10), Done("length", "", 5)]
    one = RunMetrics.from_events(events)
    assert one is not None
    assert predict([one], Link(rtt_ms=50)).tpot_s is None


@given(links())
def test_no_link_makes_a_run_faster_and_a_worse_one_makes_it_slower(link: Link) -> None:
    near = run()
    assert near.tpot_s
    found, worse = (predict([near], each) for each in (link, replace(link, rtt_ms=min(10_000, link.rtt_ms + 10))))
    assert found.tpot_s is not None
    assert worse.tpot_s is not None
    assert near.tpot_s - 1e-9 <= found.tpot_s <= worse.tpot_s + 1e-9
    assert near.ttft_s <= found.ttft_s <= worse.ttft_s + 1e-9
    assert predict([near], Link()) == Prediction(near.ttft_s, near.tpot_s)

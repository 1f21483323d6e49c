"""The queue of visitors and requests: who runs, who waits for whom, and that nobody waits for ever."""

import threading
from concurrent.futures import ThreadPoolExecutor

from hypothesis import given, settings
from hypothesis import strategies as st

from ui.line import Line

NAMES = st.lists(st.sampled_from("abcdefgh"), unique=True, min_size=1)


def test_a_request_waits_for_the_visitor_before_it_and_a_visitor_for_the_request_before_her() -> None:
    line = Line()
    assert line.join("ann") == 0
    line.join_as_request("request")
    assert line.join("bob") == 2
    assert (line.place("request"), line.runs_request) == (1, False)
    line.leave("ann")
    assert (line.place("request"), line.runs_request) == (0, True)
    with ThreadPoolExecutor() as threads:
        turn = threads.submit(line.take, "bob")
        assert not turn.done()
        line.leave("request")
        turn.result()
    assert (line.place("bob"), line.runs_request) == (0, False)


def test_a_visitor_who_stops_or_leaves_waits_no_longer() -> None:
    line, stop = Line(), threading.Event()
    line.join_as_request("request")
    for name in ("ann", "bob"):
        line.join(name)
    with ThreadPoolExecutor() as threads:
        stopped, left = threads.submit(line.take, "ann", stop), threads.submit(line.take, "bob")
        stop.set()
        stopped.result()
        line.leave("bob")
        left.result()
    assert line.place("request") == 0


def test_one_who_has_not_joined_takes_no_place() -> None:
    line = Line()
    line.take("ann")
    assert not line.taken
    with line.turn("ann"):
        assert line.has("ann")
    assert not line.taken


@settings(max_examples=30, deadline=None)
@given(NAMES, st.data())
def test_a_visitor_with_gradios_turn_runs_after_the_requests_before_her(names: list[str], data: st.DataObject) -> None:
    """Visitors are in lower case, requests in upper case. Gradio's order may be another one than that of joining."""
    line, order = Line(), [name.upper() if data.draw(st.booleans()) else name for name in names]
    requests = [name for name in order if name.isupper()]
    for name in order:
        if name in requests:
            line.join_as_request(name)
        else:
            line.join(name)
    for visitor in data.draw(st.permutations([name for name in order if name not in requests])):
        with ThreadPoolExecutor() as threads:
            turn = threads.submit(line.take, visitor)
            while not turn.done():
                for name in requests:
                    if line.runs_request and line.has(name) and line.place(name) == 0:
                        line.leave(name)
        assert not [name for name in order[: order.index(visitor)] if name in requests and line.has(name)]
        line.leave(visitor)

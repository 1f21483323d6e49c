"""The directory of trunks on Ray, over a real socket and without Ray; and how many replicas there should be."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.ray_trunks import load
from server.ray_trunks.directory import Directory, Entry
from server.ray_trunks.load import Load
from server.ray_trunks.scaling import Bounds, Decision, decide
from splitlearn.checkpoints.folder import ModelFiles
from splitlearn.client import directory as client_side
from splitlearn.config import ServerConfig
from splitlearn.errors import TrunkDenied, TrunkRefused, TrunkUnavailable
from splitlearn.events import GenerationRequest, TokenEvent
from splitlearn.models.plan import SplitPlan
from splitlearn.sampling import SamplingParams
from splitlearn.wire.channel import NONE, Credentials, open_channel
from splitlearn.wire.stub import LIST
from tests.support.client import client
from tests.support.tokens import ANN, written
from tests.support.tokens import entry as token_entry
from tests.support.trunk import PLAN, TrunkHere, serve_here

LAYERS = (PLAN.start, PLAN.end)
REQUEST = GenerationRequest("Why is the sky blue?", max_new_tokens=40, ignore_eos=True)


@contextmanager
def directory(**settings: object) -> Iterator[tuple[Directory, str]]:
    """A directory of one link, and its address."""
    made = Directory(ServerConfig(port=0, **settings), 1)  # type: ignore[arg-type]
    try:
        yield made, f"ray://127.0.0.1:{made.port()}"
    finally:
        made.stop()


def entry(address: str, sessions: int = 0, state: str = "serving") -> Entry:
    return Entry(1, state, address, LAYERS, Load(sessions, sessions_limit=8))


def test_the_least_full_replica_comes_first_and_clients_that_ask_at_once_get_different_ones() -> None:
    with directory() as (own, address):
        own.update([entry("a:1", 1), entry("b:1"), entry("c:1", 8), entry("d:1", state="draining")])
        asked = client_side.Directory(address)
        found = [asked.addresses(PLAN) for _ in range(4)]
        asked.close()
    assert found[0] == ["b:1", "a:1", "c:1"]
    assert sorted(each[0] for each in found) == ["a:1", "a:1", "b:1", "b:1"]


def test_what_is_no_directory_or_has_none_of_the_layers_is_said_in_one_line(here: TrunkHere) -> None:
    def fails(address: str, plan: SplitPlan = PLAN) -> str:
        with pytest.raises((TrunkUnavailable, TrunkRefused)) as failure:
            client_side.resolved([address], NONE, plan)
        return str(failure.value)

    assert "No directory of trunks answers" in fails(f"ray://{here.address}")
    with directory() as (own, address):
        own.update([entry("a:1")])
        assert "no trunk server for layers [1, 4); it has those of [2, 4)" in fails(address, SplitPlan(1, 4, 6))
    assert "does not answer" in fails(address)


def test_a_directory_with_tokens_tells_strangers_nothing_and_refuses_what_is_no_message(tmp_path: Path) -> None:
    tokens = written(tmp_path, token_entry("ann", ANN))
    with directory(tokens=tokens) as (own, address):
        own.update([entry("a:1")])
        for shown in (NONE, Credentials(token="wrong")):
            with pytest.raises(TrunkDenied):
                client_side.resolved([address], shown, PLAN)
        assert client_side.resolved([address], Credentials(token=ANN), PLAN) == ("a:1",)
        with open_channel(address.removeprefix("ray://"), Credentials(token=ANN)) as channel:
            with pytest.raises(grpc.RpcError) as failure:
                method: Any = channel.unary_unary(LIST)
                method(b"\xff", timeout=20)
            assert failure.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_a_session_goes_on_at_a_replica_that_the_directory_learns_of_later(files: ModelFiles, here: TrunkHere) -> None:
    with ExitStack() as stack:
        wanted = stack.enter_context(client(files, here.address)).ask(REQUEST)
        own, address = stack.enter_context(directory())
        first = stack.enter_context(ExitStack())
        lost = first.enter_context(serve_here(files))
        own.update([entry(lost.address)])
        asking = stack.enter_context(client(files, address))

        def lose(tokens: int) -> None:
            if tokens == 10:
                own.update([entry(here.address)])
                first.close()

        got = asking.ask(REQUEST, lose)
    assert got.token_ids == wanted.token_ids
    assert [(each.lost, each.found) for _, each in got.recoveries] == [(lost.address, here.address)]


def test_samples_of_one_prompt_are_at_one_replica(files: ModelFiles, here: TrunkHere) -> None:
    request = replace(REQUEST, max_new_tokens=6, samples=4, sampling=SamplingParams(temperature=1.0, seed=1))
    with serve_here(files) as other, directory() as (own, address), client(files, address) as asking:
        before = opened(here)
        own.update([entry(here.address), entry(other.address)])
        answered = [event for event in asking.stream(request) if isinstance(event, TokenEvent)]
        assert sorted([opened(here) - before, opened(other)]) == [0, 4]
    assert len(answered) == 24


def opened(trunk: TrunkHere) -> int:
    """Sessions that it has admitted so far."""
    found = trunk.runtime.metrics.registry.get_sample_value("splitlearn_trunk_sessions_opened_total")
    return int(found or 0)


def test_a_servers_metrics_say_its_load_and_its_layers(files: ModelFiles) -> None:
    with serve_here(files, max_sessions=4) as trunk, client(files, trunk.address) as asking:
        events = asking.stream(REQUEST)
        next(event for event in events if isinstance(event, TokenEvent))
        found, layers = load.parse(trunk.runtime.metrics.text())
        events.close()
    assert layers == LAYERS
    assert (found.sessions, found.sessions_limit, found.sessions_waiting) == (1, 4, 0)
    assert 0 < found.kv_blocks_used < found.kv_blocks
    with pytest.raises(ValueError, match="not the metrics of a trunk server"):
        load.parse("python_info 1")


BOUNDS = Bounds(1, 3, 10.0)
BUSY, WAITING, IDLE = Load(8, 8), Load(2, 8, sessions_waiting=1), Load(0, 8)
loads = st.builds(Load, st.integers(0, 8), st.just(8), st.integers(0, 3), st.integers(0, 10), st.just(10))


@given(st.lists(loads, max_size=5), st.integers(0, 2), st.floats(0, 100), st.none() | st.floats(0, 100))
def test_replicas_stay_within_their_bounds_and_change_one_at_a_time(
    now_there: list[Load], starting: int, now: float, since: float | None
) -> None:
    there = len(now_there) + starting
    wanted = decide(now_there, starting, BOUNDS, now, Decision(there, since)).wanted
    assert wanted <= BOUNDS.most
    assert wanted >= BOUNDS.least or starting
    assert there < BOUNDS.least or there > BOUNDS.most or abs(wanted - there) <= 1


def test_one_is_added_when_all_are_full_or_sessions_wait_and_none_while_one_starts() -> None:
    before = Decision(1)
    assert decide([BUSY], 0, BOUNDS, 0.0, before).wanted == 2
    assert decide([WAITING], 0, BOUNDS, 0.0, before).wanted == 2
    assert decide([Load(0, 8, 0, 9, 10)], 0, BOUNDS, 0.0, before).wanted == 2
    assert decide([BUSY], 1, BOUNDS, 0.0, before).wanted == 2
    assert decide([BUSY, IDLE], 0, BOUNDS, 0.0, before).wanted == 2


def test_one_goes_when_it_was_dispensable_for_long_enough_without_a_break() -> None:
    first = decide([IDLE, IDLE], 0, BOUNDS, 100.0, Decision(2))
    assert first == Decision(2, 100.0)
    assert decide([IDLE, IDLE], 0, BOUNDS, 109.0, first).wanted == 2
    assert decide([IDLE, IDLE], 0, BOUNDS, 110.0, first).wanted == 1
    broken = decide([BUSY, IDLE], 0, BOUNDS, 105.0, first)
    assert decide([IDLE, IDLE], 0, BOUNDS, 110.0, broken) == Decision(2, 110.0)

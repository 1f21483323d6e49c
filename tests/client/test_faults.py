"""What a client does when its trunk is lost in the middle of an answer: it goes on with the very next token."""

import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path

import psutil
import pytest
import torch

from server import connections
from splitlearn import config
from splitlearn.arms.runs import Runs
from splitlearn.checkpoints.folder import ModelFiles
from splitlearn.client.circuit_breaker import COOL_DOWN_S, FAILURES, LONGEST_S, Breaker
from splitlearn.client.remote_stage import RemoteStage
from splitlearn.client.served import describe, first_that_works
from splitlearn.errors import TrunkFull, TrunkRefused, TrunkUnavailable
from splitlearn.events import GenerationRequest, Reconnecting, Recovery
from splitlearn.flags.selection import FlagSet
from splitlearn.metrics import RunMetrics, recovery_sentence
from splitlearn.runtime.progress import silent
from splitlearn.scheduling import admission
from splitlearn.wire import channel, codec
from tests.client.test_remote import free_port
from tests.conftest import TinyFactory
from tests.support.client import CACHED, client
from tests.support.forked import ForkedTrunk, forked
from tests.support.proxy import Proxy, proxy
from tests.support.trunk import (
    PLAN,
    Raw,
    TrunkHere,
    eventually,
    hidden,
    opening,
    serve_here,
    served,
    settings,
    step,
    tensor_of,
)
from tests.support.words import session_of
from ui.compare import session as compare_session
from ui.compare import view

CLIENTS = 3
TOKENS = 60
MAX_LENGTH = 256


def request(number: int = 0, tokens: int = TOKENS) -> GenerationRequest:
    return GenerationRequest(f"Why is the sky blue, question {number}?", max_new_tokens=tokens, ignore_eos=True)


@pytest.fixture(scope="module")
def undisturbed(here: TrunkHere, files: ModelFiles) -> list[RunMetrics]:
    """What each question is answered when nothing happens."""
    with client(files, here.address) as asking:
        found = [asking.ask(request(number)) for number in range(CLIENTS)]
    assert all(not metrics.recoveries and len(set(metrics.token_ids)) > 5 for metrics in found)
    return found


@pytest.fixture
def between(here: TrunkHere) -> Iterator[Proxy]:
    with proxy(here.address) as made:
        yield made


@pytest.fixture
def trunk(files: ModelFiles, tmp_path: Path) -> Iterator[ForkedTrunk]:
    with forked(
        settings(files, split={"start": PLAN.start, "end": PLAN.end}, server={"drain_s": 30.0}), tmp_path
    ) as running:
        yield running


def once(at: int, act: Callable[[], object]) -> Callable[[int], object]:
    """Does `act` when there are `at` tokens."""
    return lambda tokens: act() if tokens == at else None


def ping_every_second(monkeypatch: pytest.MonkeyPatch) -> None:
    quick = tuple((name, min(value, 1_000)) for name, value in channel.KEEP_ALIVE)
    monkeypatch.setattr(channel, "KEEP_ALIVE", quick)


def check_same(found: RunMetrics, wanted: RunMetrics) -> None:
    assert found.token_ids == wanted.token_ids
    assert (found.text, found.finish_reason) == (wanted.text, wanted.finish_reason)
    assert sum(found.ledger.values()) == pytest.approx(found.e2el_s)


def test_a_connection_that_is_cut_at_any_token_costs_no_token(
    between: Proxy, files: ModelFiles, undisturbed: list[RunMetrics]
) -> None:
    cuts = random.Random(7).sample(range(1, TOKENS), 12)
    notices: list[Reconnecting] = []
    with client(files, between.address) as asking:
        asking.stage.watch = notices.append
        before = threading.active_count(), psutil.Process().num_fds()
        found = asking.ask(request(), lambda tokens: between.cut() if tokens in cuts else None)
        check_same(found, undisturbed[0])
        assert [token for token, _ in found.recoveries] == [cut + 1 for cut in sorted(cuts)]
        assert all(recovery.replayed_tokens == found.prompt_tokens + token - 2 for token, recovery in found.recoveries)
        assert found.ledger["recover"] == pytest.approx(sum(recovery.seconds for _, recovery in found.recoveries))
        assert [notice.attempt for notice in notices].count(1) == len(cuts)  # each loss is told when it is noticed
        assert {notice.lost for notice in notices} == {between.address}
        assert asking.ask(request()).recoveries == ()
        assert eventually(lambda: threading.active_count() <= before[0] + 4), threading.enumerate()
        assert eventually(lambda: psutil.Process().num_fds() <= before[1] + 8)


def test_a_session_without_a_cache_goes_on_as_well(
    between: Proxy, files: ModelFiles, undisturbed: list[RunMetrics]
) -> None:
    with client(files, between.address, trunk=frozenset({"inference_mode"})) as asking:
        found = asking.ask(request(), once(30, between.cut))
    check_same(found, undisturbed[0])
    ((token, recovery),) = found.recoveries
    assert (token, recovery.replayed_tokens) == (31, 0)  # each step brings the prefix as it is


def test_what_was_rolled_back_is_not_replayed_and_only_the_lost_step_comes_back(
    between: Proxy, here: TrunkHere, files: ModelFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, dropped, then, last = (hidden(files, tokens, seed=tokens) for tokens in (30, 3, 2, 4))
    with closing(RemoteStage([here.address], served(files), 20)) as stage:
        session = stage.open(session_of(CACHED), MAX_LENGTH)
        wanted = [session.step(0, kept).x, session.step(30, then).x, session.step(32, last).x]
        session.close()
    # Few enough bytes for a message that the replay goes in several parts.
    monkeypatch.setattr(codec, "MAX_TENSOR_BYTES", 10 * files.facts.hidden_size * 4)
    with closing(RemoteStage([between.address], served(files), 20)) as stage:
        session = stage.open(session_of(CACHED), MAX_LENGTH)
        session.step(0, kept)
        session.step(30, dropped)
        between.cut()
        output = session.step(30, then)
        torch.testing.assert_close(output.x, wanted[1])
        assert output.timing.recoveries[0].replayed_tokens == 30
        torch.testing.assert_close(session.step(32, last).x, wanted[2])
        session.close()


def test_a_trunk_that_is_killed_again_and_again_costs_no_token(
    trunk: ForkedTrunk, files: ModelFiles, undisturbed: list[RunMetrics]
) -> None:
    """Several clients at once, each with the token at which it kills. Sessions that are not open yet are not recovered:
    all have a token before the first kill."""
    kills, turn = random.Random(3).sample(range(2, TOKENS - 1), CLIENTS), threading.Lock()
    begun = threading.Barrier(CLIENTS, timeout=120)

    def at(tokens: int, own: int) -> None:
        if tokens == 1:
            begun.wait()
        if tokens == own:
            with turn:
                trunk.kill()
                trunk.start()

    with ExitStack() as stack, ThreadPoolExecutor(CLIENTS) as pool:
        asking = [stack.enter_context(client(files, trunk.address)) for _ in kills]
        answers = [pool.submit(asking[n].ask, request(n), partial(at, own=own)) for n, own in enumerate(kills)]
        for answer, wanted in zip(answers, undisturbed, strict=True):
            check_same(answer.result(), wanted)
            assert answer.result().recoveries


def test_of_two_trunks_one_may_die(
    trunk: ForkedTrunk, here: TrunkHere, files: ModelFiles, undisturbed: list[RunMetrics]
) -> None:
    with client(files, trunk.address, here.address) as asking:
        found = asking.ask(request(), once(20, trunk.kill))
        check_same(found, undisturbed[0])
        ((token, recovery),) = found.recoveries
        assert (token, recovery.lost, recovery.found) == (21, trunk.address, here.address)
        assert asking.stage.facts.address == here.address
        assert asking.ask(request(1)).recoveries == ()  # it stays where it works


def test_a_trunk_that_is_told_to_stop_ends_its_answer_and_the_next_one_is_asked_for_more(
    trunk: ForkedTrunk, here: TrunkHere, files: ModelFiles, undisturbed: list[RunMetrics]
) -> None:
    with client(files, trunk.address, here.address) as asking:
        found = asking.ask(request(), once(20, lambda: os.kill(trunk.pid, signal.SIGTERM)))
        check_same(found, undisturbed[0])
        assert (found.recoveries, asking.stage.facts.address) == ((), trunk.address)
        check_same(asking.ask(request(1)), undisturbed[1])
        assert asking.stage.facts.address == here.address


def test_the_first_address_that_works_is_used(
    here: TrunkHere, files: ModelFiles, undisturbed: list[RunMetrics]
) -> None:
    dead = f"127.0.0.1:{free_port()}"
    with client(files, dead, here.address) as asking:
        check_same(asking.ask(request()), undisturbed[0])
        assert asking.stage.facts.address == here.address
    assert first_that_works([dead, here.address], describe).digest == files.digest
    with pytest.raises(TrunkUnavailable, match=dead):
        first_that_works([dead], describe)


@pytest.mark.parametrize("how", ["stopped", "held"])
def test_a_trunk_that_hangs_is_left_for_the_next_one(
    how: str,
    trunk: ForkedTrunk,
    here: TrunkHere,
    files: ModelFiles,
    undisturbed: list[RunMetrics],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By SIGSTOP, or by a network that carries nothing any more: no connection is closed, and no answer is overdue."""
    ping_every_second(monkeypatch)
    with proxy(trunk.address) as between, client(files, between.address, here.address) as asking:
        stall = between.hold if how == "held" else trunk.hold
        found = asking.ask(request(), once(20, stall))
    check_same(found, undisturbed[0])
    assert [recovery.found for _, recovery in found.recoveries] == [here.address]


def test_a_trunk_that_hung_for_a_while_is_taken_up_again_when_it_is_the_only_one(
    trunk: ForkedTrunk, files: ModelFiles, undisturbed: list[RunMetrics], monkeypatch: pytest.MonkeyPatch
) -> None:
    ping_every_second(monkeypatch)

    def stall() -> None:
        trunk.hold()
        threading.Timer(3, os.kill, (trunk.pid, signal.SIGCONT)).start()

    with client(files, trunk.address) as asking:
        found = asking.ask(request(), once(20, stall))
    check_same(found, undisturbed[0])
    assert [token for token, _ in found.recoveries] == [21]


def test_a_session_that_is_idle_may_be_pinged_and_is_not_shut_for_it(
    files: ModelFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both ends' own settings, ten times as quick; with gRPC's default for a server the fourth ping is one too many."""
    for end in (channel, connections):
        quick = tuple((name, value // 10) for name, value in end.KEEP_ALIVE)
        monkeypatch.setattr(end, "KEEP_ALIVE", quick)
    with serve_here(files) as pinged, closing(RemoteStage([pinged.address], served(files), 20)) as stage:
        session = stage.open(session_of(CACHED), MAX_LENGTH)
        session.step(0, hidden(files, 2))
        time.sleep(6)
        assert session.step(2, hidden(files, 1)).timing.recoveries == ()


def test_a_trunk_that_is_slow_or_a_client_that_does_not_read_harms_nobody(
    between: Proxy, here: TrunkHere, files: ModelFiles, undisturbed: list[RunMetrics]
) -> None:
    x, length = hidden(files, 500), 500
    between.pause_s = 0.02
    with Raw(here.address) as unread, client(files, between.address) as slow, client(files, here.address) as other:
        unread.ask(opening(files, max_length=length, flags=[]))
        sent = 40  # of 96 kB each: more than gRPC takes from a server for a client that does not read
        unread.send(*(step(x, 0, number) for number in range(1, sent + 1)))
        with ThreadPoolExecutor() as pool:
            answers = [pool.submit(each.ask, request(number)) for number, each in enumerate((slow, other))]
            for number, answer in enumerate(answers):
                check_same(answer.result(), undisturbed[number])
                assert answer.result().recoveries == ()
        first = tensor_of(unread.receive(), files)
        # In other pieces, as others decode meanwhile or not.
        assert all(torch.allclose(tensor_of(unread.receive(), files), first, atol=1e-4) for _ in range(sent - 1))


def test_a_trunk_that_was_restarted_with_another_model_is_refused(
    trunk: ForkedTrunk,
    here: TrunkHere,
    files: ModelFiles,
    tiny_model: TinyFactory,
    undisturbed: list[RunMetrics],
) -> None:
    another = settings(tiny_model("gpt2"), split={"start": PLAN.start, "end": PLAN.end})
    with client(files, trunk.address) as asking, client(files, trunk.address, here.address) as has_another:

        def replace() -> None:
            trunk.kill()
            trunk.configure(another)
            trunk.start()

        with pytest.raises(TrunkRefused, match=rf"{trunk.address}.*FAILED_PRECONDITION.*model is .*gpt2"):
            asking.ask(request(), once(20, replace))
        check_same(has_another.ask(request()), undisturbed[0])


def test_a_step_is_given_up_when_its_time_is_over(files: ModelFiles, trunk: ForkedTrunk) -> None:
    said = f"{trunk.address} does not answer or was lost .*python -m server"
    with client(files, trunk.address, timeout_s=3) as asking, pytest.raises(TrunkUnavailable, match=said):
        asking.ask(request(), once(20, trunk.kill))


def test_a_dead_trunk_is_not_hammered_and_the_next_request_is_told_at_once(files: ModelFiles) -> None:
    with proxy(f"127.0.0.1:{free_port()}") as dead, closing(RemoteStage([dead.address], served(files), 60)) as stage:
        for _ in range(3 * FAILURES):
            with pytest.raises(TrunkUnavailable, match=dead.address) as told:
                stage.open(session_of(CACHED), MAX_LENGTH)
        assert f"{dead.address} failed" in str(told.value)
        assert "times in a row and is not tried again for" in str(told.value)
        assert dead.connections < 2 * FAILURES


def test_without_a_trunk_the_full_arm_goes_on(files: ModelFiles) -> None:
    parsed = config.with_trunk(config.parse(settings(files)), f"127.0.0.1:{free_port()},127.0.0.1:{free_port()}")
    flags = FlagSet(CACHED, CACHED, CACHED)
    with Runs(parsed, silent) as runs:
        *_, shown = compare_session.compare(runs, flags, request(tokens=8), threading.Event())
    assert shown.full.state == "done"
    assert shown.full.metrics is not None
    assert shown.full.metrics.n_tokens == 8
    assert shown.split.state == "failed"
    assert all(address in view.errors(shown) for address in parsed.trunk.addresses)


def test_a_circuit_opens_after_failures_in_a_row_for_longer_each_time_and_one_probe_closes_it() -> None:
    now = 0.0
    circuit = Breaker(lambda: now)
    for _ in range(FAILURES):
        assert circuit.rest_s() == 0
        circuit.trying()
        circuit.failed()
    rests = []
    for _ in range(5):
        rests.append(circuit.rest_s())
        now += circuit.rest_s()
        assert circuit.rest_s() == 0
        circuit.trying()
        assert circuit.rest_s() > 0  # one probe at a time
        circuit.failed()
    assert rests == [COOL_DOWN_S, 2 * COOL_DOWN_S, 4 * COOL_DOWN_S, LONGEST_S, LONGEST_S]
    circuit.succeeded()
    assert (circuit.rest_s(), circuit.failures) == (0, 0)


def test_a_full_trunk_is_waited_for_as_long_as_it_says(files: ModelFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admission, "FIRST_GUESS_S", 0.5)  # what it says as long as no session has ended
    with serve_here(files, max_sessions=1, max_waiting=0) as full:
        with closing(RemoteStage([full.address], served(files), 30)) as stage:
            first = stage.open(session_of(CACHED), MAX_LENGTH)
            threading.Timer(0.5, first.close).start()
            second = stage.open(session_of(CACHED), MAX_LENGTH)
            assert second.step(0, hidden(files, 2)).x.shape[1] == 2
            second.close()
        with (
            closing(RemoteStage([full.address], served(files), 1)) as stage,
            closing(stage.open(session_of(CACHED), MAX_LENGTH)),
            pytest.raises(TrunkFull, match="RESOURCE_EXHAUSTED"),
        ):
            stage.open(session_of(CACHED), MAX_LENGTH)


def test_what_is_told_of_a_loss_is_one_sentence() -> None:
    moved, same = Recovery(0.84, "a:1", "b:2", 34), Recovery(2.0, "a:1", "a:1", 1)
    assert recovery_sentence(12, moved) == (
        "The trunk at a:1 was lost at token 12; reconnected to b:2 in 0.8 s, with 34 tokens replayed."
    )
    assert "lost at token 3; reconnected in 2.0 s, with 1 token replayed." in recovery_sentence(3, same)

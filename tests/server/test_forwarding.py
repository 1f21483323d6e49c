"""A chain of trunk servers that forward to each other: it answers as its layers do, and all of it ends together."""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bench.hostile import REFUSALS, UNCAUGHT, feeds, target
from splitlearn.checkpoints.folder import ModelFiles
from splitlearn.client.served import describe
from splitlearn.models.plan import SplitPlan
from splitlearn.stages import loading
from splitlearn.stages.base import StageInput
from splitlearn.stages.local import LocalStage
from splitlearn.wire import MAX_HOPS, PROTOCOL, SERVICE
from splitlearn.wire import trunk_pb2 as pb
from splitlearn.wire.channel import open_channel
from splitlearn.wire.hidden_states import Int8Blocks, Plain, Rows
from tests.support.proxy import Proxy, proxy
from tests.support.tokens import ANN, entry, written
from tests.support.trunk import Raw, TrunkHere, encoded, eventually, hidden, opening, serve_here, step, tensor_of
from tests.support.words import load_of, session_of

PLANS = (SplitPlan(1, 2, 6), SplitPlan(2, 4, 6), SplitPlan(4, 5, 6))
FLAGS = ("use_cache", "inference_mode")
INVALID, REFUSED, LOST, FORGOTTEN, LATE = (
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.ABORTED,
    grpc.StatusCode.DEADLINE_EXCEEDED,
)
DONE = pb.ClientMessage(done=pb.Done()).SerializeToString()
MEGABYTE = 1 << 20


@dataclass(frozen=True)
class Servers:
    """Three servers. Each may forward to those after it, which it reaches by `proxies`, too."""

    files: ModelFiles
    hops: Sequence[TrunkHere]
    proxies: Sequence[Proxy]

    def free(self) -> bool:
        """Whether nothing is left of any session: neither its place, nor KV memory, nor a thread that sends."""
        runtimes = [hop.runtime for hop in self.hops]
        senders = [each for each in threading.enumerate() if "consume_request_iterator" in each.name]
        return not senders and not any(each.admission.sessions or each.admission.pool.blocks_used for each in runtimes)

    def refusals(self, hop: int, cause: str) -> int:
        lines = self.hops[hop].runtime.metrics.text().splitlines()
        counts = [line for line in lines if "refusals_total{" in line and f'cause="{cause}"' in line]
        return sum(int(float(line.rpartition(" ")[2])) for line in counts)


@dataclass(frozen=True)
class Opened:
    """A session at each server of a chain: the client's streams, and what each was answered."""

    streams: Sequence[Raw]
    answers: Sequence[pb.Opened]

    @property
    def keys(self) -> list[bytes]:
        return [answer.key for answer in self.answers]

    @property
    def cached(self) -> list[int]:
        return [answer.cached_tokens for answer in self.answers]

    def ask(self, *messages: bytes) -> pb.ServerMessage:
        """Send to the first server, and wait for an answer of the last one."""
        self.streams[0].send(*messages)
        return self.streams[-1].receive()


def layers(plan: SplitPlan) -> tuple[int, int]:
    return plan.start, plan.end


@pytest.fixture(scope="module")
def servers(files: ModelFiles) -> Iterator[Servers]:
    with chained(files) as made:
        yield made


@pytest.fixture
def chain(servers: Servers) -> Iterator[Servers]:
    """The module's servers; afterwards nothing is left at any of them."""
    yield servers
    assert eventually(servers.free)


@contextmanager
def chained(files: ModelFiles, **limits: object) -> Iterator[Servers]:
    with ExitStack() as stack:
        hops, proxies = list[TrunkHere](), list[Proxy]()
        for plan in reversed(PLANS):
            forward_to = {"addresses": [*(hop.address for hop in hops), *(each.address for each in proxies)]}
            hop = stack.enter_context(
                serve_here(files, "trunk:none", {}, layers(plan), forward_to=forward_to, **limits)
            )
            proxies.insert(0, stack.enter_context(proxy(hop.address)))
            hops.insert(0, hop)
        yield Servers(files, hops, proxies)


@contextmanager
def opened(
    servers: Servers, hops: Sequence[int] = (0, 1, 2), proxied: bool = False, fork: bytes = b"", **changes: Any
) -> Iterator[Opened]:
    """Sessions at these servers, each of which is told where its answers go."""
    with ExitStack() as stack:
        streams, answers = list[Raw](), list[pb.Opened]()
        for hop in hops:
            own = {"forwards": hop != hops[-1], "fed": hop != hops[0], **changes}
            streams.append(stack.enter_context(Raw(servers.hops[hop].address)))
            answers.append(streams[-1].ask(opening(servers.files, PLANS[hop], **own)).opened)
        for stream, hop, answer in zip(streams, hops[1:], answers[1:], strict=False):
            address = servers.proxies[hop].address if proxied else servers.hops[hop].address
            stream.send(forward(address, answer.key, answer.max_tensor_bytes))
        yield Opened(streams, answers)


def forward(address: str, key: bytes, max_tensor_bytes: int = 0) -> bytes:
    message = pb.Forward(address=address, key=key, max_tensor_bytes=max_tensor_bytes)
    return pb.ClientMessage(forward=message).SerializeToString()


def feed(key: bytes, protocol: int = PROTOCOL) -> bytes:
    return pb.ClientMessage(feed=pb.Feed(protocol=protocol, key=key)).SerializeToString()


def drop(server: TrunkHere, key: bytes, step_id: int) -> None:
    with open_channel(server.address) as channel:
        method: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(f"/{SERVICE}/Drop")
        method(pb.DropRequest(key=key, step_id=step_id).SerializeToString(), timeout=60)


@pytest.fixture(scope="module")
def local(files: ModelFiles) -> LocalStage:
    """All layers of the chain."""
    placement = loading.Placement(torch.device("cpu"), torch.float32)
    spec = loading.StageSpec("trunk", PLANS[0].start, PLANS[-1].end)
    return loading.load(files, [spec], load_of(()), placement).stages[0]


@contextmanager
def computed(local: LocalStage) -> Iterator[Callable[[int, torch.Tensor], torch.Tensor]]:
    """A session of all layers in this process: computes a hidden state at a position."""
    session = local.open(session_of(FLAGS), 64)
    yield lambda position, x: local.step([StageInput(session, position, x)])[0].x.clone()
    session.close()


def test_a_chain_answers_as_its_layers_do(chain: Servers, local: LocalStage) -> None:
    files, x = chain.files, hidden(chain.files, 12)
    with opened(chain) as session, computed(local) as wanted:
        streams = session.streams
        streams[0].send(step(x[:, :4], 0, 1, answer_last=1), step(x[:, 4:6], 4, 2, more=True), step(x[:, 6:7], 6, 2))
        first, second = streams[2].receive(), streams[2].receive()
        assert torch.equal(tensor_of(first, files), wanted(0, x[:, :4])[:, -1:])
        assert torch.equal(tensor_of(second, files), wanted(4, x[:, 4:7]))
        assert [each.result.step_id for each in (first, second)] == [1, 2]
        for each in (first, second):
            assert len(each.result.hops) == 2
            assert all(hop.trunk_s > 0 and hop.decode_s > 0 for hop in each.result.hops)
        for at in range(7, 9):
            answer = session.ask(step(x[:, at : at + 1], at, at))
            assert torch.equal(tensor_of(answer, files), wanted(at, x[:, at : at + 1]))
        back = session.ask(step(x[:, 9:], 3, 9, truncate=True, answer_last=2))
        assert torch.equal(tensor_of(back, files), wanted(3, x[:, 9:])[:, -2:])
        assert back.result.position == 4
        for stream in streams:
            stream.send(DONE)
            assert stream.end().closed.peak_rss_bytes > 50 * MEGABYTE


def test_streams_may_be_closed_in_any_order(chain: Servers) -> None:
    for order in ((2, 1, 0), (1, 0, 2)):
        with opened(chain) as session:
            session.ask(step(hidden(chain.files, 3), 0))
            for at in order:
                session.streams[at].send(DONE)
                assert session.streams[at].end().WhichOneof("kind") == "closed"


@pytest.mark.parametrize("form", ["bfloat16", "int8"])
def test_a_chain_answers_to_the_bit_as_one_whose_client_passes_on_the_answers(chain: Servers, form: str) -> None:
    rows: Rows = Plain(torch.bfloat16) if form == "bfloat16" else Int8Blocks()
    flags = [*FLAGS, f"wire_dtype={form}"]
    sent = encoded(hidden(chain.files, 3), rows)
    with opened(chain, flags=flags) as session:
        found = session.ask(step(sent, 0)).result.hidden
    with ExitStack() as stack:
        for hop, plan in zip(chain.hops, PLANS, strict=True):
            raw = stack.enter_context(Raw(hop.address))
            raw.ask(opening(chain.files, plan, flags=flags))
            sent = raw.ask(step(sent, 0)).result.hidden
    assert found == sent


def test_a_server_for_other_flags_is_part_of_a_chain(chain: Servers, local: LocalStage) -> None:
    x, flags = hidden(chain.files, 4), [*FLAGS, "low_cpu_mem_usage"]
    for in_order in (True, False):
        with (
            opened(chain, (0,), forwards=True) as first,
            opened(chain, (1,), forwards=True, fed=True, flags=flags, timeout_s=120) as middle,
            opened(chain, (2,), fed=True) as last,
            computed(local) as wanted,
        ):
            first.streams[0].send(forward(chain.hops[1].address, middle.keys[0]))
            middle.streams[0].send(forward(chain.hops[2].address, last.keys[0]))
            for at in range(3):
                first.streams[0].send(step(x[:, at : at + 1], at, at))
                assert torch.equal(tensor_of(last.streams[0].receive(), chain.files), wanted(at, x[:, at : at + 1]))
            streams = [*first.streams, *middle.streams, *last.streams]
            for stream in streams if in_order else ():
                stream.send(DONE)
                assert stream.end().WhichOneof("kind") == "closed"
            if not in_order:
                streams.pop().cancel()
                assert [stream.refusal()[0] for stream in streams] == [LOST] * 2
    # A feed at a variant that its sender ends without a word.
    with Raw(chain.hops[1].address) as client, Raw(chain.hops[1].address) as feeding:
        key = client.ask(opening(chain.files, PLANS[1], fed=True, flags=flags)).opened.key
        feeding.send(feed(key), step(x, 0))
        assert tensor_of(client.receive(), chain.files).shape == x.shape
        feeding.cancel()
        assert client.refusal()[0] is LOST


def test_kept_prefixes_of_different_lengths_are_used_up_to_the_shortest(chain: Servers, local: LocalStage) -> None:
    x, keys, flags = hidden(chain.files, 33), bytes(range(32)), [*FLAGS, "prefix_cache"]
    with opened(chain, flags=flags) as session, computed(local) as wanted:
        session.ask(step(x, 0))
        for stream, blocks in zip(session.streams, (2, 2, 1), strict=True):
            stream.send(pb.ClientMessage(keep=pb.Keep(prefix_keys=keys[: 16 * blocks])).SerializeToString(), DONE)
            assert stream.end().WhichOneof("kind") == "closed"
        wanted(0, x)
        with opened(chain, flags=flags, prefix_keys=keys) as again:
            answer = again.ask(step(x[:, 16:], 16, truncate=True))
            assert again.cached == [32, 32, 16]
            assert torch.equal(tensor_of(answer, chain.files), wanted(16, x[:, 16:]))


def test_a_long_step_goes_on_in_parts_that_the_next_server_takes(chain: Servers, local: LocalStage) -> None:
    x = hidden(chain.files, 5)
    with opened(chain, (0, 1), forwards=True) as session, opened(chain, (2,), fed=True) as last:
        session.streams[1].send(forward(chain.hops[2].address, last.keys[0], max_tensor_bytes=1))
        session.streams[0].send(step(x, 0, rope_length=7))
        with computed(local) as wanted:
            assert torch.equal(tensor_of(last.streams[0].receive(), chain.files), wanted(0, x))


def test_a_sample_begins_with_the_prompt_that_another_one_has_at_every_server(
    chain: Servers, local: LocalStage
) -> None:
    x = hidden(chain.files, 6)
    with opened(chain) as session, opened(chain) as sample, computed(local) as wanted:
        session.ask(step(x[:, :4], 0))
        answer = sample.ask(step(x[:, 4:5], 3, 1, fork_of=session.keys[0]))
        wanted(0, x[:, :4])
        assert torch.equal(tensor_of(answer, chain.files), wanted(3, x[:, 4:5]))
        with opened(chain, (0, 2)) as shorter, opened(chain) as other:
            shorter.ask(step(x[:, :4], 0))
            code, said = other.streams[0].refusal(step(x[:, 4:5], 3, 1, fork_of=shorter.keys[0]))
            assert (code, "no part at the next server" in said) == (FORGOTTEN, True)


@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_step_that_is_dropped_at_any_server_is_answered_in_its_turn(
    chain: Servers, local: LocalStage, at: int
) -> None:
    x = hidden(chain.files, 6)
    with opened(chain) as session, computed(local) as wanted:
        session.ask(step(x[:, :3], 0))
        drop(chain.hops[at], session.keys[at], 2)
        session.streams[0].send(step(x[:, 3:4], 3, 2, uncertain=True), step(x[:, 4:5], 3, 3, truncate=True))
        dropped, then = session.streams[2].receive().result, session.streams[2].receive()
        assert dropped.dropped and dropped.step_id == 2 and not dropped.hidden.data and len(dropped.hops) == 2
        wanted(0, x[:, :3])
        assert torch.equal(tensor_of(then, chain.files), wanted(3, x[:, 4:5]))


def test_only_listed_servers_are_connected_to(chain: Servers) -> None:
    known = chain.refusals(0, "forward")
    for address in ("127.0.0.1:1", chain.hops[0].address, "nonsense", ""):
        with Raw(chain.hops[0].address) as raw:
            raw.ask(opening(chain.files, PLANS[0], forwards=True))
            code, said = raw.refusal(forward(address, b"key"))
        assert (code, said) == (REFUSED, f"this trunk does not forward to {address!r} (server.forward_to)")
    with Raw(chain.hops[2].address) as raw:
        code, said = raw.refusal(opening(chain.files, PLANS[2], forwards=True))
    assert (code, said) == (REFUSED, "this trunk forwards to no other (server.forward_to)")
    assert chain.refusals(0, "forward") - known == 4


def test_a_session_that_the_next_server_does_not_have_ends_with_its_name(chain: Servers) -> None:
    address = chain.hops[1].address
    with opened(chain, (1, 2)) as plain, opened(chain) as other:
        for key in (bytes(16), plain.keys[0], other.keys[0]):
            with Raw(chain.hops[0].address) as raw:
                raw.ask(opening(chain.files, PLANS[0], forwards=True))
                code, said = raw.refusal(forward(address, key))
            expected = "the session to feed does not exist or has ended"
            assert (code, said) == (LOST, f"the next server of the chain, {address}: {expected}")


def test_a_second_feed_is_refused_and_the_first_goes_on(chain: Servers, local: LocalStage) -> None:
    x = hidden(chain.files, 4)
    with opened(chain) as session, Raw(chain.hops[1].address) as thief, Raw(chain.hops[1].address) as old:
        session.ask(step(x[:, :3], 0))
        assert thief.refusal(feed(session.keys[1])) == (REFUSED, "the session to feed has a feed already")
        assert old.refusal(feed(session.keys[1], 1)) == (REFUSED, f"this trunk's protocol is {PROTOCOL}, not 1")
        with computed(local) as wanted:
            wanted(0, x[:, :3])
            assert torch.equal(tensor_of(session.ask(step(x[:, 3:], 3, 2)), chain.files), wanted(3, x[:, 3:]))


def test_the_client_of_a_chain_sends_what_its_place_allows(chain: Servers) -> None:
    one = hidden(chain.files, 1)
    timing = pb.HopTiming(trunk_s=1)
    cases: list[tuple[Mapping[str, bool], Sequence[bytes], str]] = [
        ({"fed": True}, [step(one, 0)], "opened with fed"),
        ({"forwards": True}, [step(one, 0)], "opened with forwards"),
        ({}, [forward(chain.hops[1].address, b"x" * 16)], "one forward"),
        ({}, [feed(b"x" * 16)], "one of kind"),
        ({"forwards": True}, [forward(chain.hops[1].address, b"")], "key: '0 bytes'"),
        ({"forwards": True}, [forward(chain.hops[1].address, bytes(65))], "key: '65 bytes'"),
        ({"forwards": True}, [DONE, step(one, 0)], "none after done"),
        ({}, [step(one, 0, dropped=True)], "neither dropped nor hops"),
        ({}, [step(one, 0, hops=[timing])], "neither dropped nor hops"),
    ]
    for changes, messages, named in cases:
        with Raw(chain.hops[0].address) as raw:
            raw.ask(opening(chain.files, PLANS[0], **changes))
            code, said = raw.refusal(*messages)
        assert (code, named in said) == (INVALID, True), said


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"hops": [pb.HopTiming()] * MAX_HOPS}, "hops: 16"),
        ({"hops": [pb.HopTiming(queue_s=-1)]}, "hops: (0.0, -1.0"),
        ({"hops": [pb.HopTiming(trunk_s=float("nan"))]}, "hops: (0.0, 0.0, nan"),
        ({"dropped": True}, "a dropped step"),
        ({"position": 64}, "position: 64"),
        ({"fork_of": b"x" * 16}, "the session to fork"),
    ],
)
def test_what_a_feed_may_not_send_ends_both_streams_with_the_reason(
    chain: Servers, changes: dict[str, Any], named: str
) -> None:
    with Raw(chain.hops[2].address) as client, Raw(chain.hops[2].address) as feeding:
        key = client.ask(opening(chain.files, PLANS[2], fed=True)).opened.key
        position = changes.pop("position", 0)
        feeding.send(feed(key))
        code, said = feeding.refusal(step(hidden(chain.files, 1), position, **changes))
        assert code in (INVALID, FORGOTTEN)
        assert named in said
        assert client.refusal() == (code, said)


def test_an_error_of_a_later_server_reaches_the_client_on_every_stream(chain: Servers) -> None:
    with opened(chain, (0, 1), forwards=True) as session, opened(chain, (2,), fed=True, max_length=4) as last:
        session.streams[1].send(forward(chain.hops[2].address, last.keys[0]))
        session.streams[0].send(step(hidden(chain.files, 5), 0))
        ends = [stream.refusal() for stream in (*last.streams, *session.streams)]
    why = "position: 0 cannot be used; expected at most 4 tokens in all, the session's max_length."
    assert ends[0] == (INVALID, why)
    assert ends[2] == (REFUSED, f"the next server of the chain, {chain.hops[2].address}: {why}")
    assert ends[1] == (REFUSED, f"the next server of the chain, {chain.hops[1].address}: {ends[2][1]}")


def test_the_link_between_two_servers_breaks(chain: Servers) -> None:
    with opened(chain, proxied=True) as session:
        session.ask(step(hidden(chain.files, 2), 0))
        chain.proxies[1].cut()
        ends = [stream.refusal() for stream in session.streams]
    assert [code for code, _ in ends] == [LOST] * 3
    assert f"the next server of the chain, {chain.proxies[1].address}" in ends[0][1]
    assert all("server before this one in the chain" in said for _, said in ends[1:])
    assert chain.refusals(0, "next_server") and chain.refusals(1, "feed_lost")


@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_client_that_leaves_one_server_frees_its_sessions_at_all(chain: Servers, at: int) -> None:
    with opened(chain) as session:
        session.ask(step(hidden(chain.files, 2), 0))
        session.streams[at].cancel()
        for other in {0, 1, 2} - {at}:
            code, said = session.streams[other].refusal()
            assert (code, "of the chain" in said or "in the chain" in said) == (LOST, True)


def test_a_next_server_that_ended_its_session_in_order_is_named_at_the_next_step(chain: Servers) -> None:
    with opened(chain, (1, 2)) as session:
        session.ask(step(hidden(chain.files, 2), 0))
        session.streams[1].send(DONE)
        session.streams[1].end()
        code, said = session.streams[0].refusal(*[step(hidden(chain.files, 1), at, at) for at in range(2, 60)])
    assert code is LOST
    assert said == f"the next server of the chain, {chain.hops[2].address}, has ended its part of the session"


@given(st.data())
@settings(deadline=None, database=None, max_examples=60, suppress_health_check=list(HealthCheck))
def test_whatever_a_feed_sends_is_answered_or_refused_and_leaves_nothing(servers: Servers, data: st.DataObject) -> None:
    """Also to the session after it, which is forwarded to."""
    aim = target(describe(servers.hops[1].address), FLAGS, 1 << 20)
    messages = data.draw(feeds(aim))
    with opened(servers, (1, 2), fed=True) as session, Raw(servers.hops[1].address) as feeding:
        feeding.send(feed(session.keys[0]), *messages)
        ends = [_end(feeding), *map(_end, session.streams)]
    for code, said in ends:
        assert code is grpc.StatusCode.OK or (code in {*REFUSALS, LOST} and said and not said.startswith(UNCAUGHT))
    assert eventually(servers.free)


def _end(raw: Raw) -> tuple[grpc.StatusCode, str]:
    """How a stream ends that the client closes after it has sent all."""
    try:
        while raw.end().WhichOneof("kind") != "closed":
            pass
    except StopIteration:
        pass
    except grpc.RpcError as error:
        failed: Any = error
        return failed.code(), failed.details()
    return grpc.StatusCode.OK, ""


def test_nobody_waits_for_ever_for_a_feed_or_for_what_it_should_bring(files: ModelFiles) -> None:
    with chained(files, idle_s=1.0) as servers:
        with Raw(servers.hops[1].address) as raw:
            raw.ask(opening(files, PLANS[1], fed=True, timeout_s=0.25))
            code, said = raw.refusal()
            assert (code, said) == (LATE, "the server before this one in the chain sent no feed within 0.25 s")
        with Raw(servers.hops[1].address) as client, Raw(servers.hops[1].address) as feeding:
            key = client.ask(opening(files, PLANS[1], fed=True, forwards=True, timeout_s=0.25)).opened.key
            code, said = feeding.refusal(feed(key), step(hidden(files, 1), 0))
            assert (code, "a forward within 0.25 s" in said) == (INVALID, True)
            assert client.refusal() == (code, said)
        with Raw(servers.hops[1].address) as client, Raw(servers.hops[1].address) as feeding:
            key = client.ask(opening(files, PLANS[1], fed=True)).opened.key
            assert feeding.refusal(feed(key))[0] is LATE
            assert client.refusal()[0] is LOST
        assert eventually(servers.free)


def test_a_feed_needs_a_token_where_a_session_does(
    files: ModelFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = str(written(tmp_path, entry("ann", ANN)))
    monkeypatch.setenv("NEXT", "another-secret")
    with serve_here(files, "trunk:none", {}, layers(PLANS[1]), tokens=tokens) as second:
        forward_to = {"addresses": [second.address], "token": "NEXT"}
        with (
            serve_here(files, "trunk:none", {}, layers(PLANS[0]), forward_to=forward_to) as first,
            Raw(first.address) as raw,
        ):
            raw.ask(opening(files, PLANS[0], forwards=True))
            code, said = raw.refusal(forward(second.address, bytes(16)))
    assert code is REFUSED
    assert said == (
        f"the next server of the chain, {second.address}: a valid token is needed (server.forward_to.token)"
    )

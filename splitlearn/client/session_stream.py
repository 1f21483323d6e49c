"""One session's stream at one trunk server, from Open to end. A lost stream stays lost: client/remote_stage.py opens
another.

The server sends durations, never timestamps, since the two clocks cannot be compared. They divide the client's waiting
time: wire = round trip - the server's durations.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from queue import SimpleQueue
from typing import Any

import grpc
import torch
from google.protobuf.message import DecodeError

from splitlearn.client.served import ServedModel
from splitlearn.errors import InputError, TrunkError, TrunkFailed, TrunkUnavailable
from splitlearn.events import Layers, StageTiming
from splitlearn.kvcache.prefix_store import BLOCK_TOKENS
from splitlearn.models.plan import SplitPlan
from splitlearn.runtime.watchdog import Watchdog
from splitlearn.stages.base import StageOutput
from splitlearn.stages.settings import SessionSettings
from splitlearn.wire import MAX_PREFIX_KEYS, PREFIX_KEY_BYTES, PROTOCOL, codec
from splitlearn.wire import trunk_pb2 as pb
from splitlearn.wire.hidden_states import Rows, converted
from splitlearn.wire.status import error_of
from splitlearn.wire.stub import TrunkStub

CLOSE_TIMEOUT_S = 2.0
# gRPC's own deadline counts for a whole stream, not for a step.
_watchdog = Watchdog(look_s=0.5)


@dataclass(frozen=True)
class Opening:
    """The message that opens a session, and the form of its hidden states. It has the keys of `blocks` kept blocks."""

    message: bytes
    rows: Rows
    blocks: int = 0

    def part(self, plan: SplitPlan, forward_to: Sequence[str], *, fed: bool) -> "Opening":
        """This for the layers of `plan` alone, in a chain that forwards: to one of `forward_to`, the last to none."""
        message = pb.ClientMessage.FromString(self.message)
        own = pb.Open(start=plan.start, end=plan.end, forwards=bool(forward_to), forward_to=forward_to, fed=fed)
        message.open.MergeFrom(own)
        return replace(self, message=message.SerializeToString())


def opening_of(
    served: ServedModel,
    settings: SessionSettings,
    max_length: int,
    timeout_s: float,
    keys: Sequence[bytes] = (),
    batch: bool = False,
) -> Opening:
    """The opening of a session at a trunk that serves `served`. `timeout_s`: how long the trunk may let the client
    wait, for admission and then for each step. `keys`: of the prompt's leading blocks, which it may have kept. `batch`:
    other sessions come first."""
    keys = keys[:MAX_PREFIX_KEYS]
    opening = pb.Open(
        protocol=PROTOCOL,
        model=served.model,
        digest=served.digest,
        start=served.plan.start,
        end=served.plan.end,
        n_layers=served.plan.n_layers,
        dtype=served.dtype,
        max_length=max_length,
        flags=sorted(settings.words),
        timeout_s=timeout_s,
        prefix_keys=b"".join(keys),
        batch=batch,
    )
    rows = settings.rows(codec.DTYPES[served.dtype])
    return Opening(pb.ClientMessage(open=opening).SerializeToString(), rows, len(keys))


@dataclass(frozen=True)
class SentStep:
    """A step that was sent. `data`: its rows. `answered`: how many positions the answer has. `encode_s`, `hand_over_s`:
    seconds of encoding and of passing it to gRPC, which began `at`. `size`: bytes passed to gRPC."""

    step_id: int
    data: bytes
    answered: int
    encode_s: float
    hand_over_s: float
    at: float
    size: int

    def timing(
        self, server: pb.StepResult, received: float, size: int, since: float | None, chain: Sequence[Layers] = ()
    ) -> StageTiming:
        """The timing of an answer of `size` bytes, which arrived at `received` and is decoded now. `chain` has the
        layers of each server, if there are several.

        With `since` None the client only waited, and the costs of sending count here. Otherwise the client worked until
        `since`: the share of the server's time that passed before counts as overlapped.
        """
        waited = received - (self.at if since is None else since)
        encode_s, bytes_up = (self.encode_s, self.size) if since is None else (0.0, 0)
        servers: list[pb.StepResult | pb.HopTiming] = [*server.hops, server]
        spent = sum(each.decode_s + each.queue_s + each.trunk_s + each.encode_s for each in servers)
        share = min(1.0, waited / spent) if spent else 1.0
        ledger = {
            "encode": encode_s + share * sum(each.encode_s for each in servers),
            "wire": max(0.0, waited - spent),
            "queue": share * sum(each.queue_s for each in servers),
            "trunk": share * sum(each.trunk_s for each in servers),
            "decode": time.perf_counter() - received + share * sum(each.decode_s for each in servers),
        }
        compile_s = sum(each.compile_s for each in servers)
        hops = {layers: _parts(each, share) for layers, each in zip(chain, servers, strict=bool(chain))}
        return StageTiming(ledger, compile_s, bytes_up, size, overlapped_s=(1 - share) * spent, hops=hops)


def _parts(server: pb.StepResult | pb.HopTiming, share: float) -> dict[str, float]:
    """This `share` of what a server of a chain took."""
    return {
        "encode": share * server.encode_s,
        "queue": share * server.queue_s,
        "trunk": share * server.trunk_s,
        "decode": share * server.decode_s,
    }


class Stream:
    """A session at the trunk at `address`, alone on `channel`. Methods raise TrunkError, and TrunkUnavailable if the
    trunk is lost."""

    def __init__(self, channel: grpc.Channel, address: str, served: ServedModel, opening: Opening) -> None:
        self.channel = channel
        self.address = address
        self._served, self._opening, self._rows, self._blocks = served, opening.message, opening.rows, opening.blocks
        self._dtype = codec.DTYPES[served.dtype]
        self._read = self._rows.reader(served.hidden_size)
        self._outgoing: SimpleQueue[bytes | None] = SimpleQueue()
        self.key, self.cached_tokens = b"", 0
        self.chain: Sequence[Layers] = ()
        """Of the last server of a chain whose servers forward: the layers of each."""
        self._interrupted = False
        self._steps = 0
        self._part_bytes = 0
        self._deadline = float("inf")
        self._over = False
        stub = TrunkStub(channel)
        self._call = stub.session(iter(self._outgoing.get, None))
        self._drop = stub.drop
        self._dropping: grpc.Future[bytes] | None = None
        self._unwanted = 0
        _watchdog.watch(self)

    def open(self, wait_s: float) -> pb.Opened:
        self._outgoing.put(self._opening)
        opened = self._parse(self._receive(wait_s), "opened").opened
        blocks, rest = divmod(opened.cached_tokens, BLOCK_TOKENS)
        if rest or blocks > self._blocks:
            raise TrunkFailed(f"The trunk has {opened.cached_tokens} tokens of {self._blocks} blocks.")
        self._part_bytes, self.key, self.cached_tokens = opened.max_tensor_bytes, opened.key, opened.cached_tokens
        return opened

    @property
    def part(self) -> int:
        """Which server of a chain was lost: here there is one."""
        return 0

    def address_of(self, part: int) -> str:
        """The address of that server."""
        return self.address

    def step(self, position: int, x: torch.Tensor, wait_s: float) -> StageOutput:
        """Send `x` [1, T, H], in parts if it is long, and wait at most `wait_s` for each part of the answer."""
        return self.answer(self.send(position, x), wait_s)

    def send(
        self,
        position: int,
        x: torch.Tensor,
        *,
        truncate: bool = False,
        answer_last: int = 0,
        fork_of: bytes = b"",
        uncertain: bool = False,
        rope_length: int = 0,
    ) -> SentStep:
        """Send a step: the first half of `step`. The answer has the last `answer_last` of the T positions, 0 for all.
        `fork_of` is the key of the session that has the positions before `position`. Only an `uncertain` step can be
        dropped. `rope_length` is that of `StageInput`."""
        started = time.perf_counter()
        data, self._steps = self._rows.to_bytes(x), self._steps + 1
        each = {"sequence_id": 1, "step_id": self._steps, "answer_last": answer_last}
        each |= {"uncertain": uncertain, "rope_length": rope_length}
        first: dict[str, object] = {"truncate": truncate, "fork_of": fork_of}
        parts = codec.in_parts(data, self._rows, self._served.hidden_size, position, self._part_bytes)
        messages = [  # from dictionaries: an inner message would be copied, which takes twice as long
            pb.ClientMessage(step={**part, **each, **({} if at else first)}).SerializeToString()
            for at, part in enumerate(parts)
        ]
        encoded = time.perf_counter()
        for message in messages:
            self._outgoing.put(message)
        time.sleep(0)  # releases the interpreter lock, so that gRPC's thread sends now: 0.07 ms earlier at the trunk
        answered, handed_over_s = answer_last or x.shape[1], time.perf_counter() - encoded
        return SentStep(self._steps, data, answered, encoded - started, handed_over_s, encoded, sum(map(len, messages)))

    def answer(self, sent: SentStep, wait_s: float, since: float | None = None) -> StageOutput:
        """Wait for the answer to `sent`: the second half of `step`. Call it in the order of sending. `since` is that of
        `SentStep.timing`."""
        replies, results = list[bytes](), list[pb.StepResult]()
        while not results or results[-1].more:
            replies.append(self._receive(wait_s))
            received = time.perf_counter()
            results.append(self._parse(replies[-1], "result").result)
            if results[-1].step_id != sent.step_id:
                raise TrunkFailed(f"The trunk answered step {results[-1].step_id} instead of step {sent.step_id}.")
        if len(results[-1].hops) != max(0, len(self.chain) - 1):
            raise TrunkFailed(f"The trunk server at {self.address} sent durations of {len(results[-1].hops)} others.")
        out = self._decode(results, 0 if results[0].dropped and sent.step_id <= self._unwanted else sent.answered)
        return StageOutput(out, sent.timing(results[-1], received, sum(map(len, replies)), since, self.chain))

    def keep(self, keys: Sequence[bytes]) -> None:
        """Ask the trunk to keep what the session has of the blocks with these `keys`. It must be the last message."""
        most = min(MAX_PREFIX_KEYS, max(1, self._part_bytes // PREFIX_KEY_BYTES))
        keep = pb.Keep(prefix_keys=b"".join(keys[:most]))
        self._outgoing.put(pb.ClientMessage(keep=keep).SerializeToString())

    def forward(self, to: "Stream") -> None:
        """Let this trunk send its answers to the session of `to`, at the next server of a chain."""
        forward = pb.Forward(address=to.address, key=to.key, max_tensor_bytes=to._part_bytes)  # noqa: SLF001
        self._outgoing.put(pb.ClientMessage(forward=forward).SerializeToString())

    def say_done(self) -> None:
        """Say that no more steps come, before `close`. A session in a chain that forwards needs that."""
        self._outgoing.put(pb.ClientMessage(done=pb.Done()).SerializeToString())

    def when_over(self, act: Callable[[], None]) -> None:
        """Call `act` in a thread of gRPC once the stream has ended."""
        call: Any = self._call
        call.add_done_callback(lambda _: act())

    def interrupt(self) -> None:
        """End the stream, so that the thread that waits for an answer gets an error."""
        self._interrupted = True
        self._call.cancel()

    def failure(self) -> tuple[TrunkError, str] | None:
        """The error that the far end has ended the stream with, and its own words for it; None if it has not."""
        call: Any = self._call
        if self._interrupted or call.is_active() or call.code() is grpc.StatusCode.OK:
            return None
        return error_of(call, self.address), call.details() or ""

    def drop_step(self, sent: SentStep) -> None:
        """Drop `sent` at the trunk. Its answer has no positions, unless it was computed already."""
        self._unwanted = sent.step_id
        request = pb.DropRequest(key=self.key, step_id=sent.step_id).SerializeToString()
        self._dropping = self._drop.future(request, timeout=CLOSE_TIMEOUT_S)  # ends when nothing refers to it

    def close(self) -> int | None:
        """End the stream in order, so that the trunk frees the session. Returns the trunk's peak memory in bytes, and
        the channel can be used again. Returns None if the stream is over or breaks; then the channel is closed."""
        if self._over:
            return None
        self._deadline = time.monotonic() + CLOSE_TIMEOUT_S
        self._outgoing.put(None)
        try:
            replies = (self._parse(reply, "result", "closed") for reply in self._call)
            # A result answers a step that the client does not wait for any more.
            closed = next(reply.closed for reply in replies if reply.WhichOneof("kind") == "closed")
            peak_rss_bytes = closed.peak_rss_bytes
        except (grpc.RpcError, StopIteration, TrunkFailed):
            # The session is over either way, and the cause was raised where it was noticed.
            self.drop()
            return None
        self._end()
        self._call.cancel()
        return peak_rss_bytes

    def leave(self) -> None:
        """End the stream after a refusal. Its channel can be used again."""
        self._end()
        self._outgoing.put(None)

    def drop(self) -> None:
        """Cancel the stream and close its channel, without waiting."""
        self._end()
        self._outgoing.put(None)
        self._call.cancel()
        self.channel.close()

    def due_s(self) -> float:
        return self._deadline

    def overdue(self) -> None:
        self._call.cancel()

    def _end(self) -> None:
        self._over = True
        _watchdog.drop(self)

    def _receive(self, wait_s: float) -> bytes:
        self._deadline = time.monotonic() + wait_s
        try:
            reply: bytes = next(self._call)
        except StopIteration:
            raise TrunkUnavailable(f"The trunk server at {self.address} ended the session.") from None
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.CANCELLED and time.monotonic() > self._deadline:
                late = f"The trunk server at {self.address} did not answer within {round(wait_s, 1):g} s."
                raise TrunkUnavailable(f"{late} Raise trunk.timeout_s if it needs longer.") from error
            raise error_of(error, self.address) from error
        self._deadline = float("inf")
        return reply

    def _parse(self, reply: bytes, *kinds: str) -> pb.ServerMessage:
        """Parse a reply. Raises TrunkFailed unless it is of one of `kinds`."""
        try:
            message = pb.ServerMessage.FromString(reply)
        except DecodeError as error:
            raise TrunkFailed(f"The trunk server at {self.address} sent a malformed answer: {error}") from error
        if message.WhichOneof("kind") not in kinds:
            raise TrunkFailed(f"The trunk server at {self.address} sent another answer than {kinds[-1]!r}.")
        return message

    def _decode(self, results: Sequence[pb.StepResult], answered: int) -> torch.Tensor:
        """The answer [1, `answered`, H], in the trunk's dtype."""
        hidden_size = self._served.hidden_size
        try:
            tokens = sum(codec.check(result.hidden, self._rows, hidden_size) for result in results) if answered else 0
        except InputError as error:
            raise TrunkFailed(
                f"The trunk server at {self.address} sent an answer that does not fit: {error}"
            ) from error
        if tokens != answered:
            raise TrunkFailed(f"The trunk answered {tokens} positions instead of {answered}.")
        if not answered:
            return torch.empty(1, 0, hidden_size, dtype=self._dtype)
        data = b"".join(result.hidden.data for result in results)
        x = converted(self._read(data), self._dtype)
        if (found := codec.where_not_finite(x)) is not None:
            plan, (row, value) = self._served.plan, found
            layers = f"its layers [{plan.start}, {plan.end})"
            raise TrunkFailed(f"The trunk server at {self.address} sent {value} in row {row} of an answer of {layers}.")
        return x

"""One session's stream at one trunk server, from Open to end. A lost stream stays lost: client/remote_stage.py opens
another.

The client splits its waiting time with the durations that the server ships (never timestamps: the two clocks are not
compared): wire = round trip - what the server says it spent.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from queue import SimpleQueue

import grpc
import torch
from google.protobuf.message import DecodeError

from splitlearn.client.served import Served
from splitlearn.errors import InputError, TrunkFailed, TrunkUnavailable
from splitlearn.events import StageTiming
from splitlearn.runtime.watchdog import Watchdog
from splitlearn.stages.base import StageOutput
from splitlearn.stages.settings import SessionSettings
from splitlearn.wire import PROTOCOL, codec
from splitlearn.wire import trunk_pb2 as pb
from splitlearn.wire.hidden_states import Rows, converted
from splitlearn.wire.status import error_of
from splitlearn.wire.stub import TrunkStub

CLOSE_TIMEOUT_S = 2.0
# gRPC's own deadline counts for a whole stream, not for a step.
_watchdog = Watchdog(look_s=0.5)


@dataclass(frozen=True)
class Opening:
    """The message that opens a session, and the form that hidden states then have."""

    message: bytes
    rows: Rows


def opening_of(served: Served, settings: SessionSettings, max_length: int, timeout_s: float) -> Opening:
    """What opens a session at a trunk that serves what is wanted. `timeout_s` is what the trunk is told that its client
    waits: for a place, and then for each step."""
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
    )
    rows = settings.rows(codec.DTYPES[served.dtype])
    return Opening(pb.ClientMessage(open=opening).SerializeToString(), rows)


@dataclass(frozen=True)
class Sent:
    """A step on its way: the rows sent, how many positions will be answered, seconds that encoding took and then
    handing over to gRPC, when the latter began, and the bytes handed over."""

    step_id: int
    data: bytes
    wanted: int
    encode_s: float
    hand_over_s: float
    at: float
    size: int

    def timing(self, server: pb.StepResult, received: float, size: int, since: float | None) -> StageTiming:
        """Of an answer of `size` bytes that was there at `received` and is decoded now.

        None as `since`: the client only waited for it, and what sending took is counted here. Otherwise it worked until
        `since`. Of what the server spent, the share that went by meanwhile counts as overlapped.
        """
        waited = received - (self.at if since is None else since)
        encode_s, bytes_up = (self.encode_s, self.size) if since is None else (0.0, 0)
        spent = server.decode_s + server.queue_s + server.trunk_s + server.encode_s
        share = min(1.0, waited / spent) if spent else 1.0
        ledger = {
            "encode": encode_s + share * server.encode_s,
            "wire": max(0.0, waited - spent),
            "queue": share * server.queue_s,
            "trunk": share * server.trunk_s,
            "decode": time.perf_counter() - received + share * server.decode_s,
        }
        return StageTiming(ledger, server.compile_s, bytes_up, size, overlapped_s=(1 - share) * spent)


class Stream:
    """A session at the trunk at `address`, alone on `channel`. Raises TrunkError throughout, TrunkUnavailable when the
    trunk is lost."""

    def __init__(self, channel: grpc.Channel, address: str, served: Served, opening: Opening) -> None:
        self.channel = channel
        self.address = address
        self._served, self._opening, self._rows = served, opening.message, opening.rows
        self._dtype = codec.DTYPES[served.dtype]
        self._read = self._rows.reader(served.hidden_size)
        self._outgoing: SimpleQueue[bytes | None] = SimpleQueue()
        self.key = b""
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
        self._part_bytes, self.key = opened.max_tensor_bytes, opened.key
        return opened

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
    ) -> Sent:
        """The first half of `step`. The answer has the last `answer_last` of the T positions, 0 for all of them.
        `fork_of` is the key of the stream whose session has the positions before `position`; only an `uncertain`
        step can be dropped; `rope_length` is that of `StageInput`."""
        started = time.perf_counter()
        data, self._steps = self._rows.to_bytes(x), self._steps + 1
        each = {"sequence_id": 1, "step_id": self._steps, "answer_last": answer_last}
        each |= {"uncertain": uncertain, "rope_length": rope_length}
        first: dict[str, object] = {"truncate": truncate, "fork_of": fork_of}
        parts = codec.in_parts(data, self._rows, self._served.hidden_size, position, self._part_bytes)
        messages = [  # of dictionaries: a message of its own would be copied into the other, in twice the time
            pb.ClientMessage(step={**part, **each, **({} if at else first)}).SerializeToString()
            for at, part in enumerate(parts)
        ]
        encoded = time.perf_counter()
        for message in messages:
            self._outgoing.put(message)
        time.sleep(0)  # lets go of the interpreter, so that gRPC's thread sends now: 0.07 ms earlier at the trunk
        wanted, handed_over_s = answer_last or x.shape[1], time.perf_counter() - encoded
        return Sent(self._steps, data, wanted, encoded - started, handed_over_s, encoded, sum(map(len, messages)))

    def answer(self, sent: Sent, wait_s: float, since: float | None = None) -> StageOutput:
        """The second half of `step`: the answer to what was sent. Steps must be asked for in the order of sending.
        `since` is that of `Sent.timing`."""
        replies, results = list[bytes](), list[pb.StepResult]()
        while not results or results[-1].more:
            replies.append(self._receive(wait_s))
            received = time.perf_counter()
            results.append(self._parse(replies[-1], "result").result)
            if results[-1].step_id != sent.step_id:
                raise TrunkFailed(f"The trunk answered step {results[-1].step_id} instead of step {sent.step_id}.")
        out = self._decode(results, 0 if results[0].dropped and sent.step_id <= self._unwanted else sent.wanted)
        return StageOutput(out, sent.timing(results[-1], received, sum(map(len, replies)), since))

    def drop_step(self, sent: Sent) -> None:
        """Cancel `sent` at the trunk: its answer has no positions, unless it was computed before."""
        self._unwanted = sent.step_id
        request = pb.DropRequest(key=self.key, step_id=sent.step_id).SerializeToString()
        self._dropping = self._drop.future(request, timeout=CLOSE_TIMEOUT_S)  # ends when nothing refers to it

    def close(self) -> int | None:
        """End the stream in order, so that the trunk frees the session: the trunk's peak memory in bytes, and the
        channel can be used again. None when the stream was over before, or broke; then the channel is closed."""
        if self._over:
            return None
        self._deadline = time.monotonic() + CLOSE_TIMEOUT_S
        self._outgoing.put(None)
        try:
            replies = (self._parse(reply, "result", "closed") for reply in self._call)
            # A result is the answer to a step for which nobody waits any more.
            closed = next(reply.closed for reply in replies if reply.WhichOneof("kind") == "closed")
            peak_rss_bytes = closed.peak_rss_bytes
        except (grpc.RpcError, StopIteration, TrunkFailed):
            # The session is over either way, and why it broke has been raised where it was noticed.
            self.drop()
            return None
        self._end()
        self._call.cancel()
        return peak_rss_bytes

    def leave(self) -> None:
        """After a refusal: the stream is over, and its channel can be used again."""
        self._end()
        self._outgoing.put(None)

    def drop(self) -> None:
        """Break off, and close the channel: nothing of a stream that was lost is waited for."""
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
        """A reply, which must be of one of `kinds`."""
        try:
            message = pb.ServerMessage.FromString(reply)
        except DecodeError as error:
            raise TrunkFailed(f"The trunk server at {self.address} sent what is no answer: {error}") from error
        if message.WhichOneof("kind") not in kinds:
            raise TrunkFailed(f"The trunk server at {self.address} sent another answer than {kinds[-1]!r}.")
        return message

    def _decode(self, results: Sequence[pb.StepResult], wanted: int) -> torch.Tensor:
        """The answer [1, `wanted`, H], in the dtype that the trunk computed it in."""
        hidden_size = self._served.hidden_size
        try:
            tokens = sum(codec.check(result.hidden, self._rows, hidden_size) for result in results) if wanted else 0
        except InputError as error:
            raise TrunkFailed(f"The trunk server at {self.address} answered what does not fit: {error}") from error
        if tokens != wanted:
            raise TrunkFailed(f"The trunk answered {tokens} positions instead of {wanted}.")
        if not wanted:
            return torch.empty(1, 0, hidden_size, dtype=self._dtype)
        data = b"".join(result.hidden.data for result in results)
        x = converted(self._read(data), self._dtype)
        if (found := codec.where_not_finite(x)) is not None:
            plan, (row, value) = self._served.plan, found
            layers = f"its layers [{plan.start}, {plan.end})"
            raise TrunkFailed(f"The trunk server at {self.address} sent {value} in row {row} of an answer of {layers}.")
        return x

"""A stage at the far end of a gRPC stream: the trunk server's layers, seen from the client.

A session is one stream. What the client waits for the trunk is taken apart with the durations that the server ships
(never timestamps: the two clocks are not compared): wire = round trip - what the server says it spent.
"""

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from queue import SimpleQueue
from typing import TYPE_CHECKING

import grpc
import torch
from google.protobuf.message import DecodeError

from splitlearn.errors import InputError, TrunkFailed, TrunkRefused, TrunkUnavailable
from splitlearn.events import StageTiming
from splitlearn.split import SplitPlan
from splitlearn.stages import StageInput, StageOutput
from splitlearn.wire import PROTOCOL, SERVICE, codec
from splitlearn.wire import trunk_pb2 as pb
from splitlearn.wire.status import error_of

CLOSE_TIMEOUT_S = 2.0
# gRPC's own wait before it looks again for a trunk that was lost grows to two minutes, long after it was restarted.
_CHANNEL_OPTIONS = (
    ("grpc.enable_http_proxy", 0),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 1000),
)


@dataclass(frozen=True)
class Served:
    """What a trunk must serve to be of use: a model by name and digest, the layers of a plan, a dtype."""

    model: str
    digest: str
    plan: SplitPlan
    dtype: torch.dtype
    hidden_size: int


@dataclass(frozen=True)
class TrunkFacts:
    """What a trunk said of the engine process that serves a session."""

    threads: int = 0
    load_s: float = 0.0
    import_rss_bytes: int = 0
    peak_rss_bytes: int = 0


if TYPE_CHECKING:  # grpc's classes are generic for the type checker only
    Method = grpc.StreamStreamMultiCallable[bytes, bytes]


class RemoteStage:
    """The trunk at `address`. `facts` holds what it last said of itself. Raises TrunkError throughout."""

    def __init__(self, address: str, served: Served, timeout_s: float) -> None:
        self.address = address
        self.served = served
        self.facts = TrunkFacts()
        self._timeout_s = timeout_s
        self._channel = grpc.insecure_channel(address, options=_CHANNEL_OPTIONS)
        method: Method = self._channel.stream_stream(f"/{SERVICE}/Session")
        self._method = method

    def open(self, applied: frozenset[str], max_length: int) -> "RemoteSession":
        """Open a session with the trunk's flags; refused unless the trunk serves exactly what is asked for."""
        session = RemoteSession(self, self._method, self._timeout_s, recomputes="use_cache" not in applied)
        plan = self.served.plan
        opening = pb.Open(
            protocol=PROTOCOL,
            model=self.served.model,
            digest=self.served.digest,
            start=plan.start,
            end=plan.end,
            n_layers=plan.n_layers,
            dtype=str(self.served.dtype).removeprefix("torch."),
            max_length=max_length,
            flags=sorted(applied),
        )
        try:
            opened = session.open(pb.ClientMessage(open=opening).SerializeToString())
        except BaseException:
            session.close()
            raise
        self.facts = TrunkFacts(opened.threads, opened.load_s, opened.import_rss_bytes, self.facts.peak_rss_bytes)
        return session

    def step(self, batch: Sequence[StageInput]) -> list[StageOutput]:
        """One step of each session, in order: hidden state [1, T, H] to hidden state [1, T, H], on the CPU."""
        return [item.session.step(item.position, item.x) for item in batch]

    def close(self) -> None:
        """Close the channel and with it every session."""
        self._channel.close()

    def note_peak(self, peak_rss_bytes: int) -> None:
        """Keep what a session heard last."""
        self.facts = replace(self.facts, peak_rss_bytes=peak_rss_bytes)


class RemoteSession:
    """One generation's stay at a trunk: a stream, and the number of the step it is at."""

    def __init__(self, stage: RemoteStage, method: "Method", timeout_s: float, recomputes: bool) -> None:
        self.recomputes = recomputes
        self._stage = stage
        self._timeout_s = timeout_s
        self._outgoing: SimpleQueue[bytes | None] = SimpleQueue()
        self._steps = 0
        self._length = 0
        self._deadline = time.monotonic() + timeout_s
        self._closed = threading.Event()
        self._call = method(iter(self._outgoing.get, None))
        threading.Thread(target=self._watch, daemon=True).start()

    def open(self, message: bytes) -> pb.Opened:
        """Send the opening message and wait for its reply."""
        self._outgoing.put(message)
        return self._parse(self._receive(), "opened").opened

    def step(self, position: int, x: torch.Tensor) -> StageOutput:
        """Send `x` [1, T, H], in parts if it is long, and wait for the trunk's answer to all of it."""
        started = time.perf_counter()
        messages = self._encode(position, x)
        encoded = time.perf_counter()
        for message in messages:
            self._outgoing.put(message)
        replies = [self._receive()]
        received = time.perf_counter()
        results = [self._result(replies[0])]
        while results[-1].more:
            replies.append(self._receive())
            received = time.perf_counter()
            results.append(self._result(replies[-1]))
        out = self._decode(results, x)
        self._length = position + x.shape[1]
        server = results[-1]
        spent = server.decode_s + server.queue_s + server.trunk_s + server.encode_s
        ledger = {
            "encode": encoded - started + server.encode_s,
            "wire": received - encoded - spent,
            "queue": server.queue_s,
            "trunk": server.trunk_s,
            "decode": time.perf_counter() - received + server.decode_s,
        }
        sizes = sum(map(len, messages)), sum(map(len, replies))
        return StageOutput(out, StageTiming(ledger, server.compile_s, *sizes))

    def close(self) -> None:
        """End the stream, so that the trunk frees the session; learn the trunk's peak memory if it still answers."""
        if self._closed.is_set():
            return
        self._deadline = time.monotonic() + CLOSE_TIMEOUT_S
        self._outgoing.put(None)
        try:
            self._stage.note_peak(self._parse(next(self._call), "closed").closed.peak_rss_bytes)
        except (grpc.RpcError, StopIteration, TrunkFailed):
            # The session is over either way, and why it broke has been raised where it was noticed.
            pass
        finally:
            self._closed.set()
            self._call.cancel()

    def _encode(self, position: int, x: torch.Tensor) -> list[bytes]:
        self._steps += 1
        parts = list(codec.parts(x))
        messages: list[bytes] = []
        for part in parts:
            step = pb.Step(
                sequence_id=1,
                step_id=self._steps,
                position=position,
                hidden=codec.encode(part),
                more=part is not parts[-1],
                roll_back=not messages and not self.recomputes and position < self._length,
            )
            messages.append(pb.ClientMessage(step=step).SerializeToString())
            position += part.shape[1]
        return messages

    def _receive(self) -> bytes:
        self._deadline = time.monotonic() + self._timeout_s
        try:
            reply: bytes = next(self._call)
        except StopIteration:
            raise TrunkUnavailable(f"The trunk server at {self._stage.address} ended the session.") from None
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.CANCELLED and time.monotonic() > self._deadline:
                late = f"The trunk server at {self._stage.address} did not answer within {self._timeout_s:g} s."
                raise TrunkUnavailable(f"{late} Raise trunk.timeout_s if it needs longer.") from error
            raise error_of(error, self._stage.address) from error
        self._deadline = float("inf")
        return reply

    def _parse(self, reply: bytes, kind: str) -> pb.ServerMessage:
        """A reply, which must be of `kind`."""
        try:
            message = pb.ServerMessage.FromString(reply)
        except DecodeError as error:
            raise TrunkFailed(f"The trunk server at {self._stage.address} sent what is no answer: {error}") from error
        if message.WhichOneof("kind") != kind:
            raise TrunkFailed(f"The trunk server at {self._stage.address} sent another answer than {kind!r}.")
        return message

    def _result(self, reply: bytes) -> pb.StepResult:
        result = self._parse(reply, "result").result
        if result.step_id != self._steps:
            raise TrunkFailed(f"The trunk answered step {result.step_id} instead of step {self._steps}.")
        return result

    def _decode(self, results: Sequence[pb.StepResult], x: torch.Tensor) -> torch.Tensor:
        served = self._stage.served
        try:
            tokens = sum(codec.check(result.hidden, served.dtype, served.hidden_size) for result in results)
        except InputError as error:
            raise TrunkFailed(
                f"The trunk server at {self._stage.address} answered what does not fit: {error}"
            ) from error
        if tokens != x.shape[1]:
            raise TrunkFailed(f"The trunk answered {tokens} positions instead of {x.shape[1]}.")
        return codec.from_bytes(b"".join(result.hidden.data for result in results), served.dtype, served.hidden_size)

    def _watch(self) -> None:
        """Cancel the call when a reply is overdue: gRPC's own deadline counts for a whole stream, not for a step."""
        while not self._closed.wait(0.5):
            if time.monotonic() > self._deadline:
                self._call.cancel()


def describe(address: str, timeout_s: float = 10.0) -> pb.Description:
    """What the trunk at `address` serves. Raises TrunkUnavailable when nobody answers there."""
    with grpc.insecure_channel(address, options=_CHANNEL_OPTIONS) as channel:
        method = channel.unary_unary(
            f"/{SERVICE}/Describe",
            request_serializer=pb.DescribeRequest.SerializeToString,
            response_deserializer=pb.Description.FromString,
        )
        try:
            description: pb.Description = method(pb.DescribeRequest(), timeout=timeout_s)
        except grpc.RpcError as error:
            raise error_of(error, address) from error
    return description


def check_served(description: pb.Description, served: Served, address: str) -> None:
    """Raise TrunkRefused that names each thing in which the trunk differs from what is wanted."""
    plan, wanted_dtype = served.plan, str(served.dtype).removeprefix("torch.")
    differing = [
        f"{what}: it serves {theirs}, this client has {ours}"
        for what, theirs, ours in (
            ("protocol", description.protocol, PROTOCOL),
            ("model", description.model, served.model),
            ("weights digest", description.digest[:12], served.digest[:12]),
            ("layers", f"[{description.start}, {description.end})", f"[{plan.start}, {plan.end})"),
            ("dtype", description.dtype, wanted_dtype),
        )
        if theirs != ours
    ]
    if differing:
        raise TrunkRefused(f"The trunk server at {address} cannot be used. {'; '.join(differing)}.")

"""The gRPC face of the trunk: checks what comes in, hands steps to an engine, says clearly what it refuses."""

import itertools
import logging
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

import grpc
import torch
import transformers
from google.protobuf.message import DecodeError

from server.engine import Engine, EnginePool, EngineStep
from splitlearn.errors import InputError, SplitlearnError, TrunkFull, TrunkRefused
from splitlearn.flags import FLAGS, Place
from splitlearn.selection import applied_of, chosen_in, why_not
from splitlearn.split import SplitPlan
from splitlearn.store import ModelFiles
from splitlearn.wire import MAX_TENSOR_BYTES, PROTOCOL, SERVICE, codec
from splitlearn.wire import trunk_pb2 as pb
from splitlearn.wire.status import code_of, shorten

log = logging.getLogger(__name__)
OPEN_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class Served:
    """What this server serves, and to how many at once."""

    files: ModelFiles
    plan: SplitPlan
    dtype: torch.dtype
    device: torch.device
    threads: int
    max_sessions: int


class TrunkService:
    """Describe and Session. `sessions` is the number of sessions that are open now."""

    def __init__(self, served: Served, engines: EnginePool) -> None:
        self._served = served
        self._engines = engines
        self._place = Place(device=str(served.device))
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()
        self.sessions = 0

    def handler(self) -> grpc.GenericRpcHandler:
        """Both methods. Session takes raw bytes, so that reading and writing them can be timed here."""
        describe = grpc.unary_unary_rpc_method_handler(
            self.describe, pb.DescribeRequest.FromString, pb.Description.SerializeToString
        )
        session: grpc.RpcMethodHandler[bytes, bytes] = grpc.stream_stream_rpc_method_handler(self.session)
        return grpc.method_handlers_generic_handler(SERVICE, {"Describe": describe, "Session": session})

    def describe(self, request: pb.DescribeRequest, context: grpc.ServicerContext) -> pb.Description:
        """What is served here, and which flags can be applied."""
        served, facts = self._served, self._served.files.facts
        return pb.Description(
            protocol=PROTOCOL,
            model=served.files.name,
            digest=served.files.digest,
            start=served.plan.start,
            end=served.plan.end,
            n_layers=served.plan.n_layers,
            dtype=_name(served.dtype),
            device=str(served.device),
            hidden_size=facts.hidden_size,
            max_length=facts.context_length or 0,
            threads=served.threads,
            flags=[pb.FlagState(name=name, unavailable=why_not(name, "trunk", self._place) or "") for name in FLAGS],
            versions=f"torch {torch.__version__}, transformers {transformers.__version__}",
        )

    def session(self, requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        """One session, from Open to the end of the stream; whatever ends it, its memory is freed."""
        try:
            yield from self._session(requests, context)
        except SplitlearnError as error:
            context.abort(code_of(error), shorten(str(error)))
        except grpc.RpcError:
            log.info("a session's client went away")

    def _session(self, requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        # Each stream holds a thread: one that never opens a session must not keep it.
        timer = threading.Timer(OPEN_TIMEOUT_S, context.cancel)
        timer.start()
        try:
            first = next(requests, None)
        finally:
            timer.cancel()
        if first is None:
            return
        opening = _parse(first, "open").open
        self._check(opening)
        stay = self._admit(opening)
        # The stream can end while this generator waits at a yield: then only the callback runs in time. It runs on
        # gRPC's one event thread, which must not wait for an engine.
        if not context.add_callback(threading.Thread(target=stay.close, daemon=True).start):
            stay.close()
            return
        try:
            facts = stay.engine.facts
            opened = pb.Opened(threads=facts.threads, load_s=facts.load_s, import_rss_bytes=facts.import_rss_bytes)
            yield pb.ServerMessage(opened=opened).SerializeToString()
            for raw in requests:
                yield from stay.feed(raw)
            peak = stay.engine.call("peak")
            yield pb.ServerMessage(closed=pb.Closed(peak_rss_bytes=peak)).SerializeToString()
        finally:
            stay.close()

    def _check(self, opening: pb.Open) -> None:
        """Refuse what does not match what is served, naming all that differs."""
        served, plan = self._served, self._served.plan
        differing = [
            f"{what} is {ours}, not {theirs!r}"
            for what, theirs, ours in (
                ("protocol", opening.protocol, PROTOCOL),
                ("model", opening.model, served.files.name),
                ("digest", opening.digest, served.files.digest),
                ("layer range", (opening.start, opening.end, opening.n_layers), (plan.start, plan.end, plan.n_layers)),
                ("dtype", opening.dtype, _name(served.dtype)),
            )
            if theirs != ours
        ]
        if differing:
            raise TrunkRefused(f"this trunk serves something else: {'; '.join(differing)}")
        limit = served.files.facts.context_length
        if opening.max_length < 1 or (limit is not None and opening.max_length > limit):
            raise InputError("max_length", opening.max_length, f"1 to {limit or 'any number of'} tokens")

    def _applied(self, opening: pb.Open) -> frozenset[str]:
        """The flags of a session, in the words by which engines are kept. Refuses what cannot be applied here."""
        chosen = chosen_in(opening.flags)
        for name in chosen:
            reason = why_not(name, "trunk", self._place)
            if reason:
                raise TrunkRefused(f"flag {name} is unavailable at this trunk: {reason}")
        return applied_of(chosen)

    def _admit(self, opening: pb.Open) -> "_Stay":
        applied = self._applied(opening)
        with self._lock:
            if self.sessions >= self._served.max_sessions:
                raise TrunkFull(
                    f"all {self._served.max_sessions} sessions (server.max_sessions) are taken; try again later"
                )
            self.sessions += 1
        try:
            return _Stay(self, self._served, self._engines, applied, opening.max_length, next(self._numbers))
        except BaseException:
            self.leave()
            raise

    def leave(self) -> None:
        """One session less."""
        with self._lock:
            self.sessions -= 1


class _Stay:
    """One session at its engine, and the parts of a long step that have come so far."""

    def __init__(
        self,
        service: TrunkService,
        served: Served,
        engines: EnginePool,
        applied: frozenset[str],
        max_length: int,
        number: int,
    ) -> None:
        self._service, self._served, self._engines, self._number = service, served, engines, number
        self._max_length = max_length
        self._parts: list[pb.Step] = []
        self._tokens = 0
        self._lock = threading.Lock()
        self._closed = False
        self.engine: Engine = engines.take(applied)
        try:
            self.engine.call("open", number, applied, max_length)
        except BaseException:
            engines.give_back(self.engine)
            raise

    def feed(self, raw: bytes) -> Iterator[bytes]:
        """Take one message; the last part of a step is answered."""
        started = time.perf_counter()
        step = _parse(raw, "step").step
        self._take(step)
        if step.more:
            return
        first, data = self._parts[0], b"".join(part.hidden.data for part in self._parts)
        self._parts, self._tokens = [], 0
        called = time.perf_counter()
        done: EngineStep = self.engine.call("step", self._number, first.position, data, first.roll_back)
        answered = time.perf_counter()
        waited = answered - called - done.decode_s - done.trunk_s - done.encode_s
        result = pb.StepResult(
            sequence_id=step.sequence_id,
            step_id=step.step_id,
            decode_s=called - started + done.decode_s,
            queue_s=waited,
            trunk_s=done.trunk_s,
            encode_s=done.encode_s,
            compile_s=done.compile_s,
        )
        yield from self._answers(result, first.position, done.data)

    def close(self) -> None:
        """Free the session at its engine; the first call counts."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        try:
            self.engine.call("close", self._number)
        except SplitlearnError as error:
            log.warning("a session ended with its engine: %s", error)
        finally:
            self._engines.give_back(self.engine)
            self._service.leave()

    def _take(self, step: pb.Step) -> None:
        """Check one part against what is served and against the parts before it."""
        tokens = codec.check(step.hidden, self._served.dtype, self._served.files.facts.hidden_size)
        if self._parts:
            expected = self._parts[0].position + self._tokens
            if step.step_id != self._parts[0].step_id or step.position != expected:
                raise InputError(
                    "position", step.position, f"{expected}, the next part of step {self._parts[0].step_id}"
                )
        if step.position + tokens > self._max_length:
            raise InputError("position", step.position, f"at most {self._max_length} tokens in all, as opened")
        self._parts.append(step)
        self._tokens += tokens

    def _answers(self, result: pb.StepResult, position: int, data: bytes) -> Iterator[bytes]:
        row = self._served.files.facts.hidden_size * self._served.dtype.itemsize
        size = max(1, MAX_TENSOR_BYTES // row) * row
        for start in range(0, len(data), size):
            part = data[start : start + size]
            result.position, result.more = position + start // row, start + size < len(data)
            result.hidden.CopyFrom(codec.message(part, self._served.dtype, self._served.files.facts.hidden_size))
            yield pb.ServerMessage(result=result).SerializeToString()


def _parse(raw: bytes, kind: str) -> pb.ClientMessage:
    """A client's message, which must be of `kind`."""
    try:
        message = pb.ClientMessage.FromString(raw)
    except DecodeError as error:
        raise InputError("message", f"{len(raw)} bytes", "a serialized splitlearn.v1.ClientMessage") from error
    if message.WhichOneof("kind") != kind:
        raise InputError("message", message.WhichOneof("kind") or "an empty one", f"one of kind {kind!r}")
    return message


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

"""Feeds one session at the engine: a client's messages in, the answers out."""

import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from google.protobuf.message import DecodeError

from server.call_log import CallLog
from server.monitoring.metrics import TokenKind
from server.scheduling.engine import Engine
from server.scheduling.sessions import EngineSession
from splitlearn.errors import InputError, StepUnwanted
from splitlearn.stages.base import DropMark, StageInput, StageOutput
from splitlearn.wire import codec
from splitlearn.wire import trunk_pb2 as pb
from splitlearn.wire.hidden_states import converted


class Stopwatch:
    """Seconds by name: `lap` adds the time since the last lap, or since `start`, to a name."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._at = 0.0

    def start(self) -> None:
        """Leave out what went by since the last lap."""
        self._at = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name] += now - self._at
        self._at = now


@dataclass
class Parts:
    """What came of a step so far: the values of its parts, and what the first of them said. The messages themselves are
    not kept, since whatever else they hold may be long."""

    step_id: int
    position: int
    truncate: bool
    rope_length: int
    values: list[bytes] = field(default_factory=list)
    tokens: int = 0


@dataclass(frozen=True)
class Step:
    """What a client asks for: the step's numbers, its input, and how many of the last positions it wants answers to."""

    sequence_id: int
    step_id: int
    item: StageInput
    truncate: bool
    wanted: int


class SessionHandler:
    """Takes the messages of `session` one by one; `parts` are of a step that is not whole yet."""

    def __init__(
        self, engine: Engine, session: EngineSession, log: CallLog, dtype: torch.dtype, hidden_size: int
    ) -> None:
        self.parts: Parts | None = None
        self._engine, self._session, self._log = engine, session, log
        self._dtype, self._hidden_size, self._max_length = dtype, hidden_size, session.cache.max_length
        self._rows = session.cache.settings.rows(dtype)
        self._read = self._rows.reader(hidden_size)
        self._watch = Stopwatch()

    def feed(self, raw: bytes) -> Iterator[bytes]:
        """Take one message. The last part of a step is answered."""
        if self.parts is None:
            self._watch = Stopwatch()
        self._watch.start()
        step = self.assemble(parse(raw, "step").step)
        if step is None:
            return
        before = self._session.computed
        answer = self.run(step)
        yield from self.encode(step, answer)
        if answer is not None:
            kinds = _kinds(step, before, self._session.recomputes)
            self._log.stepped(kinds, step.item.x.shape[1], step.wanted, answer.timing.ledger["queue"])

    def assemble(self, message: pb.Step) -> Step | None:
        """The step that `message` completes; None where more parts are to come."""
        parts = self._checked(message)
        if message.fork_of:
            self._engine.fork(self._session, message.fork_of, message.position)
        self._watch.lap("decode")
        self._session.quota.spend(message.hidden.shape[1], self._session.timeout_s)
        self._watch.lap("throttled")
        parts.values.append(message.hidden.data)
        parts.tokens += message.hidden.shape[1]
        self.parts = parts if message.more else None
        step = None if message.more else self._whole(parts, message)
        self._watch.lap("decode")
        return step

    def run(self, step: Step) -> StageOutput | None:
        """Have the engine compute a step. None where its client dropped it."""
        try:
            return self._engine.step(self._session, step.item, truncate=step.truncate)
        except StepUnwanted:
            return None
        finally:
            self._watch.lap("engine")

    def encode(self, step: Step, answer: StageOutput | None) -> Iterator[bytes]:
        """The messages of an answer, in as many parts as it takes; the last one says what took how long."""
        seconds = self._watch.seconds
        if answer is None:
            took = {"decode_s": seconds["decode"], "trunk_s": seconds["engine"]}
            yield _answer(step, position=step.item.position, dropped=True, **took)
            return
        skipped, timing = step.item.x.shape[1] - step.wanted, answer.timing
        x = answer.x[:, skipped:] if skipped else answer.x
        data, position = self._rows.to_bytes(x), step.item.position + skipped
        parts = codec.in_parts(data, self._rows, self._hidden_size, position)
        *messages, last = [_answer(step, **part) for part in parts]
        self._watch.lap("encode")
        times = pb.ServerMessage(
            result={
                "decode_s": seconds["decode"],
                "queue_s": timing.ledger["queue"] + seconds["throttled"],
                "trunk_s": timing.ledger["trunk"],
                "encode_s": seconds["encode"],
                "compile_s": timing.compile_s,
            }
        )
        yield from messages
        # Protocol Buffers merge concatenated messages: so what encoding took can be in what it encoded.
        yield last + times.SerializeToString()

    def _checked(self, message: pb.Step) -> Parts:
        """The parts so far, once `message` is checked against them and against what is served."""
        tokens = codec.check(message.hidden, self._rows, self._hidden_size)
        first = Parts(message.step_id, message.position, message.truncate, message.rope_length)
        parts = self.parts or first
        expected = parts.position + parts.tokens
        if (message.step_id, message.position) != (parts.step_id, expected):
            raise InputError("position", message.position, f"{expected}, the next part of step {parts.step_id}")
        if message.rope_length != parts.rope_length:
            raise InputError("rope_length", message.rope_length, f"{parts.rope_length}, as in the step's first part")
        longest = self._max_length
        if message.position + tokens > longest:
            raise InputError("position", message.position, f"at most {longest} tokens in all, as opened")
        if message.rope_length > longest:
            raise InputError("rope_length", message.rope_length, f"at most {longest} tokens, as opened")
        return parts

    def _whole(self, parts: Parts, last: pb.Step) -> Step:
        x = converted(self._read(b"".join(parts.values)), self._dtype)
        codec.check_finite(x, parts.position)
        mark = DropMark(self._session.drops, last.step_id) if last.uncertain else None
        item = StageInput(self._session.cache, parts.position, x, mark=mark, rope_length=parts.rope_length)
        wanted = min(last.answer_last or parts.tokens, parts.tokens)
        return Step(last.sequence_id, last.step_id, item, parts.truncate, wanted)


def _answer(step: Step, **fields: object) -> bytes:
    # A dictionary, as in client/session_stream.py: a StepResult would be copied into the message.
    result = {"sequence_id": step.sequence_id, "step_id": step.step_id, **fields}
    return pb.ServerMessage(result=result).SerializeToString()


def _kinds(step: Step, before: int, recomputes: bool) -> dict[TokenKind, int]:
    """How many tokens of a step are of which kind, after `before` tokens of its session.

    Positions whose answer the client does not want are a replay after failover. So is, without a KV cache, the prefix
    that each step brings again.
    """
    tokens = step.item.x.shape[1]
    known = min(before, tokens) if recomputes else tokens - step.wanted
    kind: TokenKind = "decode" if before or known else "prompt"
    return {"replay": known, kind: tokens - known} if known else {kind: tokens}


def parse(raw: bytes, kind: str) -> pb.ClientMessage:
    try:
        message = pb.ClientMessage.FromString(raw)
    except DecodeError as error:
        raise InputError("message", f"{len(raw)} bytes", "a serialized splitlearn.v1.ClientMessage") from error
    if message.WhichOneof("kind") != kind:
        raise InputError("message", message.WhichOneof("kind") or "an empty one", f"one of kind {kind!r}")
    return message

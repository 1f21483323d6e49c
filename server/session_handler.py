"""Handles the messages of one session: turns them into steps for the engine, and encodes the answers."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from google.protobuf.message import DecodeError

from server.call_log import CallLog
from server.monitoring.metrics import TokenKind
from splitlearn.access.quota import Quota
from splitlearn.errors import InputError, StepUnwanted
from splitlearn.scheduling.engine import Engine
from splitlearn.scheduling.sessions import EngineSession
from splitlearn.stages.base import DropMark, StageInput, StageOutput
from splitlearn.wire import codec
from splitlearn.wire import trunk_pb2 as pb
from splitlearn.wire.hidden_states import converted


class Stopwatch:
    """Adds up seconds by name: `lap` adds the time since the last lap, or since `start`."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._at = 0.0

    def start(self) -> None:
        """Leave out the time since the last lap."""
        self._at = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name] += now - self._at
        self._at = now


@dataclass
class Parts:
    """A step whose parts are still arriving: their values, and the fields of the first part. The messages are not kept,
    since their other fields may be long."""

    step_id: int
    position: int
    truncate: bool
    rope_length: int
    values: list[bytes] = field(default_factory=list)
    tokens: int = 0


@dataclass(frozen=True)
class Step:
    """A complete step: its ids and its input. The client wants answers for the last `answered` positions."""

    sequence_id: int
    step_id: int
    item: StageInput
    truncate: bool
    answered: int


class SessionHandler:
    """Takes the messages of `session` one by one. `parts`: the incomplete step, if there is one. `keep` is called with
    the keys of the blocks that the client asks to keep."""

    def __init__(
        self,
        engine: Engine,
        session: EngineSession,
        quota: Quota,
        log: CallLog,
        dtype: torch.dtype,
        hidden_size: int,
        keep: Callable[[bytes], None],
    ) -> None:
        self.parts: Parts | None = None
        self._keep, self._kept = keep, False
        self._engine, self._session, self._quota, self._log = engine, session, quota, log
        self._dtype, self._hidden_size, self._max_length = dtype, hidden_size, session.max_length
        self._rows = session.local.settings.rows(dtype)
        self._read = self._rows.reader(hidden_size)
        self._watch = Stopwatch()

    def feed(self, raw: bytes) -> Iterator[bytes]:
        """Take one message. Yields the answers after the last part of a step."""
        if self.parts is None:
            self._watch = Stopwatch()
        self._watch.start()
        message = parse(raw, "step", "keep")
        if message.WhichOneof("kind") == "keep":
            self._keep_once(message.keep.prefix_keys)
            return
        step = self.assemble(message.step)
        if step is None:
            return
        before = self._session.computed - self._session.reused
        answer = self.run(step)
        yield from self.encode(step, answer)
        if answer is not None:
            kinds = _kinds(step, before, self._session.recomputes)
            self._log.stepped(kinds, step.item.x.shape[1], step.answered, answer.timing.ledger["queue"])

    def _keep_once(self, keys: bytes) -> None:
        if self._kept or self.parts is not None:
            raise InputError("message", "keep", "one keep in a session, after its last step")
        self._kept = True
        self._keep(keys)

    def assemble(self, message: pb.Step) -> Step | None:
        """The step that `message` completes, or None if more parts are to come."""
        parts = self._checked(message)
        if message.fork_of:
            self._engine.fork(self._session, message.fork_of, message.position)
        self._watch.lap("decode")
        self._quota.spend(message.hidden.shape[1], self._session.timeout_s)
        self._watch.lap("throttled")
        parts.values.append(message.hidden.data)
        parts.tokens += message.hidden.shape[1]
        self.parts = parts if message.more else None
        step = None if message.more else self._whole(parts, message)
        self._watch.lap("decode")
        return step

    def run(self, step: Step) -> StageOutput | None:
        """Let the engine compute a step. None if its client dropped it."""
        try:
            return self._engine.step(self._session, step.item, truncate=step.truncate)
        except StepUnwanted:
            return None
        finally:
            self._watch.lap("engine")

    def encode(self, step: Step, answer: StageOutput | None) -> Iterator[bytes]:
        """The messages of an answer, in as many parts as it needs. The last one has the durations."""
        seconds = self._watch.seconds
        if answer is None:
            durations = {"decode_s": seconds["decode"], "trunk_s": seconds["engine"]}
            yield _answer(step, position=step.item.position, dropped=True, **durations)
            return
        skipped, timing = step.item.x.shape[1] - step.answered, answer.timing
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
        # Protocol Buffers merge concatenated messages, so the encoded message can contain its own encoding time.
        yield last + times.SerializeToString()

    def _checked(self, message: pb.Step) -> Parts:
        """Check `message` against the earlier parts and against the session. Returns the parts so far."""
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
            raise InputError("position", message.position, f"at most {longest} tokens in all, the session's max_length")
        if message.rope_length > longest:
            raise InputError("rope_length", message.rope_length, f"at most {longest}, the session's max_length")
        return parts

    def _whole(self, parts: Parts, last: pb.Step) -> Step:
        x = converted(self._read(b"".join(parts.values)), self._dtype)
        codec.check_finite(x, parts.position)
        mark = DropMark(self._session.drops, last.step_id) if last.uncertain else None
        item = StageInput(self._session.local, parts.position, x, mark=mark, rope_length=parts.rope_length)
        answered = min(last.answer_last or parts.tokens, parts.tokens)
        return Step(last.sequence_id, last.step_id, item, parts.truncate, answered)


def _answer(step: Step, **fields: object) -> bytes:
    # A dictionary, as in client/session_stream.py: a StepResult would be copied once more.
    result = {"sequence_id": step.sequence_id, "step_id": step.step_id, **fields}
    return pb.ServerMessage(result=result).SerializeToString()


def _kinds(step: Step, before: int, recomputes: bool) -> dict[TokenKind, int]:
    """The number of a step's tokens of each kind. Its session had computed `before` tokens.

    Positions without an answer are a replay after failover. Without a KV cache, the prefix that each step repeats
    is a replay, too.
    """
    tokens = step.item.x.shape[1]
    known = min(before, tokens) if recomputes else tokens - step.answered
    kind: TokenKind = "decode" if before or known else "prompt"
    return {"replay": known, kind: tokens - known} if known else {kind: tokens}


def parse(raw: bytes, *kinds: str) -> pb.ClientMessage:
    """The message, which is of one of `kinds`. Raises InputError for any other."""
    try:
        message = pb.ClientMessage.FromString(raw)
    except DecodeError as error:
        raise InputError("message", f"{len(raw)} bytes", "a serialized splitlearn.v1.ClientMessage") from error
    if message.WhichOneof("kind") not in kinds:
        expected = f"one of kind {' or '.join(map(repr, kinds))}"
        raise InputError("message", message.WhichOneof("kind") or "an empty one", expected)
    return message

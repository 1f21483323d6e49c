"""Handles the messages of one session: turns them into steps for the engine, and encodes the answers."""

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

from server.answers import Encoder, Step, Stopwatch
from server.build import TrunkRuntime
from server.forwarding import ForwardStream, NextServers
from server.messages import checked_hops, parse
from server.monitoring.metrics import TokenKind
from server.session_call import SessionCall
from splitlearn.errors import InputError, StepUnwanted
from splitlearn.scheduling.sessions import EngineSession
from splitlearn.stages.base import DropMark, StageInput, StageOutput
from splitlearn.wire import codec
from splitlearn.wire import trunk_pb2 as pb
from splitlearn.wire.hidden_states import converted

LONGEST_KEY = 64
"""Bytes of a key at the next server, which may be of a later version."""


@dataclass
class Parts:
    """A step whose parts are still arriving: their values, and the fields of the first part. The messages are not kept,
    since their other fields may be long. `fork_of` is the key at the next server."""

    step_id: int
    position: int
    truncate: bool
    rope_length: int
    fork_of: bytes = b""
    values: list[bytes] = field(default_factory=list)
    tokens: int = 0


class SessionHandler:
    """Takes the messages of `session` one by one: those of its client, whose call is `call`, and those of its feed,
    each from a thread of its own. In a chain its answers go to one of `next_servers`, if its `opening` says so. What it
    keeps is the `keeper`'s. `parts`: the incomplete step, if there is one. `done`: the client has said that nothing
    follows, `fed_in_full`: its feed has."""

    def __init__(
        self,
        runtime: TrunkRuntime,
        next_servers: NextServers,
        session: EngineSession,
        call: SessionCall,
        opening: pb.Open,
        keeper: str,
    ) -> None:
        self.parts: Parts | None = None
        self.done, self.fed_in_full = False, False
        self._prefixes, self._keeper, self._kept = runtime.prefixes, keeper, False
        self._engine, self._session, self._call = runtime.engine, session, call
        self._next_servers, self._forwards, self._fed = next_servers, opening.forwards, opening.fed
        self._quota, self._log = call.quota, call.log
        self._dtype, self._hidden_size = runtime.placement.dtype, runtime.files.facts.hidden_size
        self._max_length = session.max_length
        self._rows = session.local.settings.rows(self._dtype)
        self._encoder = Encoder(self._rows, self._hidden_size)
        self._read = self._rows.reader(self._hidden_size)
        self._watch = Stopwatch()
        self._lock, self._told = threading.Lock(), threading.Event()
        self._next: ForwardStream | None = None

    def take(self, raw: bytes) -> Iterator[bytes]:
        """Take one message of the client. Yields the answers after the last part of a step, unless they are
        forwarded."""
        if not self._fed:
            self._begin_watch()
        message = parse(raw, "step", "keep", "forward", "done")
        kind = message.WhichOneof("kind")
        if self.done:
            raise InputError("message", kind, "none after done")
        if kind == "done":
            self.done = True
        elif kind == "forward":
            self._forward_once(message.forward)
        else:
            with self._lock:  # a fed session may be computing
                if kind == "keep":
                    self._keep_once(message.keep.prefix_keys)
                else:
                    self._check_own(message.step)
                    yield from self._take(message.step, ())

    def take_fed(self, raw: bytes) -> Iterator[bytes]:
        """Take one message of the feed, as `take`."""
        with self._lock:
            self._begin_watch()
            message = parse(raw, "step", "done")
            if self.fed_in_full:
                raise InputError("message", message.WhichOneof("kind"), "none after done")
            self.fed_in_full = message.WhichOneof("kind") == "done"
            if not self.fed_in_full:
                hops = checked_hops(message.step)
                take = self._pass_on_dropped if message.step.dropped else self._take
                yield from take(message.step, hops)

    def await_forward(self, timeout_s: float) -> None:
        """Wait until the client has said where the answers go, if that is to another server. Raises InputError if it
        does not in time."""
        if self._forwards and not self._told.wait(timeout_s):
            raise InputError("message", "none", f"a forward within {timeout_s:g} s, since the session opened with it")

    def _begin_watch(self) -> None:
        if self.parts is None:
            self._watch = Stopwatch()
        self._watch.start()

    def _check_own(self, message: pb.Step) -> None:
        """Raise InputError for a step that may not come from the client itself."""
        if self._fed:
            raise InputError("message", "step", "no step from the client of a session that opened with fed")
        if self._forwards and self._next is None:
            raise InputError("message", "step", "a forward before it, since the session opened with forwards")
        if message.dropped or message.hops:
            raise InputError("message", "step", "neither dropped nor hops in it: a chain's servers set them")

    def _take(self, message: pb.Step, hops: tuple[pb.HopTiming, ...]) -> Iterator[bytes]:
        step = self.assemble(message, hops)
        if step is None:
            return
        before = self._session.computed - self._session.reused
        answer = self.run(step)
        yield from self._answered(step, answer)
        if answer is not None:
            kinds = _kinds(step, before, self._session.recomputes)
            sent = step.answered if self._next is None else step.tokens
            self._log.stepped(kinds, step.tokens, sent, answer.timing.ledger["queue"])

    def _answered(self, step: Step, answer: StageOutput | None) -> Iterator[bytes]:
        """The messages for the client. With another server in its place there are none."""
        if self._next is None:
            yield from self._encoder.for_client(step, answer, self._watch)
        else:
            self._next.send(self._encoder.for_next(step, answer, self._watch, self._next.part_bytes))

    def _pass_on_dropped(self, message: pb.Step, hops: tuple[pb.HopTiming, ...]) -> Iterator[bytes]:
        """Answer a step that the server before has dropped."""
        if self.parts is not None or message.more or message.hidden.ByteSize():
            raise InputError("message", "a dropped step", "one without a hidden state and other parts")
        own = (message.sequence_id, message.step_id, message.position)
        step = Step(*own, None, message.truncate, fork_of=self._fork(message), hops=hops)
        yield from self._answered(step, None)

    def _forward_once(self, forward: pb.Forward) -> None:
        if not self._forwards or self._told.is_set():
            raise InputError("message", "forward", "one forward in a session, which opened with forwards")
        if not 0 < len(forward.key) <= LONGEST_KEY:
            raise InputError("key", f"{len(forward.key)} bytes", f"the key of a session, at most {LONGEST_KEY} bytes")
        session = self._session
        self._next = self._next_servers.open(session.key, forward, session.timeout_s, self._call.fail)
        self._told.set()

    def _keep_once(self, keys: bytes) -> None:
        if self._kept or self.parts is not None:
            raise InputError("message", "keep", "one keep in a session, after its last step")
        self._kept = True
        self._prefixes.keep(self._session, self._keeper, keys)

    def assemble(self, message: pb.Step, hops: tuple[pb.HopTiming, ...] = ()) -> Step | None:
        """The step that `message` completes, or None if more parts are to come."""
        parts = self._checked(message)
        parts.fork_of = self._fork(message) or parts.fork_of
        self._watch.lap("decode")
        self._quota.spend(message.hidden.shape[1], self._session.timeout_s)
        self._watch.lap("throttled")
        parts.values.append(message.hidden.data)
        parts.tokens += message.hidden.shape[1]
        self.parts = parts if message.more else None
        step = None if message.more else self._whole(parts, message, hops)
        self._watch.lap("decode")
        return step

    def _fork(self, message: pb.Step) -> bytes:
        """Let the session begin as a fork of another one, if `message` says so. Returns that one's key at the next
        server."""
        if message.fork_of:
            self._engine.fork(self._session, message.fork_of, message.position)
            if self._next is not None:
                return self._next_servers.fork_of(message.fork_of, self._next.address)
        return b""

    def run(self, step: Step) -> StageOutput | None:
        """Let the engine compute a step. None if its client dropped it."""
        assert step.x is not None
        mark = DropMark(self._session.drops, step.step_id) if step.uncertain else None
        item = StageInput(self._session.local, step.position, step.x, mark=mark, rope_length=step.rope_length)
        try:
            return self._engine.step(self._session, item, truncate=step.truncate)
        except StepUnwanted:
            return None
        finally:
            self._watch.lap("engine")

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

    def _whole(self, parts: Parts, last: pb.Step, hops: tuple[pb.HopTiming, ...]) -> Step:
        x = converted(self._read(b"".join(parts.values)), self._dtype)
        codec.check_finite(x, parts.position)
        return Step(
            last.sequence_id,
            last.step_id,
            parts.position,
            x,
            parts.truncate,
            last.answer_last,
            parts.fork_of,
            last.uncertain,
            parts.rope_length,
            hops,
        )


def _kinds(step: Step, before: int, recomputes: bool) -> dict[TokenKind, int]:
    """The number of a step's tokens of each kind. Its session had computed `before` tokens.

    Positions without an answer are a replay after failover. Without a KV cache, the prefix that each step repeats
    is a replay, too.
    """
    tokens = step.tokens
    known = min(before, tokens) if recomputes else tokens - step.answered
    kind: TokenKind = "decode" if before or known else "prompt"
    return {"replay": known, kind: tokens - known} if known else {kind: tokens}

"""One session at the engine: its messages, checked, in; its answers out."""

import time
from collections.abc import Iterator

import torch
from google.protobuf.message import DecodeError

from server.auth.gate import Guest
from server.build import Served
from server.call_log import Visit
from server.scheduling.sessions import Seat
from splitlearn.errors import InputError, StepUnwanted
from splitlearn.wire import codec
from splitlearn.wire import trunk_pb2 as pb
from splitlearn.wire.hidden_states import converted


class Stay:
    """One session at the engine, and the parts of a long step that have come so far."""

    def __init__(
        self, served: Served, seat: Seat, guest: Guest, visit: Visit, max_length: int, timeout_s: float
    ) -> None:
        self._served, self._seat, self._guest, self._visit = served, seat, guest, visit
        self._max_length, self._timeout_s = max_length, timeout_s
        self._dtype, self._hidden_size = served.placement.dtype, served.files.facts.hidden_size
        self._rows = seat.session.settings.rows(self._dtype)
        self._read = self._rows.reader(self._hidden_size)
        # Of the parts that have come so far, no more than the values: what else stands in a message may be long.
        self._parts: list[bytes] = []
        self._first = (0, 0, False, 0)
        self._tokens = 0
        self._held_up_s = 0.0

    def feed(self, raw: bytes) -> Iterator[bytes]:
        """Take one message; the last part of a step is answered."""
        started, held_up_before_s = time.perf_counter(), self._held_up_s
        step = parse(raw, "step").step
        self._take(step)
        if step.more:
            return
        (_, position, roll_back, rope_length), tokens, held_up_s = self._first, self._tokens, self._held_up_s
        x = converted(self._read(b"".join(self._parts)), self._dtype)
        self._parts, self._tokens, self._held_up_s = [], 0, 0.0
        codec.check_finite(x, position)
        decoded = time.perf_counter()
        decode_s = decoded - started - (held_up_s - held_up_before_s)
        try:
            done = self._served.engine.step(
                self._seat,
                position,
                x,
                self._timeout_s,
                roll_back,
                step.step_id if step.uncertain else None,
                rope_length,
            )
        except StepUnwanted:
            yield self._dropped(step, position, decode_s, time.perf_counter() - decoded)
            return
        computed = time.perf_counter()
        wanted = min(step.answer_last or tokens, tokens)
        x = done.x if wanted == tokens else done.x[:, tokens - wanted :]
        *parts, last = self._answers(step, position + tokens - wanted, x)
        took = pb.StepResult(
            decode_s=decode_s,
            queue_s=done.queue_s + held_up_s,
            trunk_s=done.trunk_s,
            encode_s=time.perf_counter() - computed,
            compile_s=done.compile_s,
        )
        yield from parts
        # Protocol Buffers merge what is serialized one after the other: so the time of encoding is in what it encoded.
        yield last + pb.ServerMessage(result=took).SerializeToString()
        self._served.engine.count()
        self._visit.stepped(tokens, wanted, self._seat.recomputes, done.queue_s)

    def _dropped(self, step: pb.Step, position: int, decode_s: float, trunk_s: float) -> bytes:
        """The answer to a step that was given up."""
        result = pb.StepResult(
            sequence_id=step.sequence_id,
            step_id=step.step_id,
            position=position,
            decode_s=decode_s,
            trunk_s=trunk_s,
            dropped=True,
        )
        return pb.ServerMessage(result=result).SerializeToString()

    @property
    def in_parts(self) -> bool:
        """Whether more parts of a step are to come."""
        return bool(self._parts)

    def close(self) -> None:
        """Free the session at the engine; calling it again does nothing."""
        self._served.engine.close(self._seat)

    def _take(self, step: pb.Step) -> None:
        """Check one part against what is served and against the parts before it."""
        tokens = codec.check(step.hidden, self._rows, self._hidden_size)
        if self._parts:
            step_id, expected, rope_length = self._first[0], self._first[1] + self._tokens, self._first[3]
            if step.step_id != step_id or step.position != expected:
                raise InputError("position", step.position, f"{expected}, the next part of step {step_id}")
            if step.rope_length != rope_length:
                raise InputError("rope_length", step.rope_length, f"{rope_length}, as in the first part of the step")
        else:
            self._first = (step.step_id, step.position, step.roll_back, step.rope_length)
        if step.position + tokens > self._max_length:
            raise InputError("position", step.position, f"at most {self._max_length} tokens in all, as opened")
        if step.rope_length > self._max_length:
            raise InputError("rope_length", step.rope_length, f"at most {self._max_length} tokens, as opened")
        if step.branch_of:
            self._served.engine.branch(self._seat, step.branch_of, step.position)
            self._visit.branched(step.position)
        self._held_up_s += self._guest.spend(tokens, self._timeout_s)
        self._parts.append(step.hidden.data)
        self._tokens += tokens

    def _answers(self, step: pb.Step, position: int, x: torch.Tensor) -> list[bytes]:
        """The answer `x` [1, T, H] to `step`, in as many parts as it takes."""
        data, row = self._rows.to_bytes(x), self._rows.row_bytes(self._hidden_size)
        size = codec.part_bytes(row)
        return [
            pb.ServerMessage(
                result={  # as in client/session_stream.py: no message that is copied into the other
                    "sequence_id": step.sequence_id,
                    "step_id": step.step_id,
                    "position": position + start // row,
                    "hidden": codec.fields(data[start : start + size], self._rows, self._hidden_size),
                    "more": start + size < len(data),
                }
            ).SerializeToString()
            for start in range(0, len(data), size)
        ]


def parse(raw: bytes, kind: str) -> pb.ClientMessage:
    """A client's message, which must be of `kind`."""
    try:
        message = pb.ClientMessage.FromString(raw)
    except DecodeError as error:
        raise InputError("message", f"{len(raw)} bytes", "a serialized splitlearn.v1.ClientMessage") from error
    if message.WhichOneof("kind") != kind:
        raise InputError("message", message.WhichOneof("kind") or "an empty one", f"one of kind {kind!r}")
    return message

"""Encodes the answer to a step: for the client, or as a step of the next server of a chain."""

import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from splitlearn.stages.base import StageOutput
from splitlearn.wire import codec
from splitlearn.wire import trunk_pb2 as pb
from splitlearn.wire.hidden_states import Rows


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


@dataclass(frozen=True)
class Step:
    """A complete step: its ids, its hidden state `x` [1, T, H] (None: the server before has dropped the step), and the
    other fields of its messages. `fork_of` is a key at the next server. `hops` are the durations of the servers before.
    """

    sequence_id: int
    step_id: int
    position: int
    x: torch.Tensor | None
    truncate: bool = False
    answer_last: int = 0
    fork_of: bytes = b""
    uncertain: bool = False
    rope_length: int = 0
    hops: Sequence[pb.HopTiming] = ()

    @property
    def tokens(self) -> int:
        return 0 if self.x is None else self.x.shape[1]

    @property
    def answered(self) -> int:
        """The client wants answers for so many last positions."""
        return min(self.answer_last or self.tokens, self.tokens)


@dataclass(frozen=True)
class Encoder:
    """Encodes answers of a session whose hidden states travel in the form `rows`."""

    rows: Rows
    hidden_size: int

    def for_client(self, step: Step, answer: StageOutput | None, watch: Stopwatch) -> list[bytes]:
        """The messages of an answer, in as many parts as it needs. The last one has the durations."""
        ids = {"sequence_id": step.sequence_id, "step_id": step.step_id}
        if answer is None:
            own = {"position": step.position, "dropped": True, **_durations(answer, watch)}
            return [_result({**ids, **own, "hops": step.hops})]
        skipped = step.tokens - step.answered
        x = answer.x[:, skipped:] if skipped else answer.x
        parts = codec.in_parts(self.rows.to_bytes(x), self.rows, self.hidden_size, step.position + skipped)
        *messages, last = [_result({**ids, **part}) for part in parts]
        watch.lap("encode")
        # Protocol Buffers merge concatenated messages, so the encoded message can contain its own encoding time.
        return [*messages, last + _result({**_durations(answer, watch), "hops": step.hops})]

    def for_next(self, step: Step, answer: StageOutput | None, watch: Stopwatch, part_bytes: int) -> list[bytes]:
        """The messages of a step of the next server, each with at most `part_bytes` of data."""
        each = {
            "sequence_id": step.sequence_id,
            "step_id": step.step_id,
            "answer_last": step.answer_last,
            "uncertain": step.uncertain,
            "rope_length": step.rope_length,
        }
        first: dict[str, Any] = {"truncate": step.truncate, "fork_of": step.fork_of}
        if answer is None:
            dropped = {"position": step.position, "dropped": True}
            return [_step({**each, **first, **dropped, "hops": [*step.hops, _durations(answer, watch)]})]
        data = self.rows.to_bytes(answer.x)
        parts = codec.in_parts(data, self.rows, self.hidden_size, step.position, part_bytes)
        *messages, last = [_step({**part, **each, **({} if at else first)}) for at, part in enumerate(parts)]
        watch.lap("encode")
        return [*messages, last + _step({"hops": [*step.hops, _durations(answer, watch)]})]


def _durations(answer: StageOutput | None, watch: Stopwatch) -> dict[str, float]:
    """The fields of a HopTiming, and of a StepResult."""
    seconds = watch.seconds
    if answer is None:
        return {"decode_s": seconds["decode"], "trunk_s": seconds["engine"]}
    ledger = answer.timing.ledger
    return {
        "decode_s": seconds["decode"],
        "queue_s": ledger["queue"] + seconds["throttled"],
        "trunk_s": ledger["trunk"],
        "encode_s": seconds["encode"],
        "compile_s": answer.timing.compile_s,
    }


def _result(fields: dict[str, Any]) -> bytes:
    # A dictionary, as in client/session_stream.py: a StepResult would be copied once more.
    return pb.ServerMessage(result=fields).SerializeToString()


def _step(fields: dict[str, Any]) -> bytes:
    return pb.ClientMessage(step=fields).SerializeToString()

"""A stage at the far end of a gRPC stream: the trunk server's layers, seen from the client.

A session survives the loss of its trunk. It keeps the hidden states that it has sent; when its stream breaks it opens
another, at the same trunk or at the next in the list, sends them once more with the step that was under way, and hands
on that step's answer as if nothing had happened: the decode loop sees no token twice and misses none.
"""

import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import replace
from functools import partial

import torch

from splitlearn.client.failover import Effort, Trunks
from splitlearn.client.served import Served, TrunkFacts
from splitlearn.client.session_stream import Opening, Sent, Stream, opening_of
from splitlearn.errors import TrunkUnavailable
from splitlearn.events import Recovery, StageTiming
from splitlearn.stages.base import PendingStep, StageInput, StageOutput
from splitlearn.stages.settings import SessionSettings
from splitlearn.wire import trunk_pb2 as pb
from splitlearn.wire.channel import NONE, Credentials

# The trunk is told this share of the time that is waited for it: what it says when the time is over still arrives.
TOLD = 0.9


class RemoteStage:
    """The trunk at the first of `addresses` that works. `facts` holds what it last said of itself. Raises TrunkError
    throughout."""

    def __init__(self, addresses: Sequence[str], served: Served, timeout_s: float, shown: Credentials = NONE) -> None:
        self.served = served
        self.facts = TrunkFacts()
        self._trunks = Trunks(addresses, served, timeout_s, shown)

    def open(self, settings: SessionSettings, max_length: int) -> "RemoteSession":
        """Open a session; refused unless the trunk serves exactly what is asked for."""
        opening = opening_of(self.served, settings, max_length, TOLD * self._trunks.effort().wait_s())
        return RemoteSession(self, self._trunks, opening, recomputes=settings.new_cache is None)

    def open_together(self, settings: SessionSettings, max_length: int, count: int) -> "list[RemoteSession]":
        """Sessions at the trunk, all of whose openings are on their way at the same time."""
        with ThreadPoolExecutor(count) as threads, ExitStack() as opened:
            under_way = [threads.submit(self.open, settings, max_length) for _ in range(count)]
            wait(under_way)
            for each in under_way:
                if each.exception() is None:
                    opened.callback(each.result().close)
            sessions = [each.result() for each in under_way]
            opened.pop_all()
            return sessions

    def step(self, batch: Sequence[StageInput]) -> list[StageOutput]:
        """One step of each session, in order: hidden state [1, T, H] to hidden state [1, T, H], on the CPU. All are on
        their way at the same time."""
        if len(batch) == 1:
            return [batch[0].session.step(batch[0].position, batch[0].x, rope_length=batch[0].rope_length)]
        under_way = [self.begin(item) for item in batch]
        return [_with(begun.timing, begun.finish()) for begun in under_way]

    def begin(self, item: StageInput, *, uncertain: bool = False) -> PendingStep:
        """Send a step; what is given waits for its answer. More may be sent before; answers come in the same order."""
        begin: Callable[..., PendingStep] = item.session.begin
        return begin(item.position, item.x, uncertain=uncertain, rope_length=item.rope_length)

    def close(self) -> None:
        """Close the channels and with them every session."""
        self._trunks.close()

    def note_opened(self, opened: pb.Opened, address: str) -> None:
        """Keep what the trunk of a new session said."""
        peak = self.facts.peak_rss_bytes if address == self.facts.address else 0
        self.facts = TrunkFacts(opened.threads, opened.load_s, opened.import_rss_bytes, peak, address)

    def note_peak(self, peak_rss_bytes: int) -> None:
        """Keep what a session heard last."""
        self.facts = replace(self.facts, peak_rss_bytes=peak_rss_bytes)


class RemoteSession:
    """One generation's stay at a trunk, or at several one after the other when one is lost."""

    def __init__(self, stage: RemoteStage, trunks: Trunks, opening: Opening, recomputes: bool) -> None:
        self.recomputes = recomputes
        self._stage = stage
        self._trunks = trunks
        self._opening = opening
        self._row_bytes = opening.rows.row_bytes(stage.served.hidden_size)
        self._sent = bytearray()  # the hidden state of every position that the trunk's cache holds
        self._branch_of = b""
        self._rope_length = 0
        self._under_way: deque[Sent] = deque()
        self._recovered: deque[StageOutput] = deque()  # answers to what else was under way when a trunk was lost
        self._stream = self._open(trunks.effort(), patient=False)

    def step(self, position: int, x: torch.Tensor, *, rope_length: int = 0) -> StageOutput:
        """Send `x` [1, T, H] and wait for the trunk's answer to all of it, from another trunk if this one is lost."""
        started = time.perf_counter()
        self._send(position, x, rope_length)
        return self._finish(position, x, started, since=None)

    def begin(self, position: int, x: torch.Tensor, *, uncertain: bool = False, rope_length: int = 0) -> PendingStep:
        """The first half of `step`, and what does the second."""
        self._send(position, x, rope_length, uncertain=uncertain)
        sent, stream = self._under_way[-1], self._stream

        def finish() -> StageOutput:
            now = time.perf_counter()
            return self._finish(position, x, now, since=now)

        timing = StageTiming({"encode": sent.encode_s, "wire": sent.hand_over_s}, bytes_up=sent.size)
        return PendingStep(timing, finish, partial(stream.drop_step, sent))

    def branch(self, other: "RemoteSession", tokens: int) -> None:
        """Have the next step begin with what the trunk has of `other`."""
        if not self.recomputes:
            self._sent = other._sent[: tokens * self._row_bytes]  # noqa: SLF001
            self._branch_of = other._stream.key  # noqa: SLF001

    def _send(self, position: int, x: torch.Tensor, rope_length: int, *, uncertain: bool = False) -> None:
        kept, branch_of, self._branch_of = position * self._row_bytes, self._branch_of, b""
        self._rope_length = rope_length  # the same for all that is under way
        sent = self._stream.send(
            position,
            x,
            roll_back=kept < len(self._sent),
            branch_of=branch_of if kept else b"",
            uncertain=uncertain,
            rope_length=rope_length,
        )
        self._under_way.append(sent)
        if not self.recomputes:
            del self._sent[kept:]
            self._sent += sent.data

    def _finish(self, position: int, x: torch.Tensor, started: float, since: float | None) -> StageOutput:
        """The answer to the first step that is under way, which this client has had no other work beside since `since`,
        or since it was sent."""
        sent, effort = self._under_way.popleft(), self._trunks.effort()
        if self._recovered:
            return self._recovered.popleft()
        try:
            output = self._stream.answer(sent, effort.wait_s(), since=since)
        except TrunkUnavailable as error:
            lost = self._stream.address
            output = self._recover(x, sent, error, effort)
            spent = time.perf_counter() - started
            recovery = Recovery(spent, lost, self._stream.address, 0 if self.recomputes else position)
            timing = replace(output.timing, ledger={"recover": spent}, recoveries=(recovery,))
            output = StageOutput(output.x, timing)
        self._trunks.works(self._stream)
        return output

    def close(self) -> None:
        """End the stream, so that the trunk frees the session; learn the trunk's peak memory if it still answers."""
        peak_rss_bytes = self._trunks.end(self._stream)
        if peak_rss_bytes is not None:
            self._stage.note_peak(peak_rss_bytes)

    def _open(self, effort: Effort, *, patient: bool) -> Stream:
        stream, opened = self._trunks.open(self._opening, effort, patient=patient)
        self._stage.note_opened(opened, stream.address)
        return stream

    def _recover(self, x: torch.Tensor, lost: Sent, error: TrunkUnavailable, effort: Effort) -> StageOutput:
        """Do the steps that were lost at another stream: all that was sent goes once more, in one step, and only the
        positions that are not answered come back. Raises what the trunks said when the effort is over."""
        hidden_size = self._stage.served.hidden_size
        replay = x if self.recomputes else self._opening.rows.from_bytes(bytes(self._sent), hidden_size)
        sizes = [sent.wanted for sent in (lost, *self._under_way)]
        while True:
            self._trunks.lost(self._stream, error, effort)
            effort.pause()
            self._stream = self._open(effort, patient=True)
            try:
                sent = self._stream.send(0, replay, answer_last=sum(sizes), rope_length=self._rope_length)
                output = self._stream.answer(sent, effort.wait_s())
            except TrunkUnavailable as again:
                error = again
                continue
            own, *others = torch.split(output.x, sizes, dim=1)
            self._recovered.extend(StageOutput(other, StageTiming({})) for other in others)
            return StageOutput(own, output.timing)


def _with(sent: StageTiming, output: StageOutput) -> StageOutput:
    """The outcome of a step that was sent apart, with what both halves took."""
    timing = output.timing
    ledger = dict(Counter(sent.ledger) + Counter(timing.ledger))
    return StageOutput(output.x, replace(timing, ledger=ledger, bytes_up=sent.bytes_up + timing.bytes_up))

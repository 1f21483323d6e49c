"""A stage at the far end of a gRPC stream: the trunk server's layers, seen from the client.

A session survives the loss of its trunk. It keeps the hidden states that it has sent. When its stream breaks it opens
another, at the same trunk or at the next in the list, and replays them with the steps that were pending. It hands on
their answers as if nothing had happened: the decode loop sees no token twice and misses none.
"""

import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import replace
from functools import partial

import torch

from splitlearn.client.failover import Endpoints, RetryBudget
from splitlearn.client.served import Served, TrunkFacts
from splitlearn.client.session_stream import Opening, Sent, Stream, opening_of
from splitlearn.errors import TrunkUnavailable
from splitlearn.events import Reconnecting, Recovery, StageTiming
from splitlearn.stages.base import PendingStep, StageInput, StageOutput
from splitlearn.stages.settings import SessionSettings
from splitlearn.wire import trunk_pb2 as pb
from splitlearn.wire.channel import NONE, Credentials

# The trunk is told this share of the time that is waited for it: what it says when the time is over still arrives.
TOLD = 0.9


class RemoteStage:
    """The trunk at the first of `addresses` that works; `via` is that of `Endpoints`. `facts` holds what the trunk last
    said of itself. `watch` sees each try to reach a lost trunk as it comes. Raises TrunkError throughout."""

    def __init__(
        self,
        addresses: Sequence[str],
        served: Served,
        timeout_s: float,
        shown: Credentials = NONE,
        via: Sequence[str] = (),
        watch: Callable[[Reconnecting], None] = lambda notice: None,
    ) -> None:
        self.served = served
        self.watch = watch
        self.facts = TrunkFacts()
        self._endpoints = Endpoints(addresses, served, timeout_s, shown, via)

    def open(self, settings: SessionSettings, max_length: int) -> "RemoteSession":
        """Open a session; refused unless the trunk serves exactly what is asked for."""
        opening = opening_of(self.served, settings, max_length, TOLD * self._endpoints.budget().wait_s())
        return RemoteSession(self, self._endpoints, opening)

    def open_together(self, settings: SessionSettings, max_length: int, count: int) -> "list[RemoteSession]":
        """Sessions at the trunk, opened at the same time."""
        with ThreadPoolExecutor(count) as threads, ExitStack() as opened:
            opening = [threads.submit(self.open, settings, max_length) for _ in range(count)]
            wait(opening)
            for each in opening:
                if each.exception() is None:
                    opened.callback(each.result().close)
            sessions = [each.result() for each in opening]
            opened.pop_all()
            return sessions

    def step(self, batch: Sequence[StageInput]) -> list[StageOutput]:
        """One step of each session, in order: hidden state [1, T, H] to hidden state [1, T, H], on the CPU. All are
        sent before the first is waited for."""
        if len(batch) == 1:
            return [batch[0].session.step(batch[0].position, batch[0].x, rope_length=batch[0].rope_length)]
        pending = [self.begin(item) for item in batch]
        return [_with(each.timing, each.finish()) for each in pending]

    def begin(self, item: StageInput, *, uncertain: bool = False) -> PendingStep:
        """Send a step without waiting for its answer. Several may be pending; answers come in the order of sending."""
        begin: Callable[..., PendingStep] = item.session.begin
        return begin(item.position, item.x, uncertain=uncertain, rope_length=item.rope_length)

    def close(self) -> None:
        self._endpoints.close()

    def note_opened(self, opened: pb.Opened, address: str) -> None:
        peak = self.facts.peak_rss_bytes if address == self.facts.address else 0
        self.facts = TrunkFacts(opened.threads, opened.load_s, opened.import_rss_bytes, peak, address)

    def note_peak(self, peak_rss_bytes: int) -> None:
        self.facts = replace(self.facts, peak_rss_bytes=peak_rss_bytes)


class RemoteSession:
    """One generation's stay at a trunk, or at several one after the other when one is lost."""

    def __init__(self, stage: RemoteStage, endpoints: Endpoints, opening: Opening) -> None:
        self._stage = stage
        self._endpoints = endpoints
        self._opening = opening
        self._row_bytes = opening.rows.row_bytes(stage.served.hidden_size)
        self._sent = bytearray()  # the hidden state of every position that the trunk has
        self._fork_of = b""
        self._rope_length = 0
        self._pending: deque[Sent] = deque()
        self._recovered: deque[StageOutput] = deque()  # answers to what else was pending when a trunk was lost
        self._stream = self._open(endpoints.budget(), patient=False)

    def step(self, position: int, x: torch.Tensor, *, rope_length: int = 0) -> StageOutput:
        """Send `x` [1, T, H] and wait for the trunk's answer to all of it, from another trunk if this one is lost."""
        started = time.perf_counter()
        return self._finish(position, self._send(position, x, rope_length), started)

    def begin(self, position: int, x: torch.Tensor, *, uncertain: bool = False, rope_length: int = 0) -> PendingStep:
        """Send `x`: the first half of `step`, and what does the second."""
        sent, drop = self._send(position, x, rope_length, uncertain=uncertain), self._stream.drop_step

        def finish() -> StageOutput:
            now = time.perf_counter()
            return self._finish(position, sent, now, now)

        timing = StageTiming({"encode": sent.encode_s, "wire": sent.hand_over_s}, bytes_up=sent.size)
        return PendingStep(timing, finish, partial(drop, sent))

    def fork(self, other: "RemoteSession", tokens: int) -> None:
        """Have the next step begin with what the trunk has of `other`."""
        self._sent = other._sent[: tokens * self._row_bytes]  # noqa: SLF001
        self._fork_of = other._stream.key  # noqa: SLF001

    def _send(self, position: int, x: torch.Tensor, rope_length: int, *, uncertain: bool = False) -> Sent:
        kept, fork_of, self._fork_of = position * self._row_bytes, self._fork_of, b""
        self._rope_length = rope_length  # the same for all that is pending
        sent = self._stream.send(
            position,
            x,
            truncate=kept < len(self._sent),
            fork_of=fork_of if kept else b"",
            uncertain=uncertain,
            rope_length=rope_length,
        )
        self._pending.append(sent)
        del self._sent[kept:]
        self._sent += sent.data
        return sent

    def _finish(self, position: int, sent: Sent, started: float, since: float | None = None) -> StageOutput:
        """The answer to the first pending step."""
        self._pending.popleft()
        budget = self._endpoints.budget()
        if self._recovered:
            return self._recovered.popleft()
        try:
            output = self._stream.answer(sent, budget.wait_s(), since)
        except TrunkUnavailable as error:
            lost = self._stream.address
            budget.announce = lambda attempt: self._stage.watch(
                Reconnecting(attempt, time.perf_counter() - started, lost)
            )
            output = self._recover(sent, error, budget)
            spent = time.perf_counter() - started
            recovery = Recovery(spent, lost, self._stream.address, position)
            timing = replace(output.timing, ledger={"recover": spent}, recoveries=(recovery,))
            output = StageOutput(output.x, timing)
        self._endpoints.works(self._stream)
        return output

    def close(self) -> None:
        """End the stream, so that the trunk frees the session; learn the trunk's peak memory if it still answers."""
        peak_rss_bytes = self._endpoints.end(self._stream)
        if peak_rss_bytes is not None:
            self._stage.note_peak(peak_rss_bytes)

    def _open(self, budget: RetryBudget, *, patient: bool) -> Stream:
        stream, opened = self._endpoints.open(self._opening, budget, patient=patient)
        self._stage.note_opened(opened, stream.address)
        return stream

    def _recover(self, lost: Sent, error: TrunkUnavailable, budget: RetryBudget) -> StageOutput:
        """Do the lost steps at another stream: replay all that was sent in one step, of which only the unanswered
        positions come back. Raises what the trunks said when the budget is over."""
        replay = self._opening.rows.from_bytes(bytes(self._sent), self._stage.served.hidden_size)
        sizes = [sent.wanted for sent in (lost, *self._pending)]
        while True:
            self._endpoints.lost(self._stream, error, budget)
            budget.pause()
            self._stream = self._open(budget, patient=True)
            try:
                sent = self._stream.send(0, replay, answer_last=sum(sizes), rope_length=self._rope_length)
                output = self._stream.answer(sent, budget.wait_s())
            except TrunkUnavailable as again:
                error = again
                continue
            own, *others = torch.split(output.x, sizes, dim=1)
            self._recovered.extend(StageOutput(other, StageTiming({})) for other in others)
            return StageOutput(own, output.timing)


def _with(sent: StageTiming, output: StageOutput) -> StageOutput:
    """The output of a step that was sent apart, with what both halves took."""
    timing = output.timing
    ledger = dict(Counter(sent.ledger) + Counter(timing.ledger))
    return StageOutput(output.x, replace(timing, ledger=ledger, bytes_up=sent.bytes_up + timing.bytes_up))

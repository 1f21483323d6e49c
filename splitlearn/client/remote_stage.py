"""A stage at the far end of a gRPC stream: the client's side of the trunk server's layers.

A session survives the loss of its trunk. It keeps the hidden states that it has sent. When its stream breaks, it opens
another one, at the same trunk or at the next in the list. It replays the hidden states together with the pending steps,
and passes on the answers to those. The decode loop sees no token twice and misses none.
"""

import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack
from copy import copy
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from splitlearn.client.failover import Endpoints, RetryBudget
from splitlearn.client.forwarding_chain import ForwardingChain
from splitlearn.client.served import ServedModel, TrunkFacts
from splitlearn.client.session_stream import Opening, SentStep, opening_of
from splitlearn.errors import TrunkError, TrunkUnavailable
from splitlearn.events import Reconnecting, Recovery, SpotCheckResult, StageTiming
from splitlearn.kvcache.prefix_store import BLOCK_TOKENS, BlockPart
from splitlearn.scheduling.contract import WhenGone
from splitlearn.stages.base import PendingStep, StageInput, StageOutput
from splitlearn.stages.settings import SessionSettings
from splitlearn.stages.spot_checks import SessionChecks, SpotChecks
from splitlearn.wire.channel import NONE, Credentials

# The trunk gets this share of the client's timeout as its own: its error then arrives before the client gives up.
TRUNK_SHARE = 0.9


class RemoteStage:
    """The trunk at the first of `addresses` that works; `via` is that of `Endpoints`. `watch` is called with each try
    to reach a lost trunk. `checks` computes some answers again. With `chain` the trunk is these servers together, in
    the place of `addresses`. All methods raise TrunkError."""

    def __init__(
        self,
        addresses: Sequence[str],
        served: ServedModel,
        timeout_s: float,
        credentials: Credentials = NONE,
        via: Sequence[str] = (),
        watch: Callable[[Reconnecting], None] = lambda notice: None,
        checks: SpotChecks | None = None,
        chain: ForwardingChain | None = None,
    ) -> None:
        self.served = served
        self.watch = watch
        self.checks = checks
        self.when_gone: WhenGone | None = None
        self._batch = False
        self._endpoints = chain or Endpoints(addresses, served, timeout_s, credentials, via)

    def for_client(self, when_gone: WhenGone, batch: bool = False) -> "RemoteStage":
        """The same trunk for a client who may go: an opening that waits then ends. `batch`: others come first."""
        own = copy(self)
        own.when_gone, own._batch = when_gone, batch  # noqa: SLF001
        return own

    def open(self, settings: SessionSettings, max_length: int) -> "RemoteSession":
        """Open a session. The trunk refuses it unless model, digest, layers, dtype and flags match."""
        return self._open(settings, max_length, ())

    def open_with(
        self, settings: SessionSettings, max_length: int, count: int, keys: Sequence[bytes]
    ) -> "list[RemoteSession]":
        """Open `count` sessions, all at one address. The first may begin with the blocks with these `keys`, as far as
        the trunk has kept them."""
        with ThreadPoolExecutor(count) as threads, ExitStack() as opened:
            opening = [threads.submit(self._open, settings, max_length, keys)]
            beside = opening[0].result().address if self._endpoints.change else ""
            opening += [threads.submit(self._open, settings, max_length, (), beside) for _ in range(count - 1)]
            wait(opening)
            for each in opening:
                if each.exception() is None:
                    opened.callback(each.result().close)
            sessions = [each.result() for each in opening]
            opened.pop_all()
            return sessions

    def step(self, batch: Sequence[StageInput]) -> list[StageOutput]:
        """Compute one step of each session, in order: hidden state [1, T, H] to hidden state [1, T, H], on the CPU. All
        steps are sent before the first answer is read."""
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
        if self.checks is not None:
            self.checks.close()

    def _open(
        self, settings: SessionSettings, max_length: int, keys: Sequence[bytes], beside: str = ""
    ) -> "RemoteSession":
        wait_s = TRUNK_SHARE * self._endpoints.budget().wait_s()
        opening = opening_of(self.served, settings, max_length, wait_s, keys, self._batch)
        return RemoteSession(self, self._endpoints, opening, max_length, beside)

    @property
    def facts(self) -> TrunkFacts:
        """Of the first server, as it sent them last."""
        return self.facts_of_each[0]

    @property
    def facts_of_each(self) -> Sequence[TrunkFacts]:
        """`facts` of each server."""
        return self._endpoints.facts


class RemoteSession:
    """The session of one generation at a trunk, or at several in turn when one is lost."""

    def __init__(
        self,
        stage: RemoteStage,
        endpoints: Endpoints | ForwardingChain,
        opening: Opening,
        max_length: int,
        beside: str = "",
    ) -> None:
        self._stage = stage
        self._endpoints = endpoints
        self._opening = opening
        self._row_bytes = opening.rows.row_bytes(stage.served.hidden_size)
        self._sent = bytearray()  # the hidden states of all positions in use at the trunk
        self._cached = 0  # tokens that the trunk had kept, until the first step
        self._fork_of = b""
        self._rope_length = 0
        self._pending: deque[SentStep] = deque()
        self._recovered: deque[StageOutput] = deque()  # answers to the other steps that were pending at a loss
        self._checks = None if stage.checks is None else SessionChecks(stage.checks, max_length, opening.rows)
        try:
            self._stream = self._open(endpoints.budget(stage.when_gone), patient=False, beside=beside)
        except TrunkError as error:
            stage.served.name(error)
            raise

    @property
    def address(self) -> str:
        """Where the trunk is that has the session."""
        address: str = self._stream.address
        return address

    def step(self, position: int, x: torch.Tensor, *, rope_length: int = 0) -> StageOutput:
        """Send `x` [1, T, H] and wait for the answer to all positions, from another trunk if this one is lost."""
        started = time.perf_counter()
        return self._finish(position, self._send(position, x, rope_length), started)

    def begin(self, position: int, x: torch.Tensor, *, uncertain: bool = False, rope_length: int = 0) -> PendingStep:
        """Send `x`, as the first half of `step`. The result's `finish()` is the second half."""
        sent, drop = self._send(position, x, rope_length, uncertain=uncertain), self._stream.drop_step

        def finish() -> StageOutput:
            now = time.perf_counter()
            return self._finish(position, sent, now, now)

        timing = StageTiming({"encode": sent.encode_s, "wire": sent.hand_over_s}, bytes_up=sent.size)
        return PendingStep(self._of_hop(timing), finish, partial(drop, sent))

    def fork(self, other: "RemoteSession", tokens: int) -> None:
        """Let the next step begin with the positions of `other` that the trunk has."""
        self._sent = other._sent[: tokens * self._row_bytes]  # noqa: SLF001
        self._fork_of = other._stream.key  # noqa: SLF001

    @property
    def most_blocks(self) -> int:
        """As many as the trunk has kept."""
        return self._cached // BLOCK_TOKENS

    def write_blocks(self, parts: Sequence[BlockPart]) -> None:
        """Take the hidden states of these blocks, of which the trunk has the rest: a replay needs them."""
        self._sent = bytearray().join(rows.numpy().tobytes() for (rows,) in parts)

    def keep_blocks(self, keys: Sequence[bytes], first: int) -> list[BlockPart]:
        """The hidden states of the blocks from `first` on. The trunk keeps what it has of all."""
        self._stream.keep(keys)
        size = BLOCK_TOKENS * self._row_bytes
        starts = range(first * size, len(keys) * size, size)
        return [(torch.frombuffer(self._sent[at : at + size], dtype=torch.uint8),) for at in starts]

    def _send(self, position: int, x: torch.Tensor, rope_length: int, *, uncertain: bool = False) -> SentStep:
        kept, fork_of, self._fork_of = position * self._row_bytes, self._fork_of, b""
        self._rope_length = rope_length  # the same for all pending steps
        sent: SentStep = self._stream.send(
            position,
            x,
            truncate=kept < max(len(self._sent), self._cached * self._row_bytes),
            fork_of=fork_of if kept else b"",
            uncertain=uncertain,
            rope_length=rope_length,
        )
        self._pending.append(sent)
        self._cached = 0
        del self._sent[kept:]
        self._sent += sent.data
        if self._checks is not None:
            self._checks.truncate(position)
        return sent

    def _finish(self, position: int, sent: SentStep, started: float, since: float | None = None) -> StageOutput:
        """The answer to the first pending step, which may be chosen for a spot check."""
        try:
            output = self._answer(position, sent, started, since)
        except TrunkError as error:
            self._stage.served.name(error)
            raise
        if self._checks is not None:
            self._checks.look(position, sent.data, output.x, self._sent, self._rope_length)
        return StageOutput(output.x, self._of_hop(output.timing))

    def _of_hop(self, timing: StageTiming) -> StageTiming:
        """`timing`, of a server in a chain also under its layers."""
        served = self._stage.served
        if not served.link:
            return timing
        return replace(timing, hops={(served.plan.start, served.plan.end): timing.ledger})

    def _answer(self, position: int, sent: SentStep, started: float, since: float | None) -> StageOutput:
        self._pending.popleft()
        budget = self._endpoints.budget()
        if self._recovered:
            return self._recovered.popleft()
        try:
            output: StageOutput = self._stream.answer(sent, budget.wait_s(), since)
        except TrunkUnavailable as error:
            part = self._stream.part
            lost = self._stream.address_of(part)
            budget.announce = lambda attempt: self._stage.watch(
                Reconnecting(attempt, time.perf_counter() - started, lost)
            )
            output = self._recover(sent, error, budget)
            spent = time.perf_counter() - started
            recovery = Recovery(spent, lost, self._stream.address_of(part), position)
            timing = replace(output.timing, ledger={"recover": spent}, recoveries=(recovery,), hops={})
            output = StageOutput(output.x, timing)
        self._endpoints.works(self._stream)
        return output

    def spot_checks(self) -> SpotCheckResult:
        """What the checks of this session's answers have found. Waits for those under way."""
        return SpotCheckResult() if self._checks is None else self._checks.result()

    def close(self) -> None:
        """End the stream, so that the trunk frees the session."""
        if self._checks is not None:
            self._checks.close()
        self._endpoints.end(self._stream)

    def _open(self, budget: RetryBudget, *, patient: bool, beside: str = "") -> Any:
        stream = self._endpoints.open(self._opening, budget, patient=patient, beside=beside)
        self._cached = stream.cached_tokens
        return stream

    def _recover(self, lost: SentStep, error: TrunkUnavailable, budget: RetryBudget) -> StageOutput:
        """Repeat the lost steps on another stream. One step replays everything that was sent, and only the unanswered
        positions come back. Raises the trunks' last errors when the budget is used up."""
        replay = self._opening.rows.from_bytes(bytes(self._sent), self._stage.served.hidden_size)
        sizes = [sent.answered for sent in (lost, *self._pending)]
        while True:
            self._endpoints.lost(self._stream, error, budget)
            budget.pause()
            self._stream = self._open(budget, patient=True)
            try:
                ahead, self._cached = self._cached > 0, 0  # what this trunk has kept is replayed, too
                sent = self._stream.send(
                    0, replay, truncate=ahead, answer_last=sum(sizes), rope_length=self._rope_length
                )
                output = self._stream.answer(sent, budget.wait_s())
            except TrunkUnavailable as again:
                error = again
                continue
            own, *others = torch.split(output.x, sizes, dim=1)
            self._recovered.extend(StageOutput(other, StageTiming({})) for other in others)
            return StageOutput(own, output.timing)


def _with(sent: StageTiming, output: StageOutput) -> StageOutput:
    """The output of a step, with the timings of both halves, sending and waiting."""
    timing = output.timing
    ledger = dict(Counter(sent.ledger) + Counter(timing.ledger))
    hops = dict.fromkeys(sent.hops, ledger) or timing.hops
    return StageOutput(output.x, replace(timing, ledger=ledger, bytes_up=sent.bytes_up + timing.bytes_up, hops=hops))

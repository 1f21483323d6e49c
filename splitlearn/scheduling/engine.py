"""The engine: computes the steps of all sessions, as many as possible in one forward.

A handler thread queues a step and waits for its answer. The engine's single thread runs forwards as long as steps wait.
A shortcut saves a lone client both wake-ups: see `_runs_here_locked`.

`scheduler.py` chooses what a forward takes, `sessions.py` keeps the open sessions, `admission.py` decides who may open
one. Methods named `_locked` need the engine's lock.
"""

import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from splitlearn.errors import (
    InputError,
    NotFinite,
    SplitlearnError,
    StepUnwanted,
    TrunkFailed,
    TrunkForgot,
    TrunkLate,
    as_error,
)
from splitlearn.events import StageTiming
from splitlearn.kvcache.pool import Slot
from splitlearn.kvcache.prefix_store import BLOCK_TOKENS, BlockPart
from splitlearn.scheduling.admission import Admission
from splitlearn.scheduling.contract import Client, Count, OwnSession
from splitlearn.scheduling.scheduler import Batch, Limits, Turns, next_batch
from splitlearn.scheduling.sessions import EngineSession, Pace, QueuedStep, SessionTable
from splitlearn.stages.base import StageInput, StageOutput
from splitlearn.stages.head import Head
from splitlearn.stages.local import LocalStage
from splitlearn.stages.settings import SessionSettings


class Engine:
    """Runs one stage for many sessions. `thread` is a pool of a single thread: see server/build.py for the reason."""

    def __init__(
        self, stage: LocalStage | Head, admission: Admission, limits: Limits, count: Count, thread: ThreadPoolExecutor
    ) -> None:
        self.limits = limits
        self._stage, self.admission, self._count, self._thread = stage, admission, count, thread
        self._table = SessionTable(admission)
        self._arrived = threading.Condition()
        self._pending: list[QueuedStep] = []
        self._busy = False
        self._turns, self._forwards = Turns(), 0
        self.running = 0
        """Steps in the current forward."""

    @property
    def waiting(self) -> int:
        """Steps that are not yet in a forward."""
        return len(self._pending) - self.running

    def open(self, settings: SessionSettings, max_length: int, client: Client) -> EngineSession:
        """Open a session with room for `max_length` tokens. Waits and raises as `Admission.acquire`.

        A session without use_cache gets that room, too: its steps are computed in chunks like any prompt.
        """
        return self.open_together(settings, max_length, 1, client)[0]

    def open_together(
        self, settings: SessionSettings, max_length: int, count: int, client: Client, *, pooled: bool = True
    ) -> list[EngineSession]:
        """Open `count` sessions as `open` does. They get room together: otherwise two answers with several samples
        could wait for each other. Without `pooled`, each has memory of its own, which nothing limits.
        """
        block = 1 if count == 1 else self.admission.pool.block_tokens
        tokens = count * (-(-max_length // block) * block) if pooled else 0
        reservation = self.admission.acquire(tokens, client.timeout_s, client.when_gone, client.holder, client.batch)
        try:
            own = [self._own(settings, max_length, part) for part in _parts(reservation.slot, count)]
        except BaseException:  # also an interrupt: the reservation must not leak
            self.admission.release(reservation)
            raise
        sessions = [EngineSession(local, max_length, client.timeout_s, reservation) for local in own]
        self._table.add(*sessions)
        return sessions

    def _own(self, settings: SessionSettings, max_length: int, slot: Slot | None) -> OwnSession:
        """The stage's session in `slot` of the pool, or in memory of its own."""
        if slot is None:
            return self._stage.open(settings, max_length)
        assert isinstance(self._stage, LocalStage), "a head has no KV memory"
        cache = self.admission.pool.cache(slot)
        return self._stage.session(cache, settings, max_length, shares=self.limits.shared)

    def fork(self, session: EngineSession, key: bytes, tokens: int) -> None:
        """Make `session` a fork: copy the first `tokens` of the session with that `key` to it.

        Raises TrunkForgot if the other session is gone, InputError if the two do not fit.
        """
        parent = self._table.find(key)
        if parent is None or not self._table.hold(parent, session):
            raise TrunkForgot("the session to fork does not exist or has ended", "branch_lost")
        try:
            if session.recomputes or session.computed or parent.flags != session.flags:
                expected = "set in the first step only, with the same flags, with use_cache"
                raise InputError("fork_of", "a session", expected)
            if tokens > parent.computed:
                expected = f"at most {parent.computed}, the length of the session to fork"
                raise InputError("position", tokens, expected)
            session.local.fork(parent.local, tokens)  # without the lock: 0.1 s for a long session
            session.computed = tokens
        finally:
            self._table.release(parent, session)

    def begin_with(self, session: EngineSession, parts: Sequence[BlockPart]) -> None:
        """Let a new session begin with kept blocks. Does nothing if its client has gone."""
        if self._table.hold(session):
            try:
                session.local.write_blocks(parts)
                session.computed = session.reused = len(parts) * BLOCK_TOKENS
            finally:
                self._table.release(session)

    def blocks_of(self, session: EngineSession, keys: Sequence[bytes], first: int) -> Sequence[BlockPart]:
        """Copies of a session's blocks from `first` on, up to as many as there are `keys`; none if it has ended."""
        if not self._table.hold(session):
            return []
        try:
            return session.local.keep_blocks(keys, first)
        finally:
            self._table.release(session)

    def drop(self, key: bytes, step_id: int) -> bool:
        """Mark a step and all before it as dropped by the client. Returns False if no session has that `key`."""
        session = self._table.find(key)
        if session is not None:
            session.drops["last"] = step_id
        return session is not None

    def close(self, session: EngineSession) -> None:
        """Free a session's memory, now or after the forward that uses it. Further calls do nothing."""
        self._table.close(session)
        with self._arrived:
            left = self._table.all()
            holders = {each.holder for each in left}
            self._turns = self._turns.only({each.group for each in left}, holders)

    def step(self, session: EngineSession, item: StageInput, *, truncate: bool = False) -> StageOutput:
        """Compute a step, in one forward with steps of other sessions if they can share it.

        `truncate` allows a position below the computed length. The output's timing has the seconds of the stage and of
        `queue`. Raises InputError for an unexpected position, StepUnwanted if the client dropped the step. Raises
        TrunkLate if it waited longer than `session.timeout_s` or its session ended.
        """
        _check_position(session, item.position, truncate)
        pending = self._queued(session, item)
        with self._arrived:
            idle = self._arrive_locked(pending)
            here = idle and self._runs_here_locked(pending)
            if here:
                self.running = 1
            elif not idle:
                self._arrived.notify()
        if here:
            self._run_here(pending)
        elif idle:
            self._thread.submit(self._run)
        return self._finished(pending)

    def step_together(self, steps: Sequence[tuple[EngineSession, StageInput]]) -> list[StageOutput]:
        """Compute a step of each session, all queued at once. Positions are not checked. Raises as `step`. The first
        output has the time of all."""
        began = time.perf_counter()
        queued = [self._queued(session, item) for session, item in steps]
        with self._arrived:
            idle = [self._arrive_locked(pending) for pending in queued][0]
            self._arrived.notify()
        if idle:
            self._thread.submit(self._run)
        outputs = [self._finished(pending) for pending in queued]
        spent = max(pending.computing_s for pending in queued)
        seconds = {self._stage.label: spent, "queue": time.perf_counter() - began - spent}
        timing = StageTiming(seconds, compile_s=max(output.timing.compile_s for output in outputs))
        return [StageOutput(output.x, StageTiming({}) if at else timing) for at, output in enumerate(outputs)]

    def _queued(self, session: EngineSession, item: StageInput) -> QueuedStep:
        return QueuedStep(
            group=session.group,
            holder=session.holder,
            left=self._stage.size(item),
            session=session,
            item=item,
            began=time.perf_counter(),
            last=self._stage.cut.last,
        )

    def _arrive_locked(self, pending: QueuedStep) -> bool:
        """Queue a step. Returns whether the engine was idle."""
        pending.session.pace.stepped(pending.began)
        pending.session.pending = pending
        self._pending.append(pending)
        idle, self._busy = not self._busy, True
        return idle

    def _finished(self, pending: QueuedStep) -> StageOutput:
        """Wait for the output of a queued step."""
        pending.ended.result()
        item, spent = pending.item, pending.computing_s
        pending.session.computed = item.position + item.x.shape[1]
        x = pending.outputs[0] if len(pending.outputs) == 1 else torch.cat(pending.outputs, dim=1)
        seconds = {self._stage.label: spent, "queue": time.perf_counter() - pending.began - spent}
        return StageOutput(x, StageTiming(seconds, compile_s=pending.compile_s))

    def _runs_here_locked(self, pending: QueuedStep) -> bool:
        """Whether the thread that read the step computes it: the shortcut of a lone client. It saves two wake-ups, 0.2
        ms or 2% of a token's time with `fast` (docs/server.md).

        Conditions: no other session's step is expected soon, and torch multiplies one row on one thread. The math
        library keeps 5 MB of buffers for each thread that multiplied matrices, and none for a single row.
        """
        alone = self._awaited_until_locked(pending.began + self.limits.gather_s) <= pending.began
        return alone and self._stage.computes_on_caller(pending.item) and not pending.dropped()

    def _run_here(self, pending: QueuedStep) -> None:
        if self._table.hold(pending.session):
            self._forward([(pending, 1)])
        with self._arrived:
            self._busy = bool(self._pending)
        if self._busy:
            self._thread.submit(self._run)

    def _run(self) -> None:
        """Run forwards until no step waits. Runs on the engine's thread."""
        while batch := self._next_batch():
            self._forward(batch)

    def _next_batch(self) -> Batch[QueuedStep]:
        """The batch of the next forward, its sessions held. If no step waits it is empty, and the engine is idle."""
        with self._arrived:
            self._gather_locked()
            batch: Batch[QueuedStep] = []
            while not batch and self._drop_locked():
                chosen = next_batch(self._pending, self.limits, self._turns, awaited=bool(self._expected_locked()))
                batch = [(pending, tokens) for pending, tokens in chosen if self._table.hold(pending.session)]
            self._busy, self.running = bool(batch), len(batch)
            return batch

    def _gather_locked(self) -> None:
        """Wait for sessions whose next step is due, at most `limits.gather_s`."""
        until = time.perf_counter() + self.limits.gather_s
        while (left := self._awaited_until_locked(until) - time.perf_counter()) > 0:
            self._arrived.wait(left)

    def _awaited_until_locked(self, until: float) -> float:
        """When the last of the steps that are due before `until` becomes overdue, and at most `until`."""
        overdue = (each.overdue_s for each in self._expected_locked() if each.due_s < until)
        return min(until, max(overdue, default=0.0))

    def _expected_locked(self) -> list[Pace]:
        """The pace of each client whose next step is expected and not overdue."""
        now = time.perf_counter()
        away = (each.pace for each in self._table.all() if each.pending is None and not each.closed)
        return [pace for pace in away if now < pace.overdue_s]

    def _drop_locked(self) -> bool:
        """End the steps that no client waits for any more. Returns whether others are left."""
        now = time.perf_counter()
        for pending in tuple(self._pending):
            session = pending.session
            if pending.dropped():
                self._end_locked(pending, StepUnwanted())
            elif session.closed or now > pending.began + session.timeout_s:
                why = "its session has ended" if session.closed else "it waited longer than its client's timeout"
                self._end_locked(pending, TrunkLate(f"the step was dropped: {why}", "step_late"))
        return bool(self._pending)

    def _end_locked(self, pending: QueuedStep, error: SplitlearnError | None = None) -> None:
        self._pending.remove(pending)
        pending.end(error)

    def _forward(self, batch: Batch[QueuedStep]) -> None:
        started = time.perf_counter()
        outcomes = self._outcomes([pending.chunk(tokens) for pending, tokens in batch])
        spent = time.perf_counter() - started
        if done := sum(isinstance(outcome, StageOutput) for outcome in outcomes):
            self._count(done, sum(tokens for _, tokens in batch), spent)
        self._table.release(*(pending.session for pending, _ in batch))
        with self._arrived:
            self._forwards, self.running = self._forwards + 1, 0
            self._turns = self._turns.after(batch, self._forwards)
            for (pending, tokens), outcome in zip(batch, outcomes, strict=True):
                pending.ran = self._forwards
                if not isinstance(outcome, StageOutput):
                    self._end_locked(pending, outcome)
                    continue
                pending.add(outcome, tokens, spent)
                if not pending.left:
                    self._end_locked(pending)

    def _outcomes(self, inputs: Sequence[StageInput]) -> list[StageOutput | SplitlearnError]:
        """The stage's outputs. If a forward of several steps fails, each is tried alone: one step's error must not fail
        the others."""
        try:
            outputs = self._stage.compute(inputs)
            return [self._checked(item, output) for item, output in zip(inputs, outputs, strict=True)]
        except Exception as error:
            if len(inputs) == 1:
                return [as_error(error, "computing")]
        return [self._outcomes([item])[0] for item in inputs]

    def _checked(self, item: StageInput, output: StageOutput) -> StageOutput | SplitlearnError:
        """The output. If it holds NaN or Inf: an error that names the layer where that began."""
        try:
            self._stage.check(item, output)
        except NotFinite as error:
            return TrunkFailed(str(error))
        return output


def _parts(slot: Slot | None, count: int) -> Sequence[Slot | None]:
    """The equal parts of `slot`."""
    if slot is None:
        return [None] * count
    each = slot.tokens // count
    return [Slot(slot.start + at * each, each) for at in range(count)]


def _check_position(session: EngineSession, position: int, truncate: bool) -> None:
    if session.recomputes and position:
        raise InputError("position", position, "0: without use_cache a step has the whole prefix")
    if not session.recomputes and position < session.computed and not truncate:
        raise InputError("position", position, f"{session.computed}; a smaller one needs truncate")

"""The engine: computes the steps of all sessions, as many as it can in one forward.

A handler thread brings a step and waits for its answer. One thread of the engine's own runs forwards as long as steps
wait. One shortcut saves a lone client both wake-ups: see `_runs_here_locked`.

`scheduler.py` chooses what a forward takes, `sessions.py` keeps the open sessions, `admission.py` decides who may open
one. Methods named `_locked` need the engine's lock.
"""

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from server.auth.gate import Quota
from server.monitoring.metrics import Metrics
from server.scheduling.admission import Admission
from server.scheduling.scheduler import Batch, Limits, Turns, next_batch
from server.scheduling.sessions import EngineSession, Pace, QueuedStep, SessionTable
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
from splitlearn.flags.registry import settings
from splitlearn.stages.base import StageInput, StageOutput
from splitlearn.stages.local import LocalStage


class Engine:
    """Runs one stage for many sessions. `thread` is a pool of one thread: see build() for why there is only one."""

    def __init__(
        self, stage: LocalStage, admission: Admission, limits: Limits, metrics: Metrics, thread: ThreadPoolExecutor
    ) -> None:
        self.limits = limits
        self._stage, self._admission, self._metrics, self._thread = stage, admission, metrics, thread
        self._table = SessionTable(admission)
        self._arrived = threading.Condition()
        self._pending: list[QueuedStep] = []
        self._busy = False
        self._turns, self._forwards = Turns(), 0
        self.running = 0
        """Steps in the forward that is computed now."""

    @property
    def waiting(self) -> int:
        """Steps that are in no forward yet."""
        return len(self._pending) - self.running

    def open(
        self,
        flags: frozenset[str],
        max_length: int,
        timeout_s: float,
        quota: Quota,
        when_gone: Callable[[Callable[[], None]], bool],
    ) -> EngineSession:
        """A session with room for `max_length` tokens, once there is room. Raises as `Admission.acquire`.

        A session without use_cache gets that room, too: its steps are computed in pieces like any prompt.
        """
        wanted = settings(flags).session
        reservation = self._admission.acquire(max_length, timeout_s, when_gone, quota.holder)
        try:
            cache = self._admission.pool.cache(reservation.slot) if reservation.slot else None
            kept = self._stage.session(cache, wanted, max_length, shares=self.limits.shared)
        except BaseException:  # of any kind: the reservation must not be lost with it
            self._admission.release(reservation)
            raise
        session = EngineSession(flags, kept, timeout_s, reservation, quota)
        self._table.add(session)
        return session

    def fork(self, session: EngineSession, key: bytes, tokens: int) -> None:
        """Begin `session` with the first `tokens` of the session named `key`.

        Raises TrunkForgot where that one is gone, InputError for what it cannot give.
        """
        parent = self._table.find(key)
        if parent is None or not self._table.hold(parent, session):
            raise TrunkForgot("the session to fork is not here (any more)", "branch_lost")
        try:
            if session.recomputes or session.computed or parent.flags != session.flags:
                expected = "said in the first step, with the same flags, with use_cache"
                raise InputError("fork_of", "a session", expected)
            if tokens > parent.computed:
                expected = f"at most {parent.computed}, the length of the session to fork"
                raise InputError("position", tokens, expected)
            session.cache.fork(parent.cache, tokens)  # without the lock: 0.1 s for a long session
            session.computed = tokens
        finally:
            self._table.let_go(parent, session)

    def drop(self, key: bytes, step_id: int) -> bool:
        """The client of the session named `key` drops that step and those before it. False: no such session."""
        session = self._table.find(key)
        if session is not None:
            session.drops["last"] = step_id
        return session is not None

    def close(self, session: EngineSession) -> None:
        """Free a session's memory, now or after the forward that uses it. Closing it again does nothing."""
        self._table.close(session)
        with self._arrived:
            left = self._table.all()
            holders = {each.quota.holder for each in left}
            self._turns = self._turns.only({each.group for each in left}, holders)

    def step(self, session: EngineSession, item: StageInput, *, truncate: bool = False) -> StageOutput:
        """Compute a step, in one forward with steps of other sessions where they can share it. To `truncate` allows a
        position before the end of what is computed. The output's timing has what `trunk` and `queue` took.

        Raises InputError for a position that does not follow, TrunkLate when the step waited for longer than
        `session.timeout_s` or its session ended, StepUnwanted when its client dropped it.
        """
        _check_position(session, item.position, truncate)
        began = time.perf_counter()
        tokens, holder = item.x.shape[1], session.quota.holder
        pending = QueuedStep(group=session.group, holder=holder, left=tokens, session=session, item=item, began=began)
        with self._arrived:
            session.pace.stepped(began)
            session.pending = pending
            self._pending.append(pending)
            idle, self._busy = not self._busy, True
            here = idle and self._runs_here_locked(pending)
            if here:
                self.running = 1
            elif not idle:
                self._arrived.notify()
        if here:
            self._run_here(pending)
        elif idle:
            self._thread.submit(self._run)
        pending.ended.result()
        session.computed = item.position + tokens
        x = pending.outputs[0] if len(pending.outputs) == 1 else torch.cat(pending.outputs, dim=1)
        took = {"trunk": pending.trunk_s, "queue": time.perf_counter() - began - pending.trunk_s}
        return StageOutput(x, StageTiming(took, compile_s=pending.compile_s))

    def _runs_here_locked(self, pending: QueuedStep) -> bool:
        """The lone client's shortcut: the thread that read its token computes it. Both wake-ups of a hand-over take 0.2
        ms, 2% of a token's time with `fast` (docs/server.md).

        Only where no other session is about to bring a step, and where torch multiplies one row on one thread: the math
        library keeps 5 MB of buffers for each thread that multiplied matrices, and none for a single row.
        """
        alone = self._awaited_until_locked(pending.began + self.limits.gather_s) <= pending.began
        return alone and self._stage.computes_on_caller(pending.left) and not pending.dropped()

    def _run_here(self, pending: QueuedStep) -> None:
        if self._table.hold(pending.session):
            self._forward([(pending, 1)])
        with self._arrived:
            self._busy = bool(self._pending)
        if self._busy:
            self._thread.submit(self._run)

    def _run(self) -> None:
        """The engine's thread: forwards until no step waits."""
        while batch := self._next_batch():
            self._forward(batch)

    def _next_batch(self) -> Batch[QueuedStep]:
        """What the next forward computes, its sessions held; empty, and the engine idle, where no step waits."""
        with self._arrived:
            self._gather_locked()
            batch: Batch[QueuedStep] = []
            while not batch and self._drop_locked():
                chosen = next_batch(self._pending, self.limits, self._turns, awaited=bool(self._coming_locked()))
                batch = [(pending, tokens) for pending, tokens in chosen if self._table.hold(pending.session)]
            self._busy, self.running = bool(batch), len(batch)
            return batch

    def _gather_locked(self) -> None:
        """Wait for sessions whose next step is due; no longer than `limits.gather_s`."""
        until = time.perf_counter() + self.limits.gather_s
        while (left := self._awaited_until_locked(until) - time.perf_counter()) > 0:
            self._arrived.wait(left)

    def _awaited_until_locked(self, until: float) -> float:
        """When the last of the steps that are due before `until` will be overdue; no later than `until`."""
        overdue = (each.overdue_s for each in self._coming_locked() if each.due_s < until)
        return min(until, max(overdue, default=0.0))

    def _coming_locked(self) -> list[Pace]:
        """The pace of each client that is at work on its next step, as far as one can tell."""
        now = time.perf_counter()
        away = (each.pace for each in self._table.all() if each.pending is None and not each.closed)
        return [pace for pace in away if now < pace.overdue_s]

    def _drop_locked(self) -> bool:
        """End the steps for which nobody waits any more; whether others are left."""
        now = time.perf_counter()
        for pending in tuple(self._pending):
            session = pending.session
            if pending.dropped():
                self._end_locked(pending, StepUnwanted())
            elif session.closed or now > pending.began + session.timeout_s:
                why = "its session has ended" if session.closed else "it waited for longer than its client does"
                self._end_locked(pending, TrunkLate(f"the step was dropped: {why}", "step_late"))
        return bool(self._pending)

    def _end_locked(self, pending: QueuedStep, error: SplitlearnError | None = None) -> None:
        self._pending.remove(pending)
        pending.end(error)

    def _forward(self, batch: Batch[QueuedStep]) -> None:
        started = time.perf_counter()
        outcomes = self._outcomes([pending.piece(tokens) for pending, tokens in batch])
        spent = time.perf_counter() - started
        if done := sum(isinstance(outcome, StageOutput) for outcome in outcomes):
            self._metrics.forward(done, spent)
        self._table.let_go(*(pending.session for pending, _ in batch))
        with self._arrived:
            self._forwards, self.running = self._forwards + 1, 0
            self._turns = self._turns.after(batch, self._forwards)
            for (pending, _), outcome in zip(batch, outcomes, strict=True):
                pending.ran = self._forwards
                if not isinstance(outcome, StageOutput):
                    self._end_locked(pending, outcome)
                    continue
                pending.add(outcome, spent)
                if not pending.left:
                    self._end_locked(pending)

    def _outcomes(self, inputs: Sequence[StageInput]) -> list[StageOutput | SplitlearnError]:
        """The stage's outputs. If a forward of several fails, each is tried alone, so that one cannot hurt another."""
        try:
            outputs = self._stage.compute(inputs)
            return [self._checked(item, output) for item, output in zip(inputs, outputs, strict=True)]
        except Exception as error:
            if len(inputs) == 1:
                return [as_error(error, "computing")]
        return [self._outcomes([item])[0] for item in inputs]

    def _checked(self, item: StageInput, output: StageOutput) -> StageOutput | SplitlearnError:
        """The output; where it holds NaN or Inf, an error that names the layer where that began."""
        try:
            self._stage.check(item, output)
        except NotFinite as error:
            return TrunkFailed(str(error))
        return output


def _check_position(session: EngineSession, position: int, truncate: bool) -> None:
    if session.recomputes and position:
        raise InputError("position", position, "0: without use_cache a step has the whole prefix")
    if not session.recomputes and position < session.computed and not truncate:
        raise InputError("position", position, f"{session.computed}, or truncate to go back from there")

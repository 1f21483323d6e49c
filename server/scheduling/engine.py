"""The engine: the steps of all sessions, as many as wait in one forward.

A handler's thread brings a step and waits for its answer. The first that finds the engine idle leads, and goes on
until its own step is done; then it hands the lead to one that still waits. A forward of one row on one thread is
computed by the thread that leads, so that one client alone has its tokens computed by the thread that read them; all
others are by one thread of the engine's own.

What a forward takes is server/scheduling/scheduler.py's choice. Sessions join and leave between two forwards.
"""

import secrets
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass

import torch

from server.monitoring.metrics import Metrics
from server.scheduling.admission import Admission
from server.scheduling.scheduler import Turns, next_batch
from server.scheduling.sessions import Job, Seat
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
from splitlearn.flags.registry import settings
from splitlearn.stages.base import StageInput, StageOutput
from splitlearn.stages.local import LocalSession, LocalStage

ALONE_TOKENS = 256
"""Tokens of prompts in a forward while nobody decodes: a step that comes meanwhile waits for no more than those. 512
tokens take as long in two pieces as in one (docs/server.md)."""
WHOLE = sys.maxsize


@dataclass(frozen=True)
class EngineStep:
    """The answer to a step: hidden state [1, T, H], and seconds of computing, of waiting for it, and of compiling."""

    x: torch.Tensor
    trunk_s: float
    queue_s: float
    compile_s: float


class Engine:
    """Runs one stage for many sessions.

    `prompt_tokens` bounds what prompts take of a forward while others decode, None for a stage that computes a prompt
    whole. `gather_s` is how long a forward waits for sessions that are about to bring their next step; None for a stage
    that takes one session a forward.
    """

    def __init__(
        self,
        stage: LocalStage,
        admission: Admission,
        prompt_tokens: int | None,
        gather_s: float | None,
        metrics: Metrics,
        thread: ThreadPoolExecutor,
    ) -> None:
        self._stage, self._admission, self._metrics = stage, admission, metrics
        self._prompt_tokens = WHOLE if prompt_tokens is None else prompt_tokens
        self._gather_s, self.packs = gather_s or 0.0, gather_s is not None
        self._arrived = threading.Condition()
        self._seats: list[Seat] = []
        self._jobs: list[Job] = []
        self._forwards = 0
        self._turns = Turns({}, {})
        self._led = False
        self._own_thread = thread
        self._uncounted: deque[tuple[int, float]] = deque()

    @property
    def waiting(self) -> int:
        """Steps that are in no forward yet."""
        return sum(not job.seat.running for job in tuple(self._jobs))

    def open(
        self,
        applied: frozenset[str],
        max_length: int,
        timeout_s: float,
        when_gone: Callable[[Callable[[], None]], bool],
        holder: str = "",
    ) -> Seat:
        """A session of `holder` with room for `max_length` tokens, once there is. Raises as `Admission.enter`.

        A session without use_cache has that room, too: its steps are computed in pieces, as those of the others are,
        and keep nothing for the next one.
        """
        wanted = settings(applied).session
        place = self._admission.enter(max_length, timeout_s, when_gone, holder)
        try:
            cache = self._admission.pool.cache(place.run) if place.run else None
            session = LocalSession(cache, wanted, max_length, shares=self.packs)
        except BaseException:  # whatever it is, the place is not lost with it
            self._admission.leave(place)
            raise
        seat = Seat(session, applied, place, packs=self.packs)
        with self._arrived:
            self._seats.append(seat)
        return seat

    def branch(self, seat: Seat, key: bytes, tokens: int) -> None:
        """Begin `seat`'s session with the first `tokens` that the session named `key` holds.

        Raises TrunkForgot where there is no such session (any more), InputError for what it cannot give.
        """
        with self._arrived:
            parent = self._named(key)
            if parent is None or parent.closed or seat.closed:
                raise TrunkForgot("the session to branch from is not here (any more)", "branch_lost")
            held, own = parent.session, seat.session
            if seat.recomputes or own.length or parent.applied != seat.applied:
                raise InputError(
                    "branch_of", "a session", "said in the first step, with the same flags, with use_cache"
                )
            if tokens > held.length:
                raise InputError("position", tokens, f"at most {held.length}, the length of the session to branch from")
            for each in (parent, seat):
                each.copied += 1  # so that the memory of neither is another one's meanwhile
        try:
            own.branch(held, tokens)  # of a long session a tenth of a second, in which others go on
        finally:
            with self._arrived:
                for each in (parent, seat):
                    each.copied -= 1
                    self._free_if_over(each)

    def drop(self, key: bytes, step_id: int) -> bool:
        """The client of the session named `key` wants that step no more, nor any before it. False: no such session."""
        with self._arrived:
            seat = self._named(key)
            if seat is not None:
                seat.unwanted = step_id
        return seat is not None

    def _named(self, key: bytes) -> Seat | None:
        return next((each for each in self._seats if secrets.compare_digest(each.key, key)), None)

    def step(
        self,
        seat: Seat,
        position: int,
        x: torch.Tensor,
        timeout_s: float,
        roll_back: bool = False,
        uncertain: int | None = None,
        rope_length: int = 0,
    ) -> EngineStep:
        """Compute `x` [1, T, H] from `position` on, together with what the other sessions bring.

        `rope_length` is that of `StageInput`. Raises InputError for a position that does not follow, TrunkLate when it
        waited for longer than `timeout_s` or its session has ended, StepUnwanted when it was `uncertain`, a step's
        number, and dropped.
        """
        session, began = seat.session, time.perf_counter()
        if seat.recomputes and position:
            raise InputError("position", position, "0: without use_cache a step has the whole prefix")
        if not seat.recomputes and position < session.length and not roll_back:
            raise InputError("position", position, f"{session.length}, or roll_back to go back from there")
        # Said here for all the pieces in which it is computed.
        rope_length = rope_length or position + x.shape[1]
        job = Job(seat, position, x, began + timeout_s, began, uncertain, rope_length)
        with self._arrived:
            seat.returns(began)
            self._jobs.append(job)
            if self._led:
                job.wake = threading.Event()
                self._arrived.notify()
            self._led = True
        if job.wake is not None:
            job.wake.wait()
        if not job.finished:
            self._lead(job)
        if job.error is not None:
            raise job.error
        out = job.outputs[0] if len(job.outputs) == 1 else torch.cat(job.outputs, dim=1)
        return EngineStep(out, job.trunk_s, time.perf_counter() - began - job.trunk_s, job.compile_s)

    def count(self) -> None:
        """Count the forwards since the last time, where no client waits for it."""
        with suppress(IndexError):
            while True:
                self._metrics.forward(*self._uncounted.popleft())

    def close(self, seat: Seat) -> None:
        """Free a session's memory; at once, or after the forward that it takes part in."""
        self.count()
        with self._arrived:
            if seat.closed:
                return
            seat.closed = True
            self._free_if_over(seat)

    def _lead(self, own: Job) -> None:
        """Run forwards until `own` is done, then let another thread that waits go on."""
        try:
            while not own.finished:
                self._forward(self._gather())
        finally:
            with self._arrived:
                waiting = next((job.wake for job in self._jobs if job.wake is not None and job is not own), None)
                self._led = waiting is not None
                if waiting is not None:
                    waiting.set()

    def _gather(self) -> list[tuple[Job, int]]:
        """The jobs of the next forward, and how many tokens of each."""
        with self._arrived:
            until = time.perf_counter() + self._gather_s
            while len(self._jobs) < len(self._seats) and (left := self._awaited_until(until) - time.perf_counter()) > 0:
                self._arrived.wait(left)
            self._drop()
            chosen = self._chosen()
            for job, _ in chosen:
                job.seat.running = True
            return chosen

    def _awaited_until(self, until: float) -> float:
        """When the last of the sessions that should bring a step before `until` is overdue; no later than `until`."""
        return min(until, max((seat.overdue_s for seat in self._coming() if seat.due_s < until), default=0.0))

    def _coming(self) -> list[Seat]:
        """Sessions without a step here whose clients are at work on the next one, as far as one can tell."""
        here, now = {id(job.seat) for job in self._jobs}, time.perf_counter()
        return [seat for seat in self._seats if id(seat) not in here and not seat.closed and now < seat.overdue_s]

    def _drop(self) -> None:
        """What nobody waits for (any more) is not computed."""
        now = time.perf_counter()
        for job in [job for job in self._jobs if job.unwanted()]:
            self._finish(job, StepUnwanted())
        for job in [job for job in self._jobs if job.seat.closed or now > job.deadline]:
            why = "its session has ended" if job.seat.closed else "it waited for longer than its client said it would"
            self._finish(job, TrunkLate(f"the step was dropped: {why}", "step_late"))

    def _chosen(self) -> list[tuple[Job, int]]:
        """The steps of the next forward, each with a number of tokens."""
        if len(self._jobs) == 1 and self._jobs[0].left == 1:
            return [(self._jobs[0], 1)]
        alone = max(self._prompt_tokens, ALONE_TOKENS)
        return next_batch(self._jobs, self._prompt_tokens, alone, self._turns, awaited=bool(self._coming()))

    def _count_turns(self, chosen: Sequence[tuple[Job, int]]) -> None:
        """Note whose turn this forward was."""
        self._forwards += 1
        groups = {job.group: self._forwards for job, _ in chosen}
        holders = {job.holder: self._forwards for job, _ in chosen if job.left > 1}
        self._turns = Turns({**self._turns.groups, **groups}, {**self._turns.holders, **holders})

    def _forward(self, chosen: Sequence[tuple[Job, int]]) -> None:
        """One forward of the stage, its outcome given to the jobs."""
        inputs = [
            StageInput(
                job.seat.session,
                job.position + job.done,
                job.next(tokens),
                unwanted=None if job.uncertain is None else job.unwanted,
                rope_length=job.rope_length,
            )
            for job, tokens in chosen
        ]
        started = time.perf_counter()
        outcomes = self._computed(inputs)
        ended = time.perf_counter()
        done = sum(not isinstance(outcome, SplitlearnError) for outcome in outcomes)
        if done:
            self._uncounted.append((done, ended - started))
        with self._arrived:
            self._count_turns(chosen)
            for (job, tokens), outcome in zip(chosen, outcomes, strict=True):
                job.seat.running = False
                job.ran = self._forwards
                if isinstance(outcome, SplitlearnError):
                    self._finish(job, outcome)
                    continue
                job.outputs.append(outcome.x)
                job.done += tokens
                job.trunk_s += ended - started
                job.compile_s += outcome.timing.compile_s
                if job.finished:
                    self._finish(job)

    def _computed(self, inputs: Sequence[StageInput]) -> list[StageOutput | SplitlearnError]:
        """The outcomes of one forward: of a single row on one thread in this thread, of more in the engine's own.

        The math library keeps buffers for each thread that ever multiplied matrices: 5 MB for each, 100 MB with a few
        clients. One row is multiplied without. And only one thread should have others to compute with: see build().
        """
        if self._stage.row_threads == 1 and sum(item.x.shape[1] for item in inputs) <= 1:
            return self._outcomes(inputs)
        return self._own_thread.submit(self._outcomes, inputs).result()

    def _outcomes(self, inputs: Sequence[StageInput]) -> list[StageOutput | SplitlearnError]:
        """The stage's outputs. If a forward of several fails, each is tried alone, so that one cannot hurt another."""
        try:
            outputs = self._stage.compute(inputs) if inputs else []
            return [self._checked(item, output) for item, output in zip(inputs, outputs, strict=True)]
        except Exception as error:
            if len(inputs) == 1:
                return [as_error(error, "computing")]
        return [self._outcomes([item])[0] for item in inputs]

    def _checked(self, item: StageInput, output: StageOutput) -> StageOutput | SplitlearnError:
        """The output; or, where it holds what is no number, an error that says in which layer that began."""
        try:
            self._stage.check(item, output)
        except NotFinite as error:
            return TrunkFailed(str(error))
        return output

    def _finish(self, job: Job, error: SplitlearnError | None = None) -> None:
        """Wake the thread that waits for `job`."""
        job.error = error
        self._jobs.remove(job)
        job.seat.answered = time.perf_counter()
        self._free_if_over(job.seat)
        if job.wake is not None:
            job.wake.set()

    def _free_if_over(self, seat: Seat) -> None:
        if not seat.closed or not seat.idle or seat.freed:
            return
        seat.freed = True
        self._seats.remove(seat)
        groups, holders = {each.group for each in self._seats}, {each.holder for each in self._seats}
        self._turns = Turns(
            {group: ran for group, ran in self._turns.groups.items() if group in groups},
            {holder: ran for holder, ran in self._turns.holders.items() if holder in holders},
        )
        seat.session.close()
        self._admission.leave(seat.place)

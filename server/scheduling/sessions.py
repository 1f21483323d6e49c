"""A client's session, and the table of those that are open."""

import secrets
import threading
import time
from collections import deque
from collections.abc import Hashable
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from statistics import median_low
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from server.auth.gate import Quota
from server.scheduling.admission import Admission, Reservation
from server.scheduling.scheduler import Waiting
from splitlearn.errors import SplitlearnError
from splitlearn.stages.base import DROPS, StageInput, StageOutput
from splitlearn.stages.session import LocalSession

# A client is awaited for so many times its usual pause, plus the slack.
OVERDUE, SLACK_S, LONGEST_PAUSE_S = 3.0, 0.005, 1.0
PAUSES = 5
KEY_BYTES = 16


class Pace:
    """How long a client usually pauses between an answer and its next step: the median of its last PAUSES, so that one
    long pause, as after a prompt, changes nothing. `due_s` and `overdue_s` are when the next step should be here, and
    from when on nobody waits for it; a client without an answer is not awaited at all."""

    def __init__(self) -> None:
        self.due_s, self.overdue_s = float("inf"), 0.0
        self._answered: float | None = None
        self._pauses: deque[float] = deque(maxlen=PAUSES)

    def stepped(self, now: float) -> None:
        if self._answered is not None:
            self._pauses.append(now - self._answered)

    def answered(self, now: float) -> None:
        self._answered = now
        pause_s = median_low(self._pauses) if self._pauses else float("inf")
        self.due_s, self.overdue_s = now + pause_s, now + OVERDUE * min(pause_s, LONGEST_PAUSE_S) + SLACK_S


@dataclass(eq=False)
class EngineSession:
    """An open session: `cache` is its state at the stage, `computed` the length of the prefix computed so far."""

    flags: frozenset[str]
    cache: LocalSession
    timeout_s: float
    reservation: Reservation
    quota: Quota
    key: bytes = field(default_factory=lambda: secrets.token_bytes(KEY_BYTES))
    """Names it to its client, who may drop a step by it or fork its session."""
    pace: Pace = field(default_factory=Pace)
    pending: "QueuedStep | None" = None
    computed: int = 0
    drops: NDArray[Any] = field(default_factory=lambda: np.zeros(1, DROPS))
    users: int = 0
    """Forwards and copies that use its memory now."""
    closed: bool = False

    @property
    def recomputes(self) -> bool:
        """Whether each step brings the whole prefix: its flags keep no cache from step to step."""
        return self.cache.settings.new_cache is None

    @property
    def group(self) -> Hashable:
        """Equal for sessions that can share a forward: what their flags change of what is computed. Wire format, cache
        and autograd's bookkeeping change nothing of it."""
        return tuple(sorted(self.cache.settings.forward_arguments.items())) if self.cache.shares else id(self)


@dataclass(eq=False, kw_only=True)
class QueuedStep(Waiting):
    """A step that waits or runs. `ended` is set with the end or the error."""

    session: EngineSession
    item: StageInput
    began: float
    outputs: list[torch.Tensor] = field(default_factory=list)
    trunk_s: float = 0.0
    compile_s: float = 0.0
    ended: Future[None] = field(default_factory=Future)

    def dropped(self) -> bool:
        mark = self.item.mark
        return mark is not None and mark.dropped()

    def piece(self, tokens: int) -> StageInput:
        """The next `tokens` as the stage's input."""
        item, whole = self.item, self.item.x.shape[1]
        if tokens == whole:
            return item
        done = whole - self.left
        rope_length = item.rope_length or item.position + whole  # the same for all pieces
        x = item.x[:, done : done + tokens]
        return replace(item, position=item.position + done, x=x, rope_length=rope_length)

    def add(self, output: StageOutput, seconds: float) -> None:
        self.outputs.append(output.x)
        self.left -= output.x.shape[1]
        self.trunk_s += seconds
        self.compile_s += output.timing.compile_s

    def end(self, error: SplitlearnError | None = None) -> None:
        """Wake the thread that waits for it."""
        self.session.pending = None
        self.session.pace.answered(time.perf_counter())
        if error is None:
            self.ended.set_result(None)
        else:
            self.ended.set_exception(error)


class SessionTable:
    """The open sessions. A closed one keeps its memory while a forward or a copy uses it."""

    def __init__(self, admission: Admission) -> None:
        self._admission = admission
        self._lock = threading.Lock()
        self._sessions: list[EngineSession] = []

    def all(self) -> tuple[EngineSession, ...]:
        """Those that have memory now, the closed ones too."""
        return tuple(self._sessions)

    def add(self, session: EngineSession) -> None:
        with self._lock:
            self._sessions.append(session)

    def find(self, key: bytes) -> EngineSession | None:
        """The session of that key. The search takes as long for a guess that is nearly right."""
        return next((each for each in self.all() if secrets.compare_digest(each.key, key)), None)

    def hold(self, *sessions: EngineSession) -> bool:
        """Keep the memory of `sessions` until `let_go`. False, and nothing is held, where one of them is closed."""
        with self._lock:
            if any(session.closed for session in sessions):
                return False
            for session in sessions:
                session.users += 1
            return True

    def let_go(self, *sessions: EngineSession) -> None:
        """Undo `hold`; frees those that were closed meanwhile."""
        with self._lock:
            for session in sessions:
                session.users -= 1
                self._free_locked(session)

    def close(self, session: EngineSession) -> None:
        """Free its memory, now or when nothing uses it any more. Closing it again does nothing."""
        with self._lock:
            session.closed = True
            self._free_locked(session)

    def _free_locked(self, session: EngineSession) -> None:
        if session.closed and not session.users and session in self._sessions:
            self._sessions.remove(session)
            session.cache.close()
            self._admission.release(session.reservation)

"""A client's session at the engine, its queued step, and the table of open sessions."""

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

from splitlearn.errors import SplitlearnError
from splitlearn.scheduling.admission import Admission, Reservation
from splitlearn.scheduling.contract import OwnSession
from splitlearn.scheduling.scheduler import QueueEntry
from splitlearn.stages.base import DROPS, StageInput, StageOutput

# A step is overdue after OVERDUE times its client's usual pause, plus the slack.
OVERDUE, SLACK_S, LONGEST_PAUSE_S = 3.0, 0.005, 1.0
PAUSES = 5
KEY_BYTES = 16


class Pace:
    """Predicts a client's next step by its usual pause after an answer: the median of its last PAUSES, so that one long
    pause, as after a prompt, changes nothing. `due_s`: when the step is expected. `overdue_s`: when the engine stops
    waiting for it. No step is expected before the first answer."""

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
    """An open session of at most `max_length` tokens. `local` is its session at the stage, `computed` the length of the
    prefix computed so far. Samples of one answer may have one `reservation` together."""

    local: OwnSession
    max_length: int
    timeout_s: float
    reservation: Reservation
    key: bytes = field(default_factory=lambda: secrets.token_bytes(KEY_BYTES))
    """A secret of its client, which drops steps and forks the session by it."""
    pace: Pace = field(default_factory=Pace)
    pending: "QueuedStep | None" = None
    computed: int = 0
    reused: int = 0
    """Tokens of the prefix that an earlier session computed."""
    drops: NDArray[Any] = field(default_factory=lambda: np.zeros(1, DROPS))
    users: int = 0
    """Forwards and forks that use its memory now."""
    closed: bool = False

    @property
    def flags(self) -> frozenset[str]:
        return self.local.settings.words

    @property
    def holder(self) -> str:
        return self.reservation.holder

    @property
    def recomputes(self) -> bool:
        """Whether each step brings the whole prefix, since no cache is kept between steps."""
        return self.local.settings.new_cache is None

    @property
    def group(self) -> Hashable:
        """Equal for sessions that can share a forward: the arguments that their flags give to the model's forward. Wire
        format, cache and autograd mode do not count."""
        return tuple(sorted(self.local.settings.forward_arguments.items())) if self.local.shares else id(self)


@dataclass(eq=False, kw_only=True)
class QueuedStep(QueueEntry):
    """A step that waits or runs. `ended` completes once all of it is computed, or with an error. `last`: its output is
    the logits of the last `item.logits` positions."""

    session: EngineSession
    item: StageInput
    began: float
    last: bool = False
    outputs: list[torch.Tensor] = field(default_factory=list)
    computing_s: float = 0.0
    compile_s: float = 0.0
    ended: Future[None] = field(default_factory=Future)

    def __post_init__(self) -> None:
        self.whole = self.left

    def dropped(self) -> bool:
        mark = self.item.mark
        return mark is not None and mark.dropped()

    def chunk(self, tokens: int) -> StageInput:
        """The next `tokens` as the stage's input."""
        item, whole = self.item, self.item.x.shape[1]
        if tokens == self.whole:
            return item
        done = whole - self.left
        rope_length = item.rope_length or item.position + whole  # the same for all chunks
        x = item.x[:, done : done + tokens]
        logits = max(1, self._logits(tokens))
        return replace(item, position=item.position + done, x=x, rope_length=rope_length, logits=logits)

    def _logits(self, tokens: int) -> int:
        """Of how many of the next `tokens` the logits are asked for."""
        after = self.left - tokens
        return max(0, min(tokens, (self.item.logits or self.whole) - after))

    def add(self, output: StageOutput, tokens: int, seconds: float) -> None:
        """Take the output for the next `tokens`."""
        if wanted := self._logits(tokens) if self.last else tokens:
            self.outputs.append(output.x[:, -wanted:])
        self.left -= tokens
        self.computing_s += seconds
        self.compile_s += output.timing.compile_s

    def end(self, error: SplitlearnError | None = None) -> None:
        """Wake the thread that waits for the step."""
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
        """All sessions that have memory now, including closed ones."""
        return tuple(self._sessions)

    def add(self, *sessions: EngineSession) -> None:
        with self._lock:
            self._sessions.extend(sessions)

    def find(self, key: bytes) -> EngineSession | None:
        """The session with that key. Its comparisons take constant time, so that their time reveals nothing."""
        return next((each for each in self.all() if secrets.compare_digest(each.key, key)), None)

    def hold(self, *sessions: EngineSession) -> bool:
        """Keep the memory of `sessions` until `release`. Returns False, and holds nothing, if one of them is closed."""
        with self._lock:
            if any(session.closed for session in sessions):
                return False
            for session in sessions:
                session.users += 1
            return True

    def release(self, *sessions: EngineSession) -> None:
        """Undo `hold`, and free the sessions that were closed meanwhile."""
        with self._lock:
            for session in sessions:
                session.users -= 1
                self._free_locked(session)

    def close(self, session: EngineSession) -> None:
        """Free its memory, now or once nothing uses it. Further calls do nothing."""
        with self._lock:
            session.closed = True
            self._free_locked(session)

    def _free_locked(self, session: EngineSession) -> None:
        if session.closed and not session.users and session in self._sessions:
            self._sessions.remove(session)
            session.local.close()
            if not any(each.reservation is session.reservation for each in self._sessions):
                self._admission.release(session.reservation)

"""Who may come in: sessions up to a number and a budget of KV memory. Others wait in a short line, or are sent away.

First come, first served: a session that needs much is not overtaken by smaller ones behind it. Nobody waits longer than
they said they would, and nobody who would stand behind a full line waits at all.
"""

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from splitlearn.errors import InputError, TrunkFull, TrunkUnavailable
from splitlearn.kv import KVPool, Run

FIRST_GUESS_S = 5.0
RETRY_S = (0.1, 30.0)
DRAINING = "this trunk server is shutting down"


@dataclass
class Place:
    """A session's place: its run of the pool, None for one that keeps nothing; and since when it has it."""

    run: Run | None
    since: float = 0.0


@dataclass(eq=False)
class _Ticket:
    """A session in the line. It is woken when it has a place, and when it need not wait any more."""

    tokens: int
    place: Place | None = None
    wake: threading.Event = field(default_factory=threading.Event)


class Admission:
    """Hands out places. `sessions` and `waiting` say how many there are now."""

    def __init__(self, pool: KVPool, max_sessions: int, max_waiting: int) -> None:
        self.pool = pool
        self.sessions = 0
        self._max_sessions, self._max_waiting = max_sessions, max_waiting
        self._lock = threading.Lock()
        self._line: deque[_Ticket] = deque()
        self._stay_s = FIRST_GUESS_S
        self._draining = False

    @property
    def waiting(self) -> int:
        """Sessions in the line."""
        return len(self._line)

    def enter(self, tokens: int, timeout_s: float, when_gone: Callable[[Callable[[], None]], bool]) -> Place:
        """A place with room for `tokens` (0: no KV memory), waited for at most `timeout_s`.

        `when_gone` is given what is to be called when nobody waits for the place any more; it returns False if that is
        so already. Raises TrunkFull for a full line and for a wait that was too long, InputError for what never fits,
        TrunkUnavailable when the server is shutting down.
        """
        if tokens > self.pool.capacity:
            limit = f"at most {self.pool.capacity} tokens: server.kv_bytes has room for no more"
            raise InputError("max_length", tokens, limit)
        with self._lock:
            self._check_open()
            if not self._line and self._room(tokens):
                return self._take(tokens)
            if len(self._line) >= self._max_waiting:
                raise self._full(f"{len(self._line)} sessions are waiting already", "line_full")
            ticket = _Ticket(tokens)
            self._line.append(ticket)
        if not when_gone(ticket.wake.set):
            ticket.wake.set()
        ticket.wake.wait(timeout_s)
        with self._lock:
            if ticket.place is not None:
                return ticket.place
            self._line.remove(ticket)
            self._admit()  # those behind it may need less
            self._check_open()
            raise self._full(f"there was no room within {timeout_s:g} s", "wait_over")

    def leave(self, place: Place) -> None:
        """Give a place back."""
        with self._lock:
            self.sessions -= 1
            if place.run is not None:
                self.pool.release(place.run)
            self._stay_s += 0.2 * (time.monotonic() - place.since - self._stay_s)
            self._admit()

    def drain(self) -> None:
        """Let nobody in any more."""
        with self._lock:
            self._draining = True
            for ticket in self._line:
                ticket.wake.set()

    def _admit(self) -> None:
        """Give places to the first in the line, as far as there is room."""
        while self._line and not self._draining and self._room(self._line[0].tokens):
            ticket = self._line.popleft()
            ticket.place = self._take(ticket.tokens)
            ticket.wake.set()

    def _check_open(self) -> None:
        if self._draining:
            raise TrunkUnavailable(DRAINING, "draining")

    def _room(self, tokens: int) -> bool:
        return self.sessions < self._max_sessions and (not tokens or self.pool.fits(tokens))

    def _take(self, tokens: int) -> Place:
        self.sessions += 1
        return Place(self.pool.reserve(tokens) if tokens else None, time.monotonic())

    def _full(self, why: str, cause: str) -> TrunkFull:
        """With the time after which a place should be free for one more: what a stay took lately, shared by all."""
        shortest, longest = RETRY_S
        retry_s = self._stay_s * (1 + len(self._line)) / max(1, self.sessions)
        blocks = f"{self.pool.blocks_used} of {self.pool.n_blocks} KV blocks"
        used = f"{self.sessions} of {self._max_sessions} sessions, {blocks}"
        return TrunkFull(f"no room: {why} ({used} in use)", min(longest, max(shortest, retry_s)), cause)

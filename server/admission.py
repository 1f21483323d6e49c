"""Who may come in: sessions up to a number and a budget of KV memory. Others wait in a short line, or are sent away.

First come, first served: a session that needs much is not overtaken by smaller ones behind it. Nobody waits longer than
they said they would, and nobody who would stand behind a full line waits at all.
"""

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from splitlearn.errors import InputError, TrunkFull, TrunkUnavailable
from splitlearn.kv import KVPool, Run

# How often a waiting session looks whether its client is still there.
LOOK_S = 0.05
FIRST_GUESS_S = 5.0
RETRY_S = (0.1, 30.0)
DRAINING = "this trunk server is shutting down"


@dataclass
class Place:
    """A session's place: its run of the pool, None for one that keeps nothing; and since when it has it."""

    run: Run | None
    since: float = 0.0


class Admission:
    """Hands out places. `sessions` and `waiting` say how many there are now."""

    def __init__(self, pool: KVPool, max_sessions: int, max_waiting: int) -> None:
        self.pool = pool
        self.sessions = 0
        self._max_sessions, self._max_waiting = max_sessions, max_waiting
        self._changed = threading.Condition()
        self._line: deque[object] = deque()
        self._stay_s = FIRST_GUESS_S
        self._draining = False

    @property
    def waiting(self) -> int:
        """Sessions in the line."""
        return len(self._line)

    def enter(self, tokens: int, timeout_s: float, wanted: Callable[[], bool]) -> Place:
        """A place with room for `tokens` (0: no KV memory), waited for at most `timeout_s` while it is `wanted`.

        Raises TrunkFull for a full line and for a wait that was too long, InputError for what never fits,
        TrunkUnavailable when the server is shutting down.
        """
        if tokens > self.pool.capacity:
            limit = f"at most {self.pool.capacity} tokens: server.kv_bytes has room for no more"
            raise InputError("max_length", tokens, limit)
        ticket, deadline = object(), time.monotonic() + timeout_s
        with self._changed:
            if len(self._line) >= self._max_waiting and (self._line or not self._room(tokens)):
                raise self._full(f"{len(self._line)} sessions are waiting already", "line_full")
            self._line.append(ticket)
            try:
                while True:
                    if self._draining:
                        raise TrunkUnavailable(DRAINING, "draining")
                    if self._line[0] is ticket and self._room(tokens):
                        return self._take(tokens)
                    left = deadline - time.monotonic()
                    if left <= 0 or not wanted():
                        raise self._full(f"there was no room within {timeout_s:g} s", "wait_over")
                    self._changed.wait(min(left, LOOK_S))
            finally:
                self._line.remove(ticket)
                self._changed.notify_all()

    def leave(self, place: Place) -> None:
        """Give a place back."""
        with self._changed:
            self.sessions -= 1
            if place.run is not None:
                self.pool.release(place.run)
            self._stay_s += 0.2 * (time.monotonic() - place.since - self._stay_s)
            self._changed.notify_all()

    def drain(self) -> None:
        """Let nobody in any more."""
        with self._changed:
            self._draining = True
            self._changed.notify_all()

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

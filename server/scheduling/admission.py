"""Who may come in: sessions up to a number and a budget of KV memory. Others wait in a short queue, or are rejected.

A session waits at most its own timeout. `choose` says who comes next: the session whose holder (a token of the access
file, or a connection) has the fewest here, and among those the first. One that needs more room than there is does not
keep out the others; but after OVERTAKES others have passed it, what becomes free is kept for it, for as long as two
usual stays last, and no longer than LONGEST_KEPT_S. When the queue is full, a new session is rejected at once, unless
another holder has more sessions in the queue: then that one's last is rejected.
"""

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from splitlearn.errors import InputError, TrunkFull, TrunkUnavailable
from splitlearn.kvcache.pool import KVPool, Run

FIRST_GUESS_S = 5.0
RETRY_S = (0.1, 30.0)
OVERTAKES, LONGEST_KEPT_S = 8, 10.0
LOOK_S = 1.0
"""How often a waiting session looks whether the room kept for another one is free again."""
DRAINING = "this trunk server is shutting down"


@dataclass
class Place:
    """A session's place: its run of the pool, None for one without memory here; whose it is, and since when."""

    run: Run | None
    since: float = 0.0
    holder: str = ""


@dataclass(eq=False)
class Ticket:
    """A session in the queue. `passed` sessions that came later went in before it since room was last kept for it, the
    last at `passed_at`. It is woken when it has a place, and when it need not wait any more."""

    tokens: int
    holder: str = ""
    passed: int = 0
    passed_at: float = 0.0
    place: Place | None = None
    rejected: bool = False
    wake: threading.Event = field(default_factory=threading.Event)


def choose(
    queue: Sequence[Ticket], held: Mapping[str, int], fits: Callable[[int], bool], now: float, keep_s: float
) -> Ticket | None:
    """Who of `queue`, in the order of arrival, comes in next; None for nobody now.

    `held` counts the sessions of each holder, `fits` says whether there is room for so many tokens.
    """
    for ticket in queue:
        if ticket.passed >= OVERTAKES:
            if fits(ticket.tokens):
                return ticket
            if now < ticket.passed_at + keep_s:
                return None
    fair = sorted(queue, key=lambda ticket: held.get(ticket.holder, 0))  # stable: by arrival among equals
    return next((ticket for ticket in fair if fits(ticket.tokens)), None)


def note_passed(queue: Sequence[Ticket], chosen: Ticket, now: float) -> None:
    """`chosen` comes in before those of `queue` that came before it."""
    for ticket in queue:
        if ticket is chosen:
            return
        if ticket.passed >= OVERTAKES:  # room was kept for it, in vain: others may pass again
            ticket.passed = 0
        ticket.passed += 1
        ticket.passed_at = now


class Admission:
    """Hands out places. `sessions` and `waiting` say how many there are now."""

    def __init__(self, pool: KVPool, max_sessions: int, max_waiting: int) -> None:
        self.pool = pool
        self.sessions = 0
        self._max_sessions, self._max_waiting = max_sessions, max_waiting
        self._lock = threading.Lock()
        self._queue: deque[Ticket] = deque()
        self._held: Counter[str] = Counter()
        self._stay_s = FIRST_GUESS_S
        self._draining = False

    @property
    def waiting(self) -> int:
        """Sessions in the queue."""
        return len(self._queue)

    def enter(
        self, tokens: int, timeout_s: float, when_gone: Callable[[Callable[[], None]], bool], holder: str = ""
    ) -> Place:
        """A place with room for `tokens` (0: no KV memory), waited for at most `timeout_s`.

        `when_gone` is given what is to be called when nobody waits for the place any more; it returns False if that is
        so already. Raises TrunkFull for a full queue and for a wait that was too long, InputError for what never fits,
        TrunkUnavailable when the server is shutting down.
        """
        if tokens > self.pool.capacity:
            limit = f"at most {self.pool.capacity} tokens: server.kv_bytes has room for no more"
            raise InputError("max_length", tokens, limit)
        ticket = Ticket(tokens, holder)
        with self._lock:
            self._check_open()
            self._queue.append(ticket)
            self._admit()
            if ticket.place is not None:
                return ticket.place
            if len(self._queue) > self._max_waiting:
                self._reject_one()
            if ticket.rejected:
                raise self._full(f"{len(self._queue)} sessions are waiting already", "line_full")
        gone = threading.Event()

        def left() -> None:
            gone.set()
            ticket.wake.set()

        if not when_gone(left):
            left()
        until = time.monotonic() + timeout_s
        while not ticket.wake.wait(max(0.0, min(LOOK_S, until - time.monotonic()))) and time.monotonic() < until:
            with self._lock:
                self._admit()
        return self._outcome(ticket, timeout_s, gone.is_set())

    def leave(self, place: Place) -> None:
        """Give a place back."""
        with self._lock:
            self.sessions -= 1
            self._held[place.holder] -= 1
            self._held += Counter()  # holders without sessions are forgotten
            if place.run is not None:
                self.pool.release(place.run)
            self._stay_s += 0.2 * (time.monotonic() - place.since - self._stay_s)
            self._admit()

    def drain(self) -> None:
        """Let nobody in any more."""
        with self._lock:
            self._draining = True
            for ticket in self._queue:
                ticket.wake.set()

    def _outcome(self, ticket: Ticket, timeout_s: float, gone: bool) -> Place:
        """What the wait of `ticket` came to."""
        with self._lock:
            if ticket.place is not None:
                return ticket.place
            if ticket in self._queue:
                self._queue.remove(ticket)
            self._admit()  # those behind it may need less
            self._check_open()
            if ticket.rejected:
                raise self._full("the queue is full, and other clients have fewer sessions in it", "line_full")
            why = "its client has gone" if gone else f"there was no room within {timeout_s:g} s"
            raise self._full(why, "wait_over")

    def _reject_one(self) -> None:
        """Reject the last session of the holder that has most in the queue; the newest of all where none has more."""
        counts = Counter(ticket.holder for ticket in self._queue)
        newest = self._queue[-1]
        most = max(counts, key=lambda holder: (counts[holder], holder == newest.holder))
        last = next(ticket for ticket in reversed(self._queue) if ticket.holder == most)
        self._queue.remove(last)
        last.rejected = True
        last.wake.set()

    def _admit(self) -> None:
        """Give places to those whose turn it is, as far as there is room."""
        now = time.monotonic()
        while self._queue and not self._draining:
            ticket = choose(self._queue, self._held, self._room, now, min(LONGEST_KEPT_S, 2 * self._stay_s))
            if ticket is None:
                return
            note_passed(self._queue, ticket, now)
            self._queue.remove(ticket)
            ticket.place = self._take(ticket)
            ticket.wake.set()

    def _check_open(self) -> None:
        if self._draining:
            raise TrunkUnavailable(DRAINING, "draining")

    def _room(self, tokens: int) -> bool:
        return self.sessions < self._max_sessions and (not tokens or self.pool.fits(tokens))

    def _take(self, ticket: Ticket) -> Place:
        run = self.pool.reserve(ticket.tokens) if ticket.tokens else None
        self.sessions += 1
        self._held[ticket.holder] += 1
        return Place(run, time.monotonic(), ticket.holder)

    def _full(self, why: str, cause: str) -> TrunkFull:
        """With the time after which a place should be free for one more: what a stay took lately, shared by all."""
        shortest, longest = RETRY_S
        retry_s = self._stay_s * (1 + len(self._queue)) / max(1, self.sessions)
        blocks = f"{self.pool.blocks_used} of {self.pool.n_blocks} KV blocks"
        used = f"{self.sessions} of {self._max_sessions} sessions, {blocks}"
        return TrunkFull(f"no room: {why} ({used} in use)", min(longest, max(shortest, retry_s)), cause)

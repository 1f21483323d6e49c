"""Admission control: reserves room for sessions, within limits of sessions and KV memory. Others wait in a queue.

A session waits at most its own timeout. `choose` picks the next session: that of the holder with the fewest sessions,
and among those the first. A holder is a token of the access file, or a connection.

A session that needs more memory than is free does not block the others. After OVERTAKES others have passed it, free
memory is kept for it: as long as two average sessions last, and at most LONGEST_KEPT_S.

A batch session gets room only in one half of the KV memory and of the sessions, and after the others that wait. So no
session that fits into the other half waits for batch ones.

When the queue is full, a new session is rejected at once. If another holder has more sessions in the queue, that
holder's last one is rejected instead.
"""

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from splitlearn.errors import InputError, TrunkFull, TrunkUnavailable
from splitlearn.kvcache.pool import KVPool, Slot

FIRST_GUESS_S = 5.0
RETRY_S = (0.1, 30.0)
OVERTAKES, LONGEST_KEPT_S = 8, 10.0
LOOK_S = 1.0
"""How often a waiting session checks whether the memory kept for another one is free again."""
DRAINING = "this trunk server is shutting down"


@dataclass(frozen=True)
class Reservation:
    """A session's room: its `slot` of the pool (None: no KV memory here), since when, and for which holder."""

    slot: Slot | None
    since: float = 0.0
    holder: str = ""
    batch: bool = False


@dataclass(eq=False)
class Ticket:
    """A session in the queue. `passed`: later sessions that were admitted before it since memory was last kept for it,
    the last one at `passed_at`. `wake` is set once it has its reservation, and once it has to stop waiting."""

    tokens: int
    holder: str = ""
    batch: bool = False
    passed: int = 0
    passed_at: float = 0.0
    reservation: Reservation | None = None
    rejected: bool = False
    gone: bool = False
    wake: threading.Event = field(default_factory=threading.Event)

    def leave(self) -> None:
        """Stop waiting: the client has gone."""
        self.gone = True
        self.wake.set()


def choose(
    queue: Sequence[Ticket], held: Mapping[str, int], fits: Callable[[Ticket], bool], now: float, keep_s: float
) -> Ticket | None:
    """The session to admit next, or None if none can be admitted now. `queue` is in order of arrival.

    `held` counts the sessions of each holder. `fits` says whether there is room for it. `now` and
    `keep_s`, the time that memory is kept for a session, are in seconds.
    """
    for ticket in queue:
        if ticket.passed >= OVERTAKES:
            if fits(ticket):
                return ticket
            if not ticket.batch and now < ticket.passed_at + keep_s:
                return None
    fair = sorted(
        queue, key=lambda ticket: (ticket.batch, held.get(ticket.holder, 0))
    )  # stable: by arrival among equals
    return next((ticket for ticket in fair if fits(ticket)), None)


def note_passed(queue: Sequence[Ticket], chosen: Ticket, now: float) -> None:
    """Record that `chosen` is admitted before the sessions of `queue` that came before it."""
    for ticket in queue:
        if ticket is chosen:
            return
        if ticket.passed >= OVERTAKES:  # the time for which memory was kept is over: others may pass again
            ticket.passed = 0
        ticket.passed += 1
        ticket.passed_at = now


class Admission:
    """Hands out reservations. `sessions` counts those that have one, `waiting` those in the queue. `setting` names the
    limit of the pool."""

    def __init__(self, pool: KVPool, max_sessions: int, max_waiting: int, setting: str = "server.kv_bytes") -> None:
        self.pool = pool
        self._setting = setting
        self.sessions = self._batch_sessions = 0
        self._batch_start = pool.n_blocks // 2 * pool.block_tokens
        self._max_sessions, self._max_waiting = max_sessions, max_waiting
        self._lock = threading.Lock()
        self._queue: deque[Ticket] = deque()
        self._held: Counter[str] = Counter()
        self._average_s = FIRST_GUESS_S
        self._draining = False

    @property
    def waiting(self) -> int:
        return len(self._queue)

    def acquire(
        self,
        tokens: int,
        timeout_s: float,
        when_gone: Callable[[Callable[[], None]], bool],
        holder: str = "",
        batch: bool = False,
    ) -> Reservation:
        """Reserve room for `tokens` (0: no KV memory). Waits at most `timeout_s`.

        `when_gone` registers a callback for the client's end; it returns False if the client has gone already. Raises
        TrunkFull if the queue is full or the wait too long. Raises InputError for more tokens than can ever fit,
        TrunkUnavailable while the server drains.
        """
        most = self.pool.capacity - self._batch_start * batch
        if tokens > most:
            room = f"{self._setting} has room for no more{' batch requests' if batch else ''}"
            raise InputError("max_length", tokens, f"at most {most} tokens: {room}")
        ticket = Ticket(tokens, holder, batch)
        with self._lock:
            self._enqueue_locked(ticket)
        if ticket.reservation is None:
            if not when_gone(ticket.leave):
                ticket.leave()
            self._wait(ticket, time.monotonic() + timeout_s)
        return self._outcome(ticket, timeout_s)

    def release(self, reservation: Reservation) -> None:
        with self._lock:
            self.sessions -= 1
            self._batch_sessions -= reservation.batch
            self._held[reservation.holder] -= 1
            self._held += Counter()  # drops holders without sessions
            if reservation.slot is not None:
                self.pool.release(reservation.slot)
            self._average_s += 0.2 * (time.monotonic() - reservation.since - self._average_s)
            self._admit_locked()

    def drain(self) -> None:
        """Admit no more sessions."""
        with self._lock:
            self._draining = True
            for ticket in self._queue:
                ticket.wake.set()

    def _enqueue_locked(self, ticket: Ticket) -> None:
        """Admit `ticket` at once or queue it. Raises TrunkFull if it is rejected."""
        self._check_open_locked()
        self._queue.append(ticket)
        self._admit_locked()
        if len(self._queue) > self._max_waiting and ticket.reservation is None:
            self._reject_one_locked()
        if ticket.rejected:
            raise self._full_locked(f"{len(self._queue)} sessions are waiting already", "queue_full")

    def _wait(self, ticket: Ticket, until: float) -> None:
        """Wait until `ticket` is woken or `until` has come. Tries to admit every LOOK_S, since memory kept for another
        session may be free again."""
        while not ticket.wake.wait(max(0.0, min(LOOK_S, until - time.monotonic()))) and time.monotonic() < until:
            with self._lock:
                self._admit_locked()

    def _outcome(self, ticket: Ticket, timeout_s: float) -> Reservation:
        with self._lock:
            if ticket.reservation is not None:
                return ticket.reservation
            if ticket in self._queue:
                self._queue.remove(ticket)
            self._admit_locked()  # those behind it may need less
            self._check_open_locked()
            if ticket.rejected:
                raise self._full_locked("the queue is full, and other clients have fewer sessions in it", "queue_full")
            why = "its client has gone" if ticket.gone else f"there was no room within {timeout_s:g} s"
            raise self._full_locked(why, "queue_timeout")

    def _reject_one_locked(self) -> None:
        """Reject the last session of the holder with the most in the queue; the newest of all if none has more."""
        counts = Counter(ticket.holder for ticket in self._queue)
        newest = self._queue[-1]
        most = max(counts, key=lambda holder: (counts[holder], holder == newest.holder))
        last = next(ticket for ticket in reversed(self._queue) if ticket.holder == most)
        self._queue.remove(last)
        last.rejected = True
        last.wake.set()

    def _admit_locked(self) -> None:
        now = time.monotonic()
        while self._queue and not self._draining:
            ticket = choose(self._queue, self._held, self._room_locked, now, min(LONGEST_KEPT_S, 2 * self._average_s))
            if ticket is None:
                return
            note_passed(self._queue, ticket, now)
            self._queue.remove(ticket)
            ticket.reservation = self._take_locked(ticket)
            ticket.wake.set()

    def _check_open_locked(self) -> None:
        if self._draining:
            raise TrunkUnavailable(DRAINING, "draining")

    def _room_locked(self, ticket: Ticket) -> bool:
        if self.sessions >= self._max_sessions:
            return False
        if ticket.batch and self._batch_sessions >= max(1, self._max_sessions // 2):
            return False
        return not ticket.tokens or self.pool.fits(ticket.tokens, self._batch_start * ticket.batch)

    def _take_locked(self, ticket: Ticket) -> Reservation:
        slot = self.pool.reserve(ticket.tokens, self._batch_start * ticket.batch) if ticket.tokens else None
        self.sessions += 1
        self._batch_sessions += ticket.batch
        self._held[ticket.holder] += 1
        return Reservation(slot, time.monotonic(), ticket.holder, ticket.batch)

    def _full_locked(self, why: str, cause: str) -> TrunkFull:
        """The error, with the time after which to try again: the recent average length of a session, times those ahead,
        divided by the open sessions."""
        shortest, longest = RETRY_S
        retry_s = self._average_s * (1 + len(self._queue)) / max(1, self.sessions)
        blocks = f"{self.pool.blocks_used} of {self.pool.n_blocks} KV blocks"
        used = f"{self.sessions} of {self._max_sessions} sessions, {blocks}"
        return TrunkFull(f"no room: {why} ({used} in use)", min(longest, max(shortest, retry_s)), cause)

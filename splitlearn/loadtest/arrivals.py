"""When each request begins: in a closed loop when the client's last one ended, in an open loop at its arrival time.

Later turns of a conversation belong to its first request: the client goes on with them by itself.
"""

import threading
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from splitlearn.loadtest.plan import LoadRequest, LoadTest, arrivals, load_requests, traced_requests


class Clock:
    """Seconds since the load began, on the one monotonic clock of this process."""

    def __init__(self) -> None:
        self.started = time.perf_counter()

    def now(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self.started


@dataclass(frozen=True)
class Arrival:
    """A request and its arrival time, in seconds after the start."""

    job: LoadRequest
    at: float


class Loop(Protocol):
    """Gives clients their requests."""

    def take(self, client: int) -> Arrival | None:
        """Return the next request for a free client, once it is due; None if there are no more."""

    def end(self, at: float) -> None:
        """Stop arrivals after `at`, which is now or before."""

    def rest(self) -> list[Arrival]:
        """Arrivals that no client took."""


class ClosedLoop:
    """A free client's next request is due at once, until the load ends."""

    def __init__(self, load: LoadTest, clock: Clock) -> None:
        self._clock, self._last = clock, load.duration_s
        self._jobs = [load_requests(load, client) for client in range(load.clients)]

    def take(self, client: int) -> Arrival | None:
        """The client's own next request."""
        now = self._clock.now()
        return Arrival(next(self._jobs[client]), now) if now < self._last else None

    def end(self, at: float) -> None:
        """No request begins after `at`."""
        self._last = at

    def rest(self) -> list[Arrival]:
        """Always empty: a request is made when a client takes it."""
        return []


class OpenLoop:
    """Arrivals at given times, or Poisson. A request that finds every client busy waits for the first free one.

    `at` stays its arrival time, so the wait counts (no coordinated omission).
    """

    def __init__(self, arriving: Iterable[tuple[float, LoadRequest]], last_s: float, clock: Clock) -> None:
        self._clock, self._last = clock, last_s
        self._rest = deque(Arrival(job, at) for at, job in arriving)
        self._lock = threading.Lock()
        self._ended = threading.Event()

    def take(self, client: int) -> Arrival | None:
        """The oldest arrival, for the client that asks first; other clients wait for the next."""
        with self._lock:
            if not self._rest:
                return None
            self._ended.wait(max(0.0, self._rest[0].at - self._clock.now()))
            return self._rest.popleft() if self._rest[0].at <= self._last else None

    def end(self, at: float) -> None:
        """Stop arrivals after `at`. Earlier ones can still be taken."""
        self._last = at
        self._ended.set()

    def rest(self) -> list[Arrival]:
        """Arrivals that no client was free for. Clients may still take them."""
        return [arrival for arrival in list(self._rest) if arrival.at <= self._last]


def loop_of(load: LoadTest, clock: Clock) -> Loop:
    """The loop that `load` asks for."""
    if load.trace:
        return OpenLoop(traced_requests(load), load.duration_s, clock)
    if load.rate is None:
        return ClosedLoop(load, clock)
    times = arrivals(load.rate, load.duration_s, load.seed)
    return OpenLoop(zip(times, load_requests(load, 0), strict=False), load.duration_s, clock)

"""When each request begins: closed-loop, when the client's last one ended; open-loop, when it arrives, whatever the
server does."""

import threading
import time
from collections import deque
from dataclasses import dataclass
from typing import Protocol

from splitlearn.loadtest.plan import Asked, Job, arrivals, jobs


class Clock:
    """Seconds since the load began, on the one monotonic clock of this process."""

    def __init__(self) -> None:
        self.started = time.perf_counter()

    def now(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self.started


@dataclass(frozen=True)
class Arrival:
    """A request, and when it came, in seconds after the start."""

    job: Job
    at: float


class Loop(Protocol):
    """Where clients get their requests."""

    def take(self, client: int) -> Arrival | None:
        """The next request for a free client, waiting until it is due; None when there are no more."""

    def end(self, at: float) -> None:
        """Nothing arrives after `at`, which is now or before."""

    def rest(self) -> list[Arrival]:
        """What has arrived and was taken by nobody."""


class ClosedLoop:
    """A free client's request is due at once, for as long as the load lasts."""

    def __init__(self, asked: Asked, clock: Clock) -> None:
        self._clock, self._last = clock, asked.duration_s
        self._jobs = [jobs(asked, client) for client in range(asked.clients)]

    def take(self, client: int) -> Arrival | None:
        """The client's own next request."""
        now = self._clock.now()
        return Arrival(next(self._jobs[client]), now) if now < self._last else None

    def end(self, at: float) -> None:
        """No request begins after `at`."""
        self._last = at

    def rest(self) -> list[Arrival]:
        """Nothing: a request comes into being when a client takes it."""
        return []


class OpenLoop:
    """Poisson arrivals. One that finds every client busy waits for the first that is free, and `at` stays its time of
    arrival: what it waits counts (no coordinated omission)."""

    def __init__(self, asked: Asked, rate: float, clock: Clock) -> None:
        self._clock, self._last = clock, asked.duration_s
        times = arrivals(rate, asked.duration_s, asked.seed)
        self._rest = deque(Arrival(job, at) for at, job in zip(times, jobs(asked, 0), strict=False))
        self._lock = threading.Lock()
        self._ended = threading.Event()

    def take(self, client: int) -> Arrival | None:
        """The oldest arrival, for whichever client asks first; the others wait behind it for the next."""
        with self._lock:
            if not self._rest:
                return None
            self._ended.wait(max(0.0, self._rest[0].at - self._clock.now()))
            return self._rest.popleft() if self._rest[0].at <= self._last else None

    def end(self, at: float) -> None:
        """What would have come after `at` does not; what came before is still there to be taken."""
        self._last = at
        self._ended.set()

    def rest(self) -> list[Arrival]:
        """Arrivals that no client was free for. Clients may take them still."""
        return [arrival for arrival in list(self._rest) if arrival.at <= self._last]

"""Runs a load test: one thread for each client, until the time is over, with a grace time for current requests."""

import gc
import threading
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, Literal

import psutil

from splitlearn.errors import TrunkFull, as_error
from splitlearn.loadtest.arrivals import Arrival, Clock, ClosedLoop, Loop, OpenLoop
from splitlearn.loadtest.clients import Client
from splitlearn.loadtest.plan import LoadRequest, LoadTest
from splitlearn.runtime.progress import Progress, Step

GRACE_S = 30.0
"""Requests under way when the time is over have this long to end."""
CLOSE_TIMEOUT_S = 5.0
PAUSE_S = 0.5
"""A closed-loop client waits this long after a failed request. After a refusal it waits as the trunk says."""
POLL_S = 0.1
NOT_ENDED = "it had not ended when the load's time and the grace time were over"
NOT_BEGUN = "no client was free for it"

State = Literal["done", "rejected", "failed", "incomplete"]


@dataclass(frozen=True)
class Outcome:
    """The outcome of one request. Times are seconds after the start; `begun_s` is when a client took it.

    rejected: refused for want of room. failed: any other error. incomplete: not ended when the load was over.
    """

    client: int | None
    job: LoadRequest
    arrived_s: float
    begun_s: float | None
    ended_s: float
    state: State
    reason: str
    token_s: tuple[float, ...]

    @property
    def ttft_s(self) -> float | None:
        """From the arrival to the first token."""
        return self.token_s[0] - self.arrived_s if self.token_s else None

    @property
    def tpot_s(self) -> float | None:
        """The mean time of a token after the first, of a whole answer."""
        if self.state != "done" or len(self.token_s) < 2:
            return None
        return (self.token_s[-1] - self.token_s[0]) / (len(self.token_s) - 1)


@dataclass(frozen=True)
class Measurement:
    """All outcomes, in the order of arrival, and the time in which requests arrived.

    `busy` is the share of one core that this process used meanwhile; it runs the clients' threads.
    """

    outcomes: tuple[Outcome, ...]
    duration_s: float
    busy: float


@dataclass
class _ActiveRequest:
    """A request that a client works on, and the times of its tokens so far."""

    arrival: Arrival
    begun_s: float
    token_s: list[float] = field(default_factory=list)


def drive(
    clients: Sequence[Client], load: LoadTest, progress: Progress, stop: threading.Event, grace_s: float = GRACE_S
) -> Measurement:
    """Run `clients` for `load.duration_s`, or until `stop` is set, and close them."""
    clock = Clock()
    loop = ClosedLoop(load, clock) if load.rate is None else OpenLoop(load, load.rate, clock)
    return _Drive(clients, loop, clock).run(load.duration_s, progress, stop, grace_s)


class _Drive:
    def __init__(self, clients: Sequence[Client], loop: Loop, clock: Clock) -> None:
        self._clients, self._loop, self._clock = clients, loop, clock
        self._lock = threading.Lock()
        self._outcomes: list[Outcome] = []
        self._active: dict[int, _ActiveRequest] = {}
        self._cut = threading.Event()  # stop waiting

    def run(self, duration_s: float, progress: Progress, stop: threading.Event, grace_s: float) -> Measurement:
        """Start the clients, wait, end them."""
        gc.freeze()  # a collection of everything loaded would stop every client for 0.3 s
        spent = _processor_seconds()
        threads = [
            threading.Thread(target=self._serve, args=(number, client), daemon=True)
            for number, client in enumerate(self._clients)
        ]
        for thread in threads:
            thread.start()
        label = f"Loading the trunk for {duration_s:g} s"
        while (now := self._clock.now()) < duration_s and not stop.is_set():
            progress(Step(label, now, duration_s))
            stop.wait(min(POLL_S, duration_s - now))
        ended = min(self._clock.now(), duration_s)
        busy = (_processor_seconds() - spent) / ended
        self._loop.end(ended)
        self._join(
            threads, grace_s, lambda left: progress(Step("Waiting for what is under way", grace_s - left, grace_s))
        )
        self._end(threads)
        return Measurement(tuple(sorted(self._outcomes, key=lambda outcome: outcome.arrived_s)), ended, busy)

    def _serve(self, number: int, client: Client) -> None:
        """The loop of one client's thread."""
        while not self._cut.is_set() and (arrival := self._loop.take(number)) is not None:
            at = _ActiveRequest(arrival, self._clock.now())
            with self._lock:
                self._active[number] = at
            state, reason, pause_s = self._answer(client, at)
            with self._lock:
                if self._active.pop(number, None) is not None:
                    self._outcomes.append(self._outcome(number, at, state, reason))
            if isinstance(self._loop, ClosedLoop):
                self._cut.wait(pause_s)

    def _answer(self, client: Client, at: _ActiveRequest) -> tuple[State, str, float]:
        """The request's state, the reason, and the seconds to wait before the client's next request."""
        try:
            with closing(client.answer(at.arrival.job)) as tokens:
                for token in tokens:
                    at.token_s.append(token - self._clock.started)
                    if self._cut.is_set():
                        break
        except TrunkFull as error:
            return "rejected", str(error), error.retry_s
        except Exception as error:  # also from a client that is closed under its request
            if not self._cut.is_set():
                return "failed", str(as_error(error, "answering")), PAUSE_S
        missing = at.arrival.job.new_tokens - len(at.token_s)
        return ("incomplete", NOT_ENDED, 0.0) if missing else ("done", "", 0.0)

    def _outcome(self, number: int | None, at: _ActiveRequest, state: State, reason: str) -> Outcome:
        arrival = at.arrival
        return Outcome(number, arrival.job, arrival.at, at.begun_s, self._clock.now(), state, reason, tuple(at.token_s))

    def _join(self, threads: Sequence[threading.Thread], seconds: float, watch: Callable[[float], Any]) -> None:
        """Wait for `threads` for `seconds`; call `watch` with the seconds left."""
        deadline = self._clock.now() + seconds
        while any(thread.is_alive() for thread in threads) and (left := deadline - self._clock.now()) > 0:
            watch(left)
            threading.Event().wait(min(POLL_S, left))

    def _end(self, threads: Sequence[threading.Thread]) -> None:
        """Close all clients. Count requests that do not end even then as incomplete."""
        self._cut.set()
        for client in self._clients:
            client.close()
        self._join(threads, CLOSE_TIMEOUT_S, lambda left: None)
        with self._lock:
            for number, at in self._active.items():
                self._outcomes.append(self._outcome(number, at, "incomplete", NOT_ENDED))
            self._active.clear()
            now = self._clock.now()
            for arrival in self._loop.rest():
                waiting = Outcome(None, arrival.job, arrival.at, None, now, "incomplete", NOT_BEGUN, ())
                self._outcomes.append(waiting)


def _processor_seconds() -> float:
    """Processor time of this process, without its children."""
    times = psutil.Process().cpu_times()
    return float(times.user + times.system)

"""Runs a load test: one thread for each client, until the time is over, with a grace time for current requests."""

import gc
import threading
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import psutil

from splitlearn.errors import as_error
from splitlearn.loadtest.arrivals import Arrival, Clock, ClosedLoop, Loop, loop_of
from splitlearn.loadtest.clients import NO_ROOM, AnswerEnd, Client, close
from splitlearn.loadtest.plan import LoadRequest, LoadTest
from splitlearn.runtime.progress import Progress, Step

GRACE_S = 30.0
"""Requests under way when the time is over have this long to end; none, where the load is stopped."""
CLOSE_TIMEOUT_S = 5.0
PAUSE_S = 0.5
"""A closed-loop client waits this long after a failed request. After a refusal it waits as the server says."""
POLL_S = 0.1
NOT_ENDED = "it had not ended when the load was over"
NOT_BEGUN = "no client was free for it"

State = Literal["done", "rejected", "failed", "incomplete"]


@dataclass(frozen=True)
class Outcome:
    """The outcome of one request. Times are seconds after the start; `begun_s` is when a client took it.

    rejected: refused for want of room. failed: any other error. incomplete: not ended when the load was over.
    `token_s` has a time for each token; where there is an `end`, one for each chunk of text, whose tokens it counts.
    """

    client: int | None
    job: LoadRequest
    arrived_s: float
    begun_s: float | None
    ended_s: float
    state: State
    reason: str
    token_s: tuple[float, ...]
    end: AnswerEnd | None = None

    @property
    def tokens(self) -> int:
        """How many tokens came; of a cut answer in chunks, how many chunks."""
        return len(self.token_s) if self.end is None else self.end.tokens

    @property
    def last_s(self) -> float | None:
        """When the last token was there."""
        return self.end.at if self.end is not None else self.token_s[-1] if self.token_s else None

    @property
    def ttft_s(self) -> float | None:
        """From the arrival to the first token."""
        first_s = self.token_s[0] if self.token_s else self.last_s
        return None if first_s is None else first_s - self.arrived_s

    @property
    def tpot_s(self) -> float | None:
        """The mean time of a token after the first, of a whole answer."""
        e2el_s, ttft_s = self.e2el_s, self.ttft_s
        return None if e2el_s is None or ttft_s is None or self.tokens < 2 else (e2el_s - ttft_s) / (self.tokens - 1)

    @property
    def e2el_s(self) -> float | None:
        """From the arrival to the last token, of a whole answer."""
        return None if self.state != "done" or self.last_s is None else self.last_s - self.arrived_s


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
    end: AnswerEnd | None = None

    def take(self, item: float | AnswerEnd, started: float) -> None:
        """Keep what a client gave, in seconds after `started`."""
        if isinstance(item, AnswerEnd):
            self.end = replace(item, at=item.at - started)
        else:
            self.token_s.append(item - started)


def drive(
    clients: Sequence[Client], load: LoadTest, progress: Progress, stop: threading.Event, grace_s: float = GRACE_S
) -> Measurement:
    """Run `clients` for `load.duration_s` and let them end what is under way, or until `stop` is set; close them."""
    clock = Clock()
    return _Drive(clients, loop_of(load, clock), clock).run(load.duration_s, progress, stop, grace_s)


class _Drive:
    def __init__(self, clients: Sequence[Client], loop: Loop, clock: Clock) -> None:
        self._clients, self._loop, self._clock = clients, loop, clock
        self._lock = threading.Lock()
        self._outcomes: list[Outcome] = []
        self._active: dict[int, _ActiveRequest] = {}
        self._over = threading.Event()  # no request begins
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
        label = f"Loading the server for {duration_s:g} s"
        while (now := self._clock.now()) < duration_s and not stop.is_set():
            progress(Step(label, now, duration_s))
            stop.wait(min(POLL_S, duration_s - now))
        ended = min(self._clock.now(), duration_s)
        busy = (_processor_seconds() - spent) / ended
        self._over.set()
        self._loop.end(ended)
        label = "Waiting for what is under way"
        self._join(threads, grace_s, stop, lambda left: progress(Step(label, grace_s - left, grace_s)))
        self._end(threads)
        return Measurement(tuple(sorted(self._outcomes, key=lambda outcome: outcome.arrived_s)), ended, busy)

    def _serve(self, number: int, client: Client) -> None:
        """The loop of one client's thread."""
        while not self._cut.is_set() and (arrival := self._loop.take(number)) is not None:
            pause_s = self._converse(number, client, arrival)
            if isinstance(self._loop, ClosedLoop):
                self._cut.wait(pause_s)

    def _converse(self, number: int, client: Client, arrival: Arrival) -> float:
        """Have a request answered, and the later turns of its conversation until one is not.

        Returns the seconds to wait before the client's next one.
        """
        pause_s = self._ask(number, client, arrival)
        for job in arrival.job.rest:
            if pause_s is None and not self._over.is_set():
                pause_s = self._ask(number, client, Arrival(job, self._clock.now()))
        return pause_s or 0.0

    def _ask(self, number: int, client: Client, arrival: Arrival) -> float | None:
        """Have one request answered. Returns None for a whole answer, else the seconds to wait after it."""
        at = _ActiveRequest(arrival, self._clock.now())
        with self._lock:
            self._active[number] = at
        state, reason, pause_s = self._answer(client, at)
        with self._lock:
            if self._active.pop(number, None) is not None:
                self._outcomes.append(self._outcome(number, at, state, reason))
        return None if state == "done" else pause_s

    def _answer(self, client: Client, at: _ActiveRequest) -> tuple[State, str, float]:
        """The request's state, the reason, and the seconds to wait before the client's next request."""
        try:
            with closing(client.answer(at.arrival.job)) as items:
                for item in items:
                    at.take(item, self._clock.started)
                    if self._cut.is_set():
                        break
        except NO_ROOM as error:
            return "rejected", str(error), error.retry_s
        except Exception as error:  # also from a client that is closed under its request
            if not self._cut.is_set():
                return "failed", str(as_error(error, "answering")), PAUSE_S
        whole = at.end is not None or len(at.token_s) == at.arrival.job.new_tokens
        return ("done", "", 0.0) if whole else ("incomplete", NOT_ENDED, 0.0)

    def _outcome(self, number: int | None, at: _ActiveRequest, state: State, reason: str) -> Outcome:
        arrival = at.arrival
        return Outcome(
            number, arrival.job, arrival.at, at.begun_s, self._clock.now(), state, reason, tuple(at.token_s), at.end
        )

    def _join(
        self,
        threads: Sequence[threading.Thread],
        seconds: float,
        stop: threading.Event,
        watch: Callable[[float], Any] = lambda left: None,
    ) -> None:
        """Wait for `threads` for `seconds`, or until `stop` is set; call `watch` with the seconds left."""
        deadline = self._clock.now() + seconds
        while any(thread.is_alive() for thread in threads) and (left := deadline - self._clock.now()) > 0:
            if stop.is_set():
                return
            watch(left)
            stop.wait(min(POLL_S, left))

    def _end(self, threads: Sequence[threading.Thread]) -> None:
        """Close all clients. Count requests that do not end even then as incomplete."""
        self._cut.set()
        close(self._clients)
        self._join(threads, CLOSE_TIMEOUT_S, threading.Event())
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

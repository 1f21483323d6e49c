"""Endpoint failover: decides which of a trunk's addresses to try, when and how often, and what to raise if none works.

The first address that works is used until it is lost. Then the next ones are tried in turn. Between rounds are random
pauses that grow (full jitter), so that the clients of one trunk do not all return at the same moment. The circuit
breaker of an address opens after several failures in a row (client/circuit_breaker.py). An address that refuses is not
tried again. client/remote_stage.py detects the loss of a trunk within a session, and replays the session.

With a directory (`ray://host:port`) the addresses are those that it lists at each opening, the least full first.

Why not gRPC's own retry policy and pick_first: gRPC repeats a call only until its first response headers. An open
session is beyond that, and its state is lost with its trunk. And pick_first hides the address that it chose. Here a
refusal, a full trunk and a dead trunk each need another reaction, by address.
"""

import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from splitlearn.client.directory import TIMEOUT_S, Directory
from splitlearn.client.endpoint import Endpoint
from splitlearn.client.served import ServedModel, TrunkFacts
from splitlearn.client.session_stream import Opening, Stream
from splitlearn.config import has_directory
from splitlearn.errors import TrunkError, TrunkFailed, TrunkFull, TrunkRefused, TrunkUnavailable
from splitlearn.scheduling.contract import WhenGone
from splitlearn.wire.channel import Credentials

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 2.0
LEAST_WAIT_S = 1.0


class RetryBudget:
    """The tries for one opening or one step, all within `timeout_s`. `errors` has the last error of each address.
    `announce` is called with the number of each try, before the pause that precedes it. `gone` is set once the client
    has gone for whom it is; nothing is tried then."""

    def __init__(self, timeout_s: float, addresses: int, when_gone: WhenGone | None = None) -> None:
        self.announce: Callable[[int], None] = lambda attempt: None
        self._until = time.monotonic() + timeout_s
        self._addresses = addresses
        self._pauses = 0
        self._parts: dict[int, RetryBudget] = {}
        self._when_gone = when_gone
        self.errors: dict[str, TrunkError] = {}
        self.gone, self._lock, self._leave = threading.Event(), threading.Lock(), _stay
        if when_gone is not None and not when_gone(self._client_left):
            self._client_left()

    def check(self) -> None:
        """Raise TrunkUnavailable if the client has gone."""
        if self.gone.is_set():
            raise TrunkUnavailable("The client that the session was for has gone.")

    @contextmanager
    def leaving_by(self, leave: Callable[[], None]) -> Iterator[None]:
        """Call `leave` if the client goes within the `with` block."""
        with self._lock:
            self.check()
            self._leave = leave
        try:
            yield
        finally:
            with self._lock:
                self._leave = _stay

    def _client_left(self) -> None:
        with self._lock:
            self.gone.set()
            self._leave()

    def part(self, number: int, addresses: int) -> "RetryBudget":
        """The tries for one server of a chain, within the same time."""
        if number not in self._parts:
            self._parts[number] = RetryBudget(self._until - time.monotonic(), addresses, self._when_gone)
        self._parts[number].announce = self.announce
        return self._parts[number]

    def wait_s(self) -> float:
        """How long to wait for an answer: all of the remaining time, or half of it if there is another address."""
        left = self._until - time.monotonic()
        return left if self._addresses <= 1 else max(left / 2, min(left, LEAST_WAIT_S))

    def pause(self, due_s: float = 0.0) -> None:
        """Sleep until the next round: `due_s` plus a random time. Raises `error()` if that exceeds the budget."""
        pause = due_s + random.uniform(0, min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2**self._pauses))
        self._pauses += 1
        self.announce(self._pauses)
        if time.monotonic() + pause > self._until:
            raise self.error()
        self.gone.wait(pause)
        self.check()

    def hopeless(self, address: str) -> bool:
        """Whether another try at this address would give the same error."""
        return isinstance(self.errors.get(address), TrunkRefused | TrunkFailed)

    def error(self) -> TrunkError:
        """The final error: the last one of each address, as the class that is most likely to pass."""
        errors = list(self.errors.values())
        if len(errors) == 1:
            return errors[0]
        hope = (TrunkFull, TrunkUnavailable, TrunkFailed, TrunkRefused)
        kind = next(kind for kind in hope if any(isinstance(error, kind) for error in errors))
        return kind(" ".join(str(error) for error in errors))


class Endpoints:
    """A trunk's addresses, one of which is current, or that of a directory, which knows them. `open` opens a session at
    one that works. `via` has for each address another one to connect to."""

    def __init__(
        self,
        addresses: Sequence[str],
        served: ServedModel,
        timeout_s: float,
        credentials: Credentials,
        via: Sequence[str] = (),
    ) -> None:
        self._directory = Directory(addresses[0], credentials) if has_directory(addresses) else None
        known = () if self._directory else addresses
        pairs = zip(known, via or (None,) * len(known), strict=True)
        self._endpoints = {address: Endpoint(address, credentials, proxy) for address, proxy in pairs}
        self._order = deque(known)  # the current one is first
        self._credentials = credentials
        self._served = served
        self._timeout_s = timeout_s
        self._streams: set[Stream] = set()
        self._closed = False
        self.facts = (TrunkFacts(),)
        """What the trunk has sent last of itself; of a chain, each of its servers."""

    def budget(self, when_gone: WhenGone | None = None) -> RetryBudget:
        """A new budget, for one step or for the opening of a session, which ends `when_gone` says so."""
        return RetryBudget(self._timeout_s, len(self._endpoints), when_gone)

    @property
    def change(self) -> bool:
        """Whether the addresses may be others at each opening."""
        return self._directory is not None

    def open(self, opening: Opening, budget: RetryBudget, *, patient: bool, beside: str = "") -> Stream:
        """Open a session at the current address, or else at the next that works. Returns its stream. `beside` is the
        address to begin with, that of a session which this one is to fork.

        A `patient` caller has an answer in progress, and waits within `budget` for a trunk to come back. Any other gets
        an error as soon as no address works. Both wait for a full trunk that says when to try again.
        """
        while True:
            due = [] if beside else self._look(budget, patient)
            if beside:
                self._begin_with(beside)
            beside = ""
            for endpoint in [self._endpoints[each] for each in tuple(self._order) if not budget.hopeless(each)]:
                if self._closed:
                    raise TrunkUnavailable("The connection to the trunk server was closed here.")
                budget.check()
                try:
                    return self._open_at(endpoint, opening, budget)
                except TrunkError as error:
                    budget.errors[endpoint.address] = error
                    due_s = _due_s(endpoint, error, patient)
                due += [] if due_s is None else [due_s]
            if not due:
                raise budget.error()
            budget.pause(min(due))

    def lost(self, stream: Stream, error: TrunkUnavailable, budget: RetryBudget) -> None:
        """Drop a broken session, and make the next address the current one."""
        self._endpoints[stream.address].breaker.failed()
        self._begin_with(stream.address)
        self._order.rotate(-1)
        budget.errors[stream.address] = error
        self._streams.discard(stream)
        stream.drop()

    def works(self, stream: Stream) -> None:
        """Record an answered step: its address works."""
        breaker = self._endpoints[stream.address].breaker
        if breaker.failures:
            breaker.succeeded()

    def leave(self, stream: Stream) -> None:
        """Break off a session without a reason at its trunk."""
        self._streams.discard(stream)
        stream.drop()

    def end(self, stream: Stream) -> None:
        """End a session in order. Notes the trunk's peak memory if it still answers."""
        self._streams.discard(stream)
        peak_rss_bytes = stream.close()
        if peak_rss_bytes is not None:
            self._endpoints[stream.address].give_back(stream.channel)
            self.facts = (replace(self.facts[0], peak_rss_bytes=peak_rss_bytes),)

    def close(self) -> None:
        """Close every channel, and with it every session."""
        self._closed = True
        for stream in list(self._streams):
            stream.drop()
        for endpoint in self._endpoints.values():
            endpoint.close()
        if self._directory is not None:
            self._directory.close()

    def _open_at(self, endpoint: Endpoint, opening: Opening, budget: RetryBudget) -> Stream:
        """Open a session at `endpoint`, and make it current. Raises its last error while the breaker is open."""
        if endpoint.breaker.rest_s():
            raise budget.errors.get(endpoint.address, _resting(endpoint))
        endpoint.breaker.trying()
        stream = Stream(endpoint.take(), endpoint.address, self._served, opening)
        try:
            with budget.leaving_by(stream.overdue):
                opened = stream.open(budget.wait_s())
        except BaseException as error:
            stream.drop()
            if isinstance(error, TrunkUnavailable) and not budget.gone.is_set():
                endpoint.breaker.failed()
            raise
        self._begin_with(endpoint.address)
        self._streams.add(stream)
        peak = self.facts[0].peak_rss_bytes if stream.address == self.facts[0].address else 0
        self.facts = (TrunkFacts(opened.threads, opened.load_s, opened.import_rss_bytes, peak, stream.address),)
        return stream

    def _begin_with(self, address: str) -> None:
        order = deque(self._order)  # a copy: another thread may have the directory's next list
        if address in order:
            order.rotate(-order.index(address))
        else:  # the directory does not list it any more
            order.appendleft(address)
        self._order = order

    def _look(self, budget: RetryBudget, patient: bool) -> list[float]:
        """Take the directory's addresses, where there is one; those that failed within `budget` come last. Returns when
        to ask again if it lists none, as `due` of `open`."""
        if self._directory is None:
            return []
        try:
            found = self._directory.addresses(self._served.plan, min(TIMEOUT_S, budget.wait_s()))
        except TrunkError as error:
            budget.errors[self._directory.address] = error
            return [0.0] if patient and isinstance(error, TrunkUnavailable) else []
        budget.errors.pop(self._directory.address, None)
        for address in found:
            self._endpoints.setdefault(address, Endpoint(address, self._credentials))
        for address in self._endpoints.keys() - set(found):
            self._endpoints[address].close_idle()  # a replica that was started again has another address
        self._order = deque(sorted(found, key=budget.errors.__contains__))
        return []


def _stay() -> None:
    """Nothing is under way that a client could leave."""


def _resting(endpoint: Endpoint) -> TrunkUnavailable:
    """The error of an address whose breaker is open."""
    return TrunkUnavailable(
        f"The trunk server at {endpoint.address} failed {endpoint.breaker.failures} times in a row and is not tried "
        f"again for {endpoint.breaker.rest_s():.1f} s."
    )


def _due_s(endpoint: Endpoint, error: TrunkError, patient: bool) -> float | None:
    """The seconds until the next try after `error`, or None if there should be none."""
    rest_s = endpoint.breaker.rest_s()
    if isinstance(error, TrunkFull):
        return max(error.retry_s, rest_s)
    return rest_s if isinstance(error, TrunkUnavailable) and (patient or not rest_s) else None

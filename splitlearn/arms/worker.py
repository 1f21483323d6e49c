"""An arm's worker process, seen from the process that started it: it loads once, then runs one generation at a time."""

import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from splitlearn.arms.exchange import Exchange
from splitlearn.arms.spec import CANCEL, ArmEnd, ArmReady, ArmSpec, CandidatesRequest, TokenCandidates
from splitlearn.errors import SplitlearnError, WorkerDied
from splitlearn.events import Event, GenerationRequest, Reconnecting, TokenEvent
from splitlearn.flags.selection import FlagSet
from splitlearn.runtime import process
from splitlearn.runtime.process import Child, raised

WARM_UP_TOKENS = 8
REST_S = 45.0
"""Seconds without a run after which a worker is warmed up again. A trunk server closes a connection after 60 s without
calls, and the next run's TTFT would include a new connection."""
CANCEL_TIMEOUT_S = 2.0
POLL_S = 0.05
Message = Event | Reconnecting | ArmEnd
ENDS = (ArmEnd, TokenCandidates, SplitlearnError)


def start(spec: ArmSpec) -> Child:
    """Start a worker for `spec`; its first message is an ArmReady or an error."""
    return process.start(f"The {spec.kind} arm's worker process", "splitlearn.arms.worker_main:work", spec)


@dataclass
class Worker:
    """A running worker process. `warm` is how many tokens it was warmed up with, by flags and samples. `compile_s` is
    seconds of compilation so far, by flags. `exchange` is for many generations at once, of which `users` are under way;
    everything else is for one at a time, while there is none of those."""

    child: Child
    ready: ArmReady
    warm: dict[tuple[FlagSet, int], int] = field(default_factory=dict)
    compile_s: dict[FlagSet, float] = field(default_factory=lambda: defaultdict(float))
    ran_at: float = 0.0
    users: int = 0

    def __post_init__(self) -> None:
        self.exchange = Exchange(self.child)

    @classmethod
    def start(cls, spec: ArmSpec, stop: threading.Event) -> "Worker | None":
        """A worker that has loaded its stages; None when `stop` was set before it had. Raises what loading raised."""
        child = start(spec)
        try:
            while not child.connection.poll(POLL_S):
                if stop.is_set():
                    child.stop()
                    return None
            return cls(child, raised(child.receive()))
        except SplitlearnError:
            child.stop()
            raise

    def usable(self) -> bool:
        """True while the process runs."""
        return self.child.alive()

    def idle(self) -> bool:
        """Whether it answers no requests of `Runs.serve`. While an arm runs alone no worker is evicted."""
        return not self.users

    def stop(self) -> None:
        """End the process."""
        self.child.stop()

    def warm_up(self, flags: FlagSet, request: GenerationRequest, stop: threading.Event) -> None:
        """Run a few tokens of `request`, unless as many were run with these flags and samples within REST_S."""
        tokens, key = min(WARM_UP_TOKENS, request.max_new_tokens), (flags, request.samples)
        rested = time.monotonic() - self.ran_at > REST_S
        if rested or tokens > self.warm.get(key, 0):
            short = replace(request, max_new_tokens=tokens, kept=False)
            self.compile_s[flags] += compile_seconds(self.generate(flags, short, stop))
            if not stop.is_set():
                self.warm[key] = tokens

    def generate(self, flags: FlagSet, request: GenerationRequest, stop: threading.Event) -> Iterator[Message]:
        """What the worker sends for one request under `flags`, up to its ArmEnd. Raises the error that it sends
        instead."""
        yield from self._ask((flags, request), stop)

    def candidates(self, asked: CandidatesRequest, stop: threading.Event) -> TokenCandidates:
        """What the worker answers to `asked`; nothing in it when `stop` was set before."""
        found = [item for item in self._ask(asked, stop) if isinstance(item, TokenCandidates)]
        return found[0] if found else TokenCandidates()

    def _ask(self, message: object, stop: threading.Event) -> Iterator[Any]:
        """What the worker sends for `message`, up to one of ENDS."""
        if not self.exchange.settle(CANCEL_TIMEOUT_S):
            self.child.stop()
        self.child.send(message)
        ended = False
        try:
            while not ended and not stop.is_set():
                if not self.child.connection.poll():
                    stop.wait(POLL_S)  # not on the pipe: to wake a reader takes the worker 0.1 ms of each token
                    continue
                item = self.child.receive()
                ended = isinstance(item, ENDS)
                yield raised(item)
        finally:
            self.ran_at = time.monotonic()
            if not ended:
                self._cancel()

    def _cancel(self) -> None:
        """Ask the worker to end its run. If it takes longer than CANCEL_TIMEOUT_S, end the process."""
        deadline = time.monotonic() + CANCEL_TIMEOUT_S
        try:
            self.child.send(CANCEL)
            while self.child.connection.poll(max(0.0, deadline - time.monotonic())):
                if isinstance(self.child.receive(), ENDS):
                    return
        except WorkerDied:
            return
        self.child.stop()


def compile_seconds(items: Iterable[object]) -> float:
    """What was spent compiling in the steps among `items`."""
    return sum(item.compile_s for item in items if isinstance(item, TokenEvent))

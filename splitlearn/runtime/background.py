"""Work in a thread of this process, so that a page may close and come back: one piece at a time, with its status.

class Counting(Background[Count]): ...
counting.begin(lambda stop: (Count(number) for number in range(9)), "counting")
with counting.calling(draw): ...      # called each time `latest` changes
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Generic, Protocol, TypeVar

CLOSE_TIMEOUT_S = 10.0


class WorkStatus(Protocol):
    """A piece of work at one moment. `ended` is "" while it runs, then how it ended."""

    @property
    def ended(self) -> str: ...


Status = TypeVar("Status", bound=WorkStatus)


class Background(Generic[Status]):
    """Runs one piece of work at a time in a thread."""

    def __init__(self) -> None:
        self._status: Status | None = None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._listeners: list[Callable[[], None]] = []

    @property
    def running(self) -> bool:
        """Whether work is under way."""
        return self._status is not None and not self._status.ended

    @property
    def latest(self) -> Status | None:
        """The status of the work under way, or of the last one; None before the first."""
        return self._status

    def stop(self) -> None:
        """Ask the work under way to end."""
        self._stop.set()

    def close(self) -> None:
        """Stop the work and wait for its end."""
        self.stop()
        if self._thread is not None:
            self._thread.join(CLOSE_TIMEOUT_S)

    @contextmanager
    def calling(self, listener: Callable[[], None]) -> Iterator[None]:
        """Inside, call `listener` in the work's thread each time `latest` changes."""
        self._listeners.append(listener)
        try:
            yield
        finally:
            self._listeners.remove(listener)

    def begin(self, first: Status, work: Callable[[threading.Event], Iterator[Status]], name: str) -> None:
        """Show the status `first`, then in a thread called `name` each that `work` gives, to one that has ended. `work`
        ends early when the event that it gets is set, and raises nothing."""
        self._stop = stop = threading.Event()
        self._show(first)

        def run() -> None:
            for status in work(stop):
                self._show(status)

        self._thread = threading.Thread(target=run, name=name, daemon=True)
        self._thread.start()

    def _show(self, status: Status) -> None:
        self._status = status
        for listener in list(self._listeners):
            listener()

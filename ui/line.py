"""The queue of all who run or wait on the page: visitors and, with `ui.api`, requests of its endpoint."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

POLL_S = 0.1


class Line:
    """Gradio runs the visitors' calls one at a time, first come, first served. So a visitor with Gradio's turn (`take`)
    stands before all other visitors, and waits for the requests that came before her. A request runs once it is first.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._places: list[str] = []
        self._requests: set[str] = set()

    def join(self, visitor: str) -> int:
        """Join at the end, unless the visitor is already in it. Returns her place: 0 runs, 1 is next."""
        with self._changed:
            if visitor not in self._places:
                self._places.append(visitor)
            return self._places.index(visitor)

    def join_as_request(self, name: str) -> None:
        """Join at the end as a request."""
        with self._changed:
            self._requests.add(name)
            self._places.append(name)

    def take(self, visitor: str, stop: threading.Event | None = None) -> None:
        """Stand before all other visitors, and wait until the requests before `visitor` have ended, she has left, or
        `stop` is set. Nothing for one who has not joined: a call of the API has the turn under a name of its own."""
        with self._changed:
            if visitor not in self._places:
                return
            at = self._places.index(visitor)
            before = [each for each in self._places[:at] if each in self._requests]
            self._places = [*before, visitor, *(each for each in self._places if each not in (*before, visitor))]
            while self._place(visitor) and not (stop is not None and stop.is_set()):
                self._changed.wait(POLL_S)

    @contextmanager
    def turn(self, visitor: str, stop: threading.Event | None = None) -> Iterator[None]:
        """`join`, `take`, and leave at the end."""
        self.join(visitor)
        self.take(visitor, stop)
        try:
            yield
        finally:
            self.leave(visitor)

    def leave(self, name: str) -> None:
        """Remove a visitor or a request whose run has ended, or who has left."""
        with self._changed:
            self._requests.discard(name)
            if name in self._places:
                self._places.remove(name)
            self._changed.notify_all()

    @property
    def taken(self) -> bool:
        """Whether anybody runs or waits."""
        return bool(self._places)

    @property
    def runs_request(self) -> bool:
        """Whether a request runs now."""
        with self._changed:
            return self._places[:1] != [] and self._places[0] in self._requests

    def has(self, visitor: str) -> bool:
        """Whether the visitor runs or waits."""
        with self._changed:
            return visitor in self._places

    def others(self, visitor: str) -> int:
        """How many are in the queue besides `visitor`."""
        with self._changed:
            return sum(each != visitor for each in self._places)

    def place(self, name: str) -> int:
        """The place of a visitor or request; 0 for one who does not wait."""
        with self._changed:
            return self._place(name)

    def _place(self, name: str) -> int:
        return self._places.index(name) if name in self._places else 0

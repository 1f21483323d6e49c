"""The generations at once of one worker, seen from the process that asks: sends requests, and hands on what comes back.

A thread reads the worker's pipe while any generation is under way.
"""

import itertools
import threading
from collections.abc import Iterator
from queue import Empty, SimpleQueue

from splitlearn.arms.spec import ArmEnd, ServeCancel, Served, ServedItem, ServeRequest
from splitlearn.errors import SplitlearnError, as_error
from splitlearn.events import Event, GenerationRequest
from splitlearn.flags.selection import FlagSet
from splitlearn.runtime.process import Child, raised

POLL_S = 0.05
ENDS = (ArmEnd, SplitlearnError)


class Exchange:
    """The requests to `child` that it answers at once. Any thread may ask."""

    def __init__(self, child: Child) -> None:
        self._child, self._numbers = child, itertools.count()
        self._lock, self._sending = threading.Lock(), threading.Lock()
        self._answers: dict[int, SimpleQueue[Served]] = {}
        self._reader: threading.Thread | None = None
        self._reading = False

    def ask(
        self, flags: FlagSet, request: GenerationRequest, holder: str, stop: threading.Event, batch: bool = False
    ) -> Iterator[Event | ArmEnd]:
        """The events of a generation under `flags`, then its ArmEnd. Setting `stop`, or closing the iterator, ends the
        generation. Raises the error that comes instead, and WorkerDied."""
        number, answers = next(self._numbers), SimpleQueue[Served]()
        self._enter(number, answers)
        ended = False
        try:
            self._send(ServeRequest(number, flags, request, holder, batch))
            while not ended and not stop.is_set():
                try:
                    item = answers.get(timeout=POLL_S)
                except Empty:
                    continue
                ended = isinstance(item, ENDS)
                yield raised(item)
        finally:
            if not ended:
                self._send(ServeCancel(number))

    def settle(self, timeout_s: float) -> bool:
        """Wait until no generation is under way, also of those that were cancelled. False after `timeout_s`."""
        reader = self._reader
        if reader is not None:
            reader.join(timeout_s)
        return not self._answers

    def _enter(self, number: int, answers: SimpleQueue[Served]) -> None:
        with self._lock:
            self._answers[number] = answers
            if not self._reading:
                self._reading, self._reader = True, threading.Thread(target=self._read, daemon=True)
                self._reader.start()

    def _read(self) -> None:
        """Hand on what the worker sends, until nothing is under way."""
        try:
            while self._goes_on():
                if self._child.connection.poll(POLL_S):
                    self._hand_on(self._child.receive())
        except Exception as error:  # the worker has died: all hear of it
            with self._lock:
                for answers in self._answers.values():
                    answers.put(as_error(error, "generating"))
                self._answers.clear()
                self._reading = False

    def _goes_on(self) -> bool:
        with self._lock:
            self._reading = bool(self._answers)
            return self._reading

    def _hand_on(self, found: ServedItem) -> None:
        self._answers[found.number].put(found.item)
        if isinstance(found.item, ENDS):
            with self._lock:
                del self._answers[found.number]

    def _send(self, message: object) -> None:
        with self._sending:
            self._child.send(message)

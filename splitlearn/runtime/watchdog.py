"""A thread that calls back what is overdue. It runs only while there is something to watch."""

import threading
import time
from typing import Protocol


class Deadline(Protocol):
    """Something that can become overdue."""

    def due_s(self) -> float:
        """The time, by `time.monotonic`, from which it is overdue; infinity for never."""

    def overdue(self) -> None:
        """Called once, from the watching thread, after `due_s`. It is then no longer watched."""


class Watchdog:
    """Checks any number of deadlines every `look_s` seconds."""

    def __init__(self, look_s: float) -> None:
        self._look_s = look_s
        self._lock = threading.Lock()
        self._watched: set[Deadline] = set()
        self._looking = False

    def watch(self, item: Deadline) -> None:
        """Watch `item` until it is overdue or dropped."""
        with self._lock:
            self._watched.add(item)
            if not self._looking:
                self._looking = True
                threading.Thread(target=self._look, daemon=True).start()

    def drop(self, item: Deadline) -> None:
        """Stop watching `item`. Does nothing if it is not watched."""
        with self._lock:
            self._watched.discard(item)

    def _look(self) -> None:
        while True:
            time.sleep(self._look_s)
            now = time.monotonic()
            with self._lock:
                if not self._watched:
                    self._looking = False
                    return
                late = [item for item in self._watched if now > item.due_s()]
                self._watched.difference_update(late)
            for item in late:
                item.overdue()

"""One thread that looks, now and then, for what is overdue. It is there while there is something to watch."""

import threading
import time
from typing import Protocol


class Watched(Protocol):
    """What may come to be overdue."""

    def due_s(self) -> float:
        """When it will be, by `time.monotonic`; infinity while nothing is waited for."""

    def overdue(self) -> None:
        """It is: called once, from the watching thread, and it is not watched any more."""


class Watchdog:
    """Watches any number of things, and looks every `look_s` seconds."""

    def __init__(self, look_s: float) -> None:
        self._look_s = look_s
        self._lock = threading.Lock()
        self._watched: set[Watched] = set()
        self._looking = False

    def watch(self, item: Watched) -> None:
        """Until it is overdue or dropped."""
        with self._lock:
            self._watched.add(item)
            if not self._looking:
                self._looking = True
                threading.Thread(target=self._look, daemon=True).start()

    def drop(self, item: Watched) -> None:
        """Watch it no more; said again, it changes nothing."""
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

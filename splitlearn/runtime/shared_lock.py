"""A lock that one holds alone, or several share.

    with lock: ...              # alone
    with lock.shared(): ...     # beside others who share it

Who wants it alone comes before those who would share it next, so that a stream of them keeps nobody waiting for ever.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class SharedLock:
    """Not reentrant. A holder may release it from another thread."""

    def __init__(self) -> None:
        self._free = threading.Condition()
        self._alone, self._wanted, self._sharing = False, 0, 0

    def locked(self) -> bool:
        """Whether somebody holds it."""
        return self._alone or self._sharing > 0

    def acquire(self, timeout_s: float | None = None) -> bool:
        """Hold it alone. Returns False if that took longer than `timeout_s`."""
        with self._free:
            self._wanted += 1
            try:
                self._alone = self._free.wait_for(lambda: not self.locked(), timeout_s)
                return self._alone
            finally:
                self._wanted -= 1
                self._free.notify_all()

    def release(self) -> None:
        """End to hold it alone."""
        with self._free:
            self._alone = False
            self._free.notify_all()

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Hold it beside others in a `with` block."""
        with self._free:
            self._free.wait_for(lambda: not (self._alone or self._wanted))
            self._sharing += 1
        try:
            yield
        finally:
            with self._free:
                self._sharing -= 1
                self._free.notify_all()

"""A pool of child processes by key; the least recently used one makes room for a new one.

    pool = ProcessPool[Spec, Worker](has_room=lambda count: count < limit)
    worker = pool.obtain(spec, lambda: Worker.start(spec))    # the usable one, or evict until there is room and start

Where starting and stopping must not happen under the caller's lock, the same in its parts: `get`, `has_room`, `evict`,
`add`. The pool has no lock: its owner calls it from one thread at a time.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Generic, Protocol, TypeVar, overload


class Member(Protocol):
    """A child process in a pool."""

    def usable(self) -> bool:
        """False once it has ended for good. It may wait while the process starts again."""

    def idle(self) -> bool:
        """Whether it may be evicted now."""

    def stop(self) -> None:
        """End the process. A second call does nothing."""


Key = TypeVar("Key", bound=Hashable)
Process = TypeVar("Process", bound=Member)


class ProcessPool(Generic[Key, Process]):
    """Processes from the least to the most recently used. `has_room(count)` says whether one more fits beside `count`
    that there are: by a limit, or by the memory that is free at that moment."""

    def __init__(self, has_room: Callable[[int], bool]) -> None:
        self._fits = has_room
        self._members: OrderedDict[Key, Process] = OrderedDict()

    def __len__(self) -> int:
        return len(self._members)

    def __iter__(self) -> Iterator[Process]:
        """The processes, least recently used first; a copy, so that the pool may change meanwhile."""
        return iter(list(self._members.values()))

    @property
    def latest(self) -> Key | None:
        """The key used last, or None of an empty pool."""
        return next(reversed(self._members), None)

    def get(self, key: Key) -> Process | None:
        """The usable process of `key`, which is then the most recently used. One that has ended is stopped and removed:
        None, as for an unknown key."""
        member = self._members.get(key)
        if member is None:
            return None
        if not member.usable():
            self.remove(member)
            member.stop()
            return None
        self._members.move_to_end(key)
        return member

    @overload
    def obtain(self, key: Key, start: Callable[[], Process]) -> Process: ...
    @overload
    def obtain(self, key: Key, start: Callable[[], Process | None]) -> Process | None: ...
    def obtain(self, key: Key, start: Callable[[], Process | None]) -> Process | None:
        """The usable process of `key`, or what `start` gives, after idle ones were stopped until there is room.

        `start` is called even where nothing more can be evicted. It may give None, for a start that was cancelled;
        what it raises is passed on, and the pool is as if `start` had not been called.
        """
        member = self.get(key)
        if member is None:
            self._make_room()
            member = start()
            if member is not None:
                self.add(key, member)
        return member

    def has_room(self) -> bool:
        """Whether one more process fits beside those that there are."""
        return self._fits(len(self._members))

    def evict(self) -> Process | None:
        """Remove the least recently used idle process, which the caller stops. None when none is idle."""
        member = next((member for member in self if member.idle()), None)
        if member is not None:
            self.remove(member)
        return member

    def add(self, key: Key, member: Process) -> None:
        """`member` is the process of `key`, and the most recently used."""
        self._members[key] = member
        self._members.move_to_end(key)

    def remove(self, member: Process) -> None:
        """The pool knows `member` no more. It is not stopped. Does nothing when it is not there."""
        for key in [key for key, each in self._members.items() if each is member]:
            del self._members[key]

    def prune(self) -> None:
        """Stop and remove the processes that have ended."""
        for member in self:
            if not member.usable():
                self.remove(member)
                member.stop()

    def clear(self) -> list[Process]:
        """Remove all processes, which the caller stops (`stop_all`)."""
        members = list(self._members.values())
        self._members.clear()
        return members

    def close(self) -> None:
        """Stop and remove all processes, idle or not, all at the same time."""
        stop_all([member.stop for member in self.clear()])

    def _make_room(self) -> None:
        while self._members and not self.has_room():
            member = self.evict()
            if member is None:
                return
            member.stop()


def stop_all(stops: Sequence[Callable[[], None]]) -> None:
    """Call what stops each of several processes at the same time, and wait for the last of them."""
    threads = [threading.Thread(target=stop) for stop in stops]
    for each in threads:
        each.start()
    for each in threads:
        each.join()

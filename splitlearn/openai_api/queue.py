"""Which requests run and which wait: a pure record, without clock or thread.

Interactive requests come first. They never wait for batch ones: those run in places that interactive ones leave, and in
a few of their own, so that no stream of interactive requests keeps them waiting for ever. Within a priority the order
is that of arrival. A request takes as many places as it asks for answers.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

Priority = Literal["interactive", "batch"]
PRIORITIES: Sequence[Priority] = get_args(Priority)
OWN_SHARE = 4
"""Batch requests have a place of their own for every so many."""


@dataclass(frozen=True, eq=False)
class Entry:
    """A request for so many `answers`."""

    priority: Priority = "interactive"
    answers: int = 1


class RequestQueue:
    """At most `running` answers of each priority are generated at once, and `waiting` requests of each wait."""

    def __init__(self, running: int, waiting: int) -> None:
        self._most_running, self._most_waiting = running, waiting
        self._running: dict[Priority, list[Entry]] = {priority: [] for priority in PRIORITIES}
        self._waiting: dict[Priority, list[Entry]] = {priority: [] for priority in PRIORITIES}

    def waiting(self, priority: Priority) -> int:
        """How many requests of this priority wait."""
        return len(self._waiting[priority])

    def answers(self, *priorities: Priority) -> int:
        """How many answers of these priorities are generated now."""
        return sum(entry.answers for priority in priorities for entry in self._running[priority])

    def is_full(self, entry: Entry) -> bool:
        """Whether `entry` can neither run nor wait."""
        line = self._waiting[entry.priority]
        return len(line) >= self._most_waiting and (bool(line) or not self._may_run(entry))

    def add(self, entry: Entry) -> None:
        """Let `entry` wait; `start` says when it runs."""
        self._waiting[entry.priority].append(entry)

    def remove(self, entry: Entry) -> None:
        """`entry` has ended, or waits no more."""
        for line in (self._running[entry.priority], self._waiting[entry.priority]):
            if entry in line:
                line.remove(entry)

    def start(self) -> list[Entry]:
        """The requests that begin to run now."""
        return list(self._starting())

    def _starting(self) -> Iterator[Entry]:
        for priority in PRIORITIES:
            line = self._waiting[priority]
            while line and self._may_run(line[0]):
                entry = line.pop(0)
                self._running[priority].append(entry)
                yield entry

    def _may_run(self, entry: Entry) -> bool:
        """Whether there are places for `entry`, or none of its priority is taken: it may ask for more than there
        are."""
        own = self.answers(entry.priority)
        if not own:
            return True
        if entry.priority == "interactive":
            return own + entry.answers <= self._most_running
        left = self.answers(*PRIORITIES) + entry.answers <= self._most_running and not self._waiting["interactive"]
        return left or own + entry.answers <= self._most_running // OWN_SHARE

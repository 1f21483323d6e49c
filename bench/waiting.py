"""Check the places in the queue that a page showed against when every run began and ended."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

PLACE = re.compile(r"You are number (\d+) in the queue")
# A page polls its place every second, and another run's end is noticed up to a second late.
LAG_S = 2.0


@dataclass
class Run:
    """One comparison as its page showed it: when it was pressed, began and ended, and each place in the queue with the
    time at which it was read."""

    pressed_s: float
    places: list[tuple[float, int]] = field(default_factory=list)
    started_s: float | None = None
    ended_s: float | None = None


@dataclass(frozen=True)
class Check:
    """Of the places `shown` to one run: how many were right at that moment, which were wrong for longer than LAG_S, and
    whether a later place was higher than an earlier one."""

    shown: int
    exact: int
    wrong: tuple[str, ...]
    went_up: bool


def place_of(status: str) -> int | None:
    """The place in the queue in a page's status; None if it has none."""
    found = PLACE.search(status)
    return int(found[1]) if found else None


def check(run: Run, others: Sequence[Run]) -> Check:
    """Check the places of `run` against the runs of others that began before it."""
    before = [other for other in others if other.started_s and run.started_s and other.started_s < run.started_s]

    def left(at: float) -> int:
        """How many of them had not ended."""
        return sum(other.ended_s is None or other.ended_s > at for other in before)

    wrong = [
        f"number {place}, with {left(at)} before it"
        for at, place in run.places
        if not left(at + LAG_S) <= place <= left(at - LAG_S)
    ]
    places = [place for _, place in run.places]
    return Check(
        shown=len(places),
        exact=sum(place == left(at) for at, place in run.places),
        wrong=tuple(wrong),
        went_up=any(later > earlier for earlier, later in zip(places, places[1:], strict=False)),
    )

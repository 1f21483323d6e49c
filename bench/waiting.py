"""Whether the places in line that a page showed were right, from when every run began and ended."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

PLACE = re.compile(r"You are number (\d+) in line")
# A page looks for its place every second, and another's end is seen up to a second late.
LAG_S = 2.0


@dataclass
class Run:
    """One comparison as its page showed it: when it was pressed, began and ended, and each place in line with the
    moment at which it was read."""

    pressed_s: float
    places: list[tuple[float, int]] = field(default_factory=list)
    started_s: float | None = None
    ended_s: float | None = None


@dataclass(frozen=True)
class Check:
    """Of the places `shown` to one run: how many were right at that very moment, what was wrong for longer than LAG_S,
    and whether a later place was higher than an earlier one."""

    shown: int
    exact: int
    wrong: tuple[str, ...]
    went_up: bool


def place_of(status: str) -> int | None:
    """The place in line that a page's status says; None where it says none."""
    found = PLACE.search(status)
    return int(found[1]) if found else None


def check(run: Run, others: Sequence[Run]) -> Check:
    """The places of `run` against the runs of others that ended before it began."""
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

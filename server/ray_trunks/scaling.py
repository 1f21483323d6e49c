"""How many replicas a link should have: a function of their loads and the clock."""

from collections.abc import Sequence
from dataclasses import dataclass

from server.ray_trunks.load import Load

FULL, ROOMY = 0.8, 0.5
"""One more replica from this share on, on average; one less if the others would stay below this one."""


@dataclass(frozen=True)
class Bounds:
    """The least and the most replicas, and for how long one must have been dispensable before it goes."""

    least: int
    most: int
    idle_s: float


@dataclass(frozen=True)
class Decision:
    """How many replicas there should be, and since when one has been dispensable (None: it is not)."""

    wanted: int
    roomy_since: float | None = None


def decide(loads: Sequence[Load], starting: int, bounds: Bounds, now: float, before: Decision) -> Decision:
    """The next decision. `loads` are those of the replicas that serve; `starting` are on the way, and count as there.

    One step at a time: while a replica starts, no other one is added. It grows when sessions wait at every replica, or
    when they are `FULL` on average. It shrinks after `idle_s` in which the others would have been less than `ROOMY`.
    """
    there = len(loads) + starting
    if there < bounds.least:
        return Decision(bounds.least)
    if not loads or starting:
        return Decision(min(there, bounds.most))
    full = sum(min(1.0, load.full) for load in loads)
    if full / there >= FULL or all(load.sessions_waiting for load in loads):
        return Decision(min(there + 1, bounds.most))
    if there == bounds.least or full / (there - 1) >= ROOMY:
        return Decision(min(there, bounds.most))
    since = now if before.roomy_since is None else before.roomy_since
    return Decision(there - 1 if now - since >= bounds.idle_s else there, since)

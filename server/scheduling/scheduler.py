"""Which waiting steps the next forward computes, and how many tokens of each: a pure function, without clock or thread.

Sessions that can share a forward form a group. Groups take turns. In a forward every session of the group that decodes
has its one token; prompts share a bounded number of tokens, so that a long one delays the others by no more than that.
Prompts take turns, too: first among holders (a token of the access file, or a connection), then among a holder's own,
so that a holder of many sessions takes no more than one of few.

What a group is says `Seat.group` (sessions.py); how long a forward waits for others, `Engine._gather` (engine.py).
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Protocol, TypeVar

LEAST_PIECE = 16
"""A prompt gets at least so many tokens of a forward, or none: a forward reads all weights whatever it computes."""
NEVER = -1


class Step(Protocol):
    """A step that waits. `left` tokens are still to be computed; `ran` is the number of the last forward that computed
    a part of it, NEVER before the first. Steps of one `group` can share a forward."""

    @property
    def group(self) -> Hashable:
        """What must be equal for steps to share a forward."""

    @property
    def holder(self) -> Hashable:
        """Whose step it is."""

    @property
    def left(self) -> int:
        """Tokens still to be computed, 1 or more."""

    @property
    def ran(self) -> int:
        """The last forward that it was part of."""


S = TypeVar("S", bound=Step)


@dataclass(frozen=True)
class Turns:
    """The number of the last forward of each group, and of the last that had a part of a holder's prompts."""

    groups: Mapping[Hashable, int]
    holders: Mapping[Hashable, int]


def next_batch(
    steps: Sequence[S], budget: int, budget_alone: int, turns: Turns, *, awaited: bool
) -> list[tuple[S, int]]:
    """The steps of the next forward, each with its tokens; `steps` are in the order of their arrival.

    Prompts take at most `budget` tokens while anybody decodes or is about to (`awaited`), otherwise at most
    `budget_alone`.
    """
    if not steps:
        return []
    group = min((step.group for step in steps), key=lambda each: turns.groups.get(each, NEVER))
    alike = [step for step in steps if step.group == group]
    decoding = [(step, 1) for step in alike if step.left == 1]
    others_decode = awaited or any(step.left == 1 for step in steps)
    return decoding + _share(_by_turns(alike, turns), budget if others_decode else budget_alone)


def _by_turns(steps: Sequence[S], turns: Turns) -> list[S]:
    """The prompts of `steps` in the order of their turns: one of each holder, then another one of each, and on."""
    own: dict[Hashable, list[S]] = {}
    for step in sorted((step for step in steps if step.left > 1), key=lambda each: each.ran):
        own.setdefault(step.holder, []).append(step)
    order = sorted(own, key=lambda holder: turns.holders.get(holder, NEVER))
    rounds = zip_longest(*(own[holder] for holder in order))
    return [step for each in rounds for step in each if step is not None]


def _share(prompts: Sequence[S], budget: int) -> list[tuple[S, int]]:
    """Equal parts of `budget` for the first of `prompts`; what one does not need goes to those after it."""
    taking = prompts[: max(1, budget // LEAST_PIECE)]
    shares: list[tuple[S, int]] = []
    for at, step in enumerate(sorted(taking, key=lambda each: each.left)):
        tokens = min(step.left, budget // (len(taking) - at))
        budget -= tokens
        shares.append((step, tokens))
    return [(step, tokens) for step, tokens in shares if tokens]

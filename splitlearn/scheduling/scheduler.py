"""Chooses the steps of the next forward, and how many tokens of each: a pure function, without clock or thread.

Sessions that can share a forward form a group, and groups take turns. Every decoding session of the group gets its one
token. Prompts share a bounded number of tokens, so that a long one cannot delay the others by more than that. Prompts
take turns, too: first among holders (a token of the access file, or a connection), then within a holder. So a holder of
many sessions gets no more than a holder of one.

`EngineSession.group` (sessions.py) defines a group. `Engine` (engine.py) decides how long a forward waits for more
steps.
"""

import sys
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import TypeVar

MIN_CHUNK = 16
"""The least tokens of a chunk of a prompt, since a forward reads all weights however few tokens it has."""
ALONE_TOKENS = 256
"""Tokens of prompts in a forward while no session decodes. A new step waits for no more than those. 512 tokens take as
long in two chunks as in one (docs/server.md)."""
WHOLE = sys.maxsize
NEVER = -1


@dataclass(eq=False, kw_only=True)
class QueueEntry:
    """A step in the queue, of the client `holder`. `left`: tokens still to compute, 1 or more. `ran`: the number of the
    last forward that computed a part of it. Steps of one `group` can share a forward."""

    group: Hashable
    holder: Hashable
    left: int
    ran: int = NEVER


S = TypeVar("S", bound=QueueEntry)
Batch = list[tuple[S, int]]
"""Steps, each with the number of its tokens that the forward computes."""


@dataclass(frozen=True)
class Limits:
    """The limits of one forward.

    `shared`: it may have steps of several sessions. `gather_s`: how long it waits for sessions whose next step is due.
    `prompt_tokens`: its tokens of prompts while other sessions decode; WHOLE for a stage that computes a prompt whole.
    `alone_tokens`: its tokens of prompts while none decodes, if that is more.
    """

    shared: bool
    gather_s: float = 0.0
    prompt_tokens: int = WHOLE
    alone_tokens: int = ALONE_TOKENS


@dataclass(frozen=True)
class Turns:
    """`groups`: the last forward of each group. `holders`: the last forward with a chunk of a holder's prompts."""

    groups: Mapping[Hashable, int] = field(default_factory=dict)
    holders: Mapping[Hashable, int] = field(default_factory=dict)

    def after(self, batch: Batch[S], forward: int) -> "Turns":
        """The turns after `batch`, which was forward number `forward`."""
        groups = {step.group: forward for step, _ in batch}
        holders = {step.holder: forward for step, _ in batch if step.left > 1}
        return Turns({**self.groups, **groups}, {**self.holders, **holders})

    def only(self, groups: Collection[Hashable], holders: Collection[Hashable]) -> "Turns":
        """The turns of these groups and holders, without those that are gone."""
        return Turns(
            {group: ran for group, ran in self.groups.items() if group in groups},
            {holder: ran for holder, ran in self.holders.items() if holder in holders},
        )


def next_batch(steps: Sequence[S], limits: Limits, turns: Turns, *, awaited: bool) -> Batch[S]:
    """The batch of the next forward. `steps` are in order of arrival.

    `awaited`: a step of another session, which decodes, is expected soon.
    """
    if not steps:
        return []
    group = min((step.group for step in steps), key=lambda each: turns.groups.get(each, NEVER))
    alike = [step for step in steps if step.group == group]
    decoding = [(step, 1) for step in alike if step.left == 1]
    others_decode = awaited or any(step.left == 1 for step in steps)
    budget = limits.prompt_tokens if others_decode else max(limits.prompt_tokens, limits.alone_tokens)
    return decoding + _share(_by_turns(alike, turns), budget)


def _by_turns(steps: Sequence[S], turns: Turns) -> list[S]:
    """The prompts of `steps`, the longest waiting first: one of each holder, then a second of each, and so on."""
    own: dict[Hashable, list[S]] = {}
    for step in sorted((step for step in steps if step.left > 1), key=lambda each: each.ran):
        own.setdefault(step.holder, []).append(step)
    order = sorted(own, key=lambda holder: turns.holders.get(holder, NEVER))
    rounds = zip_longest(*(own[holder] for holder in order))
    return [step for each in rounds for step in each if step is not None]


def _share(prompts: Sequence[S], budget: int) -> Batch[S]:
    """Equal shares of `budget` for the first `prompts`. Tokens that a short one leaves go to the longer ones."""
    taking = prompts[: max(1, budget // MIN_CHUNK)]
    shares: Batch[S] = []
    for at, step in enumerate(sorted(taking, key=lambda each: each.left)):
        tokens = min(step.left, budget // (len(taking) - at))
        budget -= tokens
        shares.append((step, tokens))
    return [(step, tokens) for step, tokens in shares if tokens]

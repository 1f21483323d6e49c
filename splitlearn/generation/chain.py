"""A model as a chain of stages, the sessions of one sample at these stages, and a step through them."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch

from splitlearn.events import SpotCheckResult
from splitlearn.stages.base import (
    FindsPrefixes,
    LogitsInParts,
    OpensTogether,
    Session,
    SpotChecked,
    Stage,
    StageInput,
    WholePrefix,
)
from splitlearn.stages.defences import Defended
from splitlearn.stages.prefix import PrefixSession, PrefixStage
from splitlearn.stages.settings import SessionSettings


@dataclass(frozen=True)
class Link:
    """One stage of the chain, and the settings of its sessions."""

    stage: Stage
    settings: SessionSettings


@dataclass
class Chain:
    """One sample's sessions, one at each stage. `rope_length` is that of `StageInput`: the length of the prompt.
    `defended` changes what the first stage gives before the second, the trunk, gets it."""

    sessions: Sequence[Session]
    rope_length: int
    defended: Defended | None = None

    def spot_checks(self) -> SpotCheckResult:
        """The spot checks of all sessions. Waits for those under way."""
        return SpotCheckResult.of(each.spot_checks() for each in self.sessions if isinstance(each, SpotChecked))

    def fork(self, other: "Chain", tokens: int) -> None:
        for own, theirs in zip(self.sessions, other.sessions, strict=True):
            own.fork(theirs, tokens)
        if self.defended is not None and other.defended is not None:
            self.defended.fork(other.defended, tokens)


@dataclass(frozen=True)
class Step:
    """One step of one sample: feeds `ids` [1, T] at `position`, for the logits of the last `rows` positions.

    `more`: another step may follow.
    """

    sample: int
    chain: Chain
    position: int
    ids: torch.Tensor
    rows: int = 1
    more: bool = False

    @property
    def end(self) -> int:
        return self.position + self.ids.shape[1]

    def item(self, at: int, x: torch.Tensor) -> StageInput:
        """The input of stage number `at`. `x` covers the positions up to `end`. The stage gets those of this step, or
        all of `x` if it keeps no earlier ones. The head gets as many rows as in the full arm, since products of another
        size may round differently."""
        session = self.chain.sessions[at]
        new = self.ids.shape[1]
        if x.shape[1] > new and not isinstance(session, WholePrefix):
            x = x[:, -new:]
        if at == 1 and self.chain.defended is not None:
            self.chain.defended.feed(self.position, self.ids[0].tolist())
            x = self.chain.defended.sent(x, self.end)
        return StageInput(session, self.end - x.shape[1], x, self.rows, rope_length=self.chain.rope_length)


def open_chains(
    stack: ExitStack,
    links: Sequence[Link],
    prompt: int,
    max_length: int,
    count: int,
    keys: Sequence[bytes] = (),
    seed: int = 0,
) -> tuple[list[Stage], list[Chain]]:
    """The stages, and the sessions of each of `count` samples. `stack` closes the sessions.

    `prompt` is the length of the prompt. A stage whose settings keep no KV cache gets the whole prefix in each step;
    the LM head never needs it. `keys` are those of kept blocks of the prompt (generation/prefix_cache.py). `seed` is
    that of what defences draw.
    """
    stages, opened = list[Stage](), list[Sequence[Session]]()
    for link in links:
        sessions = _sessions(link.stage, link.settings, max_length, count, keys)
        for session in sessions:
            stack.callback(session.close)
        recomputes = link.settings.new_cache is None and not isinstance(link.stage, LogitsInParts)
        stages.append(PrefixStage(link.stage) if recomputes else link.stage)
        opened.append([PrefixSession(each) for each in sessions] if recomputes else sessions)
    defences = links[0].settings.defences
    return stages, [
        Chain(sessions, prompt, Defended(defences, seed) if defences else None)
        for sessions in zip(*opened, strict=True)
    ]


def _sessions(
    stage: Stage, settings: SessionSettings, max_length: int, count: int, keys: Sequence[bytes]
) -> Sequence[Session]:
    if (keys or count > 1) and isinstance(stage, FindsPrefixes):
        return stage.open_with(settings, max_length, count, keys)
    if count > 1 and isinstance(stage, OpensTogether):
        return stage.open_together(settings, max_length, count)
    return [stage.open(settings, max_length) for _ in range(count)]

"""A model as a chain of stages, the sessions that one sample has at them, and a step through them."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch

from splitlearn.stages.base import LogitsInParts, OpensTogether, Session, Stage, StageInput
from splitlearn.stages.head import HeadSession
from splitlearn.stages.prefix import PrefixSession, PrefixStage
from splitlearn.stages.settings import SessionSettings


@dataclass(frozen=True)
class Link:
    """One stage of the chain and the settings that its sessions are opened with."""

    stage: Stage
    settings: SessionSettings


@dataclass
class Chain:
    """One sample's sessions, one at each stage. `rope_length` is that of `StageInput`: the length of the prompt."""

    sessions: Sequence[Session]
    rope_length: int

    def fork(self, other: "Chain", tokens: int) -> None:
        for own, theirs in zip(self.sessions, other.sessions, strict=True):
            own.fork(theirs, tokens)


@dataclass(frozen=True)
class Step:
    """What one sample feeds at once: `ids` [1, T] at `position`, for the logits of the last `rows` of them.

    `more` says whether another step may come after it.
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
        """What the stage number `at` is given of `x`, which covers the positions up to `end`: those of this step, or
        all where the stage keeps nothing of earlier ones. The head takes as many rows as in the full arm: products of
        other sizes may round otherwise."""
        session = self.chain.sessions[at]
        new = self.ids.shape[1]
        if x.shape[1] > new and not isinstance(session, PrefixSession | HeadSession):
            x = x[:, -new:]
        return StageInput(session, self.end - x.shape[1], x, self.rows, rope_length=self.chain.rope_length)


def open_chains(
    stack: ExitStack, links: Sequence[Link], prompt: int, max_length: int, count: int
) -> tuple[list[Stage], list[Chain]]:
    """The stages, and for each of `count` samples of a prompt of so many tokens its sessions, which `stack` closes.

    A stage whose settings keep no KV cache is given the whole prefix in each step; the LM head never needs it.
    """
    stages = [
        PrefixStage(link.stage)
        if link.settings.new_cache is None and not isinstance(link.stage, LogitsInParts)
        else link.stage
        for link in links
    ]
    opened = []
    for stage, link in zip(stages, links, strict=True):
        sessions = _sessions(stage, link.settings, max_length, count)
        for session in sessions:
            stack.callback(session.close)
        opened.append(sessions)
    return stages, [Chain(sessions, prompt) for sessions in zip(*opened, strict=True)]


def _sessions(stage: Stage, settings: SessionSettings, max_length: int, count: int) -> Sequence[Session]:
    if count > 1 and isinstance(stage, OpensTogether):
        return stage.open_together(settings, max_length, count)
    return [stage.open(settings, max_length) for _ in range(count)]

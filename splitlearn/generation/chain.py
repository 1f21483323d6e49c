"""A model as a chain of stages: each link with its settings, and what the session of each is fed."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from splitlearn.events import StageTiming
from splitlearn.stages.base import OpensTogether, Session, Stage, StageInput, StageOutput, UnderWay, WorksAhead
from splitlearn.stages.head import Early
from splitlearn.stages.settings import SessionSettings


@dataclass(frozen=True)
class Link:
    """One stage of the chain and the settings that its sessions are opened with."""

    stage: Stage
    settings: SessionSettings


Piece = tuple[int, torch.Tensor]


@dataclass
class Feed:
    """What a stage's session is given: the new positions, or the whole prefix when it keeps nothing between steps."""

    stage: Stage
    session: Session
    length: int = 0
    prefix: torch.Tensor | None = None
    rope_length: int = 0
    """Of each step (models/rope.py): the length of the prompt."""

    @cached_property
    def elsewhere(self) -> WorksAhead | None:
        """The stage, if it is one to which more can be sent than it has answered."""
        return self.stage if isinstance(self.stage, WorksAhead) else None

    def step(self, position: int, x: torch.Tensor, logits: int = 1) -> tuple[int, StageOutput]:
        """Hand on `x`, which covers the positions from `position` on. Returns the output and its first position."""
        item = self.input(position, x, logits)
        return item.position, self.stage.step([item])[0]

    def flow(self, pieces: Iterable[Piece], logits: int, note: Callable[[StageTiming], None]) -> Iterator[Piece]:
        """Hand on neighbouring pieces, each the first position and `x`, and give what comes out. A stage that works
        elsewhere has the next piece before it is asked for the last. `note` is told what each took."""
        under_way: deque[tuple[int, UnderWay]] = deque()

        def finished() -> Piece:
            position, begun = under_way.popleft()
            output = begun.finish()
            note(output.timing)
            return position, output.x

        for position, x in pieces:
            item = self.input(position, x, logits)
            if self.elsewhere is not None:
                begun = self.elsewhere.begin(item)
                note(begun.timing)
                under_way.append((item.position, begun))
                if len(under_way) > 1:
                    yield finished()
            else:
                output = self.stage.step([item])[0]
                note(output.timing)
                yield item.position, output.x
        while under_way:
            yield finished()

    def begin(self, position: int, x: torch.Tensor, *, uncertain: bool) -> tuple[int, UnderWay]:
        """A `step`, only begun, of a stage that works elsewhere, and the output's first position."""
        if self.elsewhere is None:
            raise TypeError(f"{self.stage} computes here")
        item = self.input(position, x, 1)
        return item.position, self.elsewhere.begin(item, uncertain=uncertain)

    def input(self, position: int, x: torch.Tensor, logits: int, early: Early | None = None) -> StageInput:
        """What the stage is given of `x`, which covers the positions from `position` on."""
        if self.session.recomputes:
            known = self.prefix[:, :position] if self.prefix is not None and position else x[:, :0]
            self.prefix = x = torch.cat([known, x], dim=1)
            position = 0
        elif position < self.length:  # a stage before this one recomputed what this one has in its cache
            x, position = x[:, self.length - position :], self.length
        self.length = position + x.shape[1]
        return StageInput(self.session, position, x, logits, early, rope_length=self.rope_length)

    def branch(self, other: "Feed", tokens: int) -> None:
        """Go on from the first `tokens` that were fed to `other`."""
        self.session.branch(other.session, tokens)
        self.length, self.prefix = tokens, other.prefix

    def roll_back(self, position: int) -> None:
        """The next step begins at `position`: what was fed from there on did not come true."""
        self.length = min(self.length, position)

    def restart(self, tokens: int) -> None:
        """The next step has the whole sequence, of so many tokens, as if it were a prompt."""
        self.length, self.rope_length = 0, tokens


def sessions(link: Link, max_length: int, count: int) -> Sequence[Session]:
    """`count` sessions of the link's stage, for at most `max_length` tokens each."""
    stage = link.stage
    if count > 1 and isinstance(stage, OpensTogether):
        return stage.open_together(link.settings, max_length, count)
    return [stage.open(link.settings, max_length) for _ in range(count)]

"""Decoding without a KV cache: wraps a local or remote stage, and passes it the whole prefix in each step."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from splitlearn.events import SpotCheckResult
from splitlearn.stages.base import Session, SpotChecked, Stage, StageInput, StageOutput, WholePrefix
from splitlearn.stages.settings import SessionSettings


@dataclass
class PrefixSession(WholePrefix):
    """A session at the wrapped stage, and its whole input so far: ids [1, n] or hidden states [1, n, H]."""

    session: Session
    prefix: torch.Tensor | None = None

    def fork(self, other: "PrefixSession", tokens: int) -> None:
        self.prefix = None if other.prefix is None else other.prefix[:, :tokens]

    def spot_checks(self) -> SpotCheckResult:
        return self.session.spot_checks() if isinstance(self.session, SpotChecked) else SpotCheckResult()

    def close(self) -> None:
        self.session.close()


@dataclass(frozen=True)
class PrefixStage:
    """Wraps a stage that keeps nothing between steps. Stores the input so far, and sends it again with the new one.

    The output covers the whole prefix, so that a later stage without a cache gets all of it, too. With rotary
    embeddings that depend on the length, earlier positions change.
    """

    stage: Stage

    def open(self, settings: SessionSettings, max_length: int) -> PrefixSession:
        return PrefixSession(self.stage.open(settings, max_length))

    def step(self, batch: Sequence[StageInput]) -> list[StageOutput]:
        return self.stage.step([self._whole(item) for item in batch])

    def _whole(self, item: StageInput) -> StageInput:
        session: PrefixSession = item.session
        if item.position and session.prefix is not None:
            session.prefix = torch.cat([session.prefix[:, : item.position], item.x], dim=1)
        else:
            session.prefix = item.x.clone()  # a remote stage's output is overwritten by its next step
        return replace(item, session=session.session, position=0, x=session.prefix)

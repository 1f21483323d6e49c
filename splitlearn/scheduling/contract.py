"""What an engine needs of the stage that it runs, and what it is told of the clients that open sessions."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from transformers.cache_utils import Cache

from splitlearn.stages.base import KeepsPrefixes, StageInput, StageOutput
from splitlearn.stages.settings import SessionSettings

Count = Callable[[int, int, float], None]
"""Is told of each forward: how many steps it computed, of how many tokens, and in how many seconds."""
WhenGone = Callable[[Callable[[], None]], bool]
"""Registers a callback for the client's end. Returns False if the client has gone already."""


@dataclass(frozen=True)
class Client:
    """Who opens a session: how long it waits for room and for each step, the holder that it counts for, and how its end
    is noticed. `batch`: nobody waits for the answer at a keyboard (admission.py)."""

    timeout_s: float
    holder: str
    when_gone: WhenGone
    batch: bool = False


class OwnSession(KeepsPrefixes, Protocol):
    """A session of the stage itself. `shares`: its steps can share a forward with those of other sessions."""

    @property
    def settings(self) -> SessionSettings: ...
    @property
    def shares(self) -> bool: ...


class EngineStage(Protocol):
    """A stage that an engine can run: `LocalStage` and `Head`."""

    @property
    def label(self) -> str:
        """The name of its time in the time breakdown."""

    @property
    def last(self) -> bool:
        """Whether it gives logits."""

    def open(self, settings: SessionSettings, max_length: int) -> OwnSession:
        """A session with memory of its own."""

    def session(
        self, cache: Cache | None, settings: SessionSettings, max_length: int, *, shares: bool = False
    ) -> OwnSession:
        """A session with this cache."""

    def size(self, item: StageInput) -> int:
        """How many tokens a forward has to compute for `item`."""

    def compute(self, batch: Sequence[StageInput]) -> list[StageOutput]:
        """Compute one step of each session."""

    def check(self, item: StageInput, output: StageOutput) -> None:
        """Raise NotFinite if the output for `item` holds NaN or Inf."""

    def computes_on_caller(self, item: StageInput) -> bool:
        """Whether the calling thread alone computes `item`."""

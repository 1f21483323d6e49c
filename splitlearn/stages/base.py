"""A stage is a run of consecutive layers with their caches; a model is a list of stages.

`Stage` is the protocol: `local.LocalStage` computes here, `client.remote_stage.RemoteStage` at the far end of a gRPC
stream. A stage's weights are separate from a session's cache, so that one stage can serve many sessions.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray

from splitlearn.events import SpotCheckResult, StageTiming
from splitlearn.kvcache.prefix_store import BlockPart
from splitlearn.stages.settings import SessionSettings

DROPS = np.dtype([("last", np.int64)])
"""A record of one session. `last`: the last step that the client dropped, with all before it."""


class DropMark(NamedTuple):
    """Marks step `number` of a session as one that the client may drop. `drops` is the session's record of DROPS. A
    kernel reads that record while it computes, without Python."""

    drops: NDArray[Any]
    number: int

    def dropped(self) -> bool:
        return bool(self.number <= self.drops["last"][0])


class Session(Protocol):
    """The state of one generation at one stage."""

    def fork(self, other: Any, tokens: int) -> None:
        """Copy the first `tokens` of `other`, a session of the same stage and flags, before the first step."""

    def close(self) -> None:
        """Free the session's memory. Further calls do nothing."""


class KeepsPrefixes(Session, Protocol):
    """A session whose state can be kept in blocks of tokens (kvcache/prefix_store.py)."""

    @property
    def most_blocks(self) -> int:
        """How many blocks the session can begin with at most."""

    def write_blocks(self, parts: Sequence[BlockPart]) -> None:
        """Begin with these blocks, before the first step."""

    def keep_blocks(self, keys: Sequence[bytes], first: int) -> Sequence[BlockPart]:
        """Copies of what the session has here of its blocks from `first` on, up to as many as there are `keys`. What it
        has elsewhere is kept there under the keys."""


@runtime_checkable
class SpotChecked(Session, Protocol):
    """A session some of whose answers are computed again here."""

    def spot_checks(self) -> SpotCheckResult:
        """What the checks have found. Waits for those under way."""


class WholePrefix:
    """Marks a session that takes the whole prefix in each step, where the stage before gives it."""


@dataclass(frozen=True)
class StageInput:
    """A step of one session: `x` is token ids int64 [1, T] at a first stage, otherwise a hidden state [1, T, H].

    `position` is the number of tokens before the first of `x`. If it is lower than the cached length, the cache is
    truncated to it. `logits`: for how many of the last positions a last stage gives logits, 0 for all. `mark` says at
    any time whether the step was dropped: a stage may then raise StepUnwanted. `rope_length` is the least sequence
    length for rotary embeddings (models/rope.py), which is that of the prompt; 0 takes the length after this step.
    """

    session: Any
    position: int
    x: torch.Tensor
    logits: int = 1
    mark: DropMark | None = None
    rope_length: int = 0

    @property
    def decodes(self) -> bool:
        """Whether this is a single token after others."""
        return self.position > 0 and self.x.shape[1] == 1


@dataclass(frozen=True)
class StageOutput:
    """`x` is a hidden state [1, T, H], or from a last stage the logits of the last positions [1, logits, V].

    NOTE: a remote stage's one-row `x` is a view of a buffer that its session's next step overwrites. Copy it to keep
    it.
    """

    x: torch.Tensor
    timing: StageTiming


def timed(label: str, outs: Sequence[torch.Tensor], began: float, compile_s: float = 0.0) -> list[StageOutput]:
    """Wait for the outputs of a forward that began at `began`. The first output has the time of all, named `label`."""
    if outs[0].device.type != "cpu":
        torch.accelerator.synchronize(outs[0].device)
    timing = StageTiming({label: time.perf_counter() - began}, compile_s=compile_s)
    return [StageOutput(outs[0], timing), *(StageOutput(out, StageTiming({})) for out in outs[1:])]


class Stage(Protocol):
    """Maps token ids or hidden states to hidden states or logits."""

    def open(self, settings: SessionSettings, max_length: int) -> Session:
        """Open a session of at most `max_length` tokens."""

    def step(self, batch: Sequence[StageInput]) -> list[StageOutput]:
        """Compute one step of each session. Outputs are in order of `batch`; their timings sum to the whole time."""


@runtime_checkable
class OpensTogether(Protocol):
    """A stage that opens several sessions at once, so that their steps can share work."""

    def open_together(self, settings: SessionSettings, max_length: int, count: int) -> Sequence[Session]:
        """Open `count` sessions, each as `Stage.open` does."""


@runtime_checkable
class FindsPrefixes(Protocol):
    """A stage that computes elsewhere, and keeps prefixes there."""

    def open_with(
        self, settings: SessionSettings, max_length: int, count: int, keys: Sequence[bytes]
    ) -> Sequence[KeepsPrefixes]:
        """Open `count` sessions. The first may begin with those of the blocks with these `keys` that are kept."""


@runtime_checkable
class RestartsRope(Protocol):
    """A stage that knows beyond which length the whole sequence is computed again (models/structure.py)."""

    @property
    def rope_restart(self) -> int | None:
        """That length, None for no such."""


@dataclass(frozen=True)
class PendingStep:
    """A started step. `timing` has the cost of starting it. `finish()` waits for the output. `drop()` cancels the step;
    `finish()` must still be called, and returns an output without positions."""

    timing: StageTiming
    finish: Callable[[], StageOutput]
    drop: Callable[[], None]


@runtime_checkable
class WorksAhead(Stage, Protocol):
    """A stage that computes elsewhere, so that its client can work at the same time."""

    def begin(self, item: StageInput, *, uncertain: bool = False) -> PendingStep:
        """Start a step. Only an `uncertain` one can be dropped. Several may be pending; they finish in order."""


@dataclass(frozen=True)
class PendingLogits:
    """The first logits [1, 1, k] of one token, and the time that they took. `finish()` computes the others and returns
    all of them."""

    first: torch.Tensor
    timing: StageTiming
    finish: Callable[[], StageOutput]


@runtime_checkable
class LogitsInParts(Stage, Protocol):
    """An LM head whose first logits are available before the others are computed."""

    def logits_in_parts(self, item: StageInput) -> PendingLogits | None:
        """Compute the first logits of one token. None for a head that cannot be divided."""

"""A stage is a run of consecutive layers with their caches; a model is a list of stages.

`Stage` is the protocol: `local.LocalStage` computes here, `client.remote_stage.RemoteStage` at the far end of a gRPC
stream. A stage's weights and a session's cache are two things, so that one stage can serve many sessions.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray

from splitlearn.events import StageTiming
from splitlearn.stages.settings import SessionSettings

DROPS = np.dtype([("last", np.int64)])
"""Of a session: the last of its steps that its client dropped, with all before it."""


class DropMark(NamedTuple):
    """A step that its client may drop: of a session with `drops`, a record of DROPS, the step `number`. A kernel reads
    the record itself while it computes, without Python."""

    drops: NDArray[Any]
    number: int

    def dropped(self) -> bool:
        return bool(self.number <= self.drops["last"][0])


class Session(Protocol):
    """One generation's stay at one stage."""

    def fork(self, other: Any, tokens: int) -> None:
        """Begin, before the first step, with the first `tokens` of `other`, a session of the same stage and flags."""

    def close(self) -> None:
        """Free what the session holds. Calling it again does nothing."""


@dataclass(frozen=True)
class StageInput:
    """A step of one session: `x` is token ids int64 [1, T] at a first stage, otherwise a hidden state [1, T, H].

    `position` is the number of tokens before the first of `x`. Lower than the cached length it means: truncate to here.
    `logits` is for how many of the last positions a last stage gives logits, 0 for all. `mark` tells whether the step
    was dropped, at any time: a stage may then raise StepUnwanted. `rope_length` is the least length of the sequence by
    which rotary embeddings are made (models/rope.py): that of the prompt; 0 is that which the step ends at.
    """

    session: Any
    position: int
    x: torch.Tensor
    logits: int = 1
    mark: DropMark | None = None
    rope_length: int = 0

    @property
    def decodes(self) -> bool:
        """True for one token after others."""
        return self.position > 0 and self.x.shape[1] == 1


@dataclass(frozen=True)
class StageOutput:
    """`x` is a hidden state [1, T, H], or from a last stage the logits of the last positions [1, logits, V].

    NOTE: a remote stage's one-row `x` is a view of a buffer that its session's next step overwrites. Copy it to keep
    it.
    """

    x: torch.Tensor
    timing: StageTiming


def timed(word: str, outs: Sequence[torch.Tensor], began: float, compile_s: float = 0.0) -> list[StageOutput]:
    """The outputs of a forward that began at `began`, once they are there. The first has the time of all, as `word`."""
    if outs[0].device.type != "cpu":
        torch.accelerator.synchronize(outs[0].device)
    timing = StageTiming({word: time.perf_counter() - began}, compile_s=compile_s)
    return [StageOutput(outs[0], timing), *(StageOutput(out, StageTiming({})) for out in outs[1:])]


class Stage(Protocol):
    """What maps token ids or hidden states to hidden states or logits."""

    def open(self, settings: SessionSettings, max_length: int) -> Session:
        """Begin a session of at most `max_length` tokens."""

    def step(self, batch: Sequence[StageInput]) -> list[StageOutput]:
        """One step of each session in `batch`, in its order. Their timings sum to the time of all."""


@runtime_checkable
class OpensTogether(Protocol):
    """A stage whose sessions share something where their steps come together."""

    def open_together(self, settings: SessionSettings, max_length: int, count: int) -> Sequence[Session]:
        """Begin `count` sessions, each as `Stage.open` does."""


@dataclass(frozen=True)
class PendingStep:
    """A started step. `timing` is what starting it took. `finish()` waits for the output. `drop()` cancels the step;
    `finish()` must still be called, and gives an output without positions."""

    timing: StageTiming
    finish: Callable[[], StageOutput]
    drop: Callable[[], None]


@runtime_checkable
class WorksAhead(Stage, Protocol):
    """A stage that computes elsewhere, so that its client can work meanwhile."""

    def begin(self, item: StageInput, *, uncertain: bool = False) -> PendingStep:
        """Begin a step, which may be dropped if it is `uncertain`. More may be begun before, and end in their order."""


@dataclass(frozen=True)
class PendingLogits:
    """One token's logits under way: the first of them [1, 1, k], and what computing those took. `finish()` computes the
    others and gives all."""

    first: torch.Tensor
    timing: StageTiming
    finish: Callable[[], StageOutput]


@runtime_checkable
class LogitsInParts(Stage, Protocol):
    """The LM head, whose first logits can be looked at before the others are computed."""

    def logits_in_parts(self, item: StageInput) -> PendingLogits | None:
        """Compute the first logits of one token. None for a head that cannot be parted."""

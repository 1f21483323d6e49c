"""What computes a session's steps. A stage chooses it when the session opens (stages/local.py), best first.

`Eager` is the model's own forward and takes every session. `fused_decode.Fused` and `cuda_graph.Captured` compute one
token after others faster, and hand every other step to the eager engine.
"""

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers.cache_utils import Cache

from splitlearn.models.cut import CutModel, forward
from splitlearn.runtime import private_apis
from splitlearn.runtime.torch_threads import computing_one_token

DROPS = np.dtype([("last", np.int64)])
"""Of a session: the last of its steps that its client dropped, with all before it."""


class DropMark(NamedTuple):
    """A step that its client may drop: of a session with `drops`, a record of DROPS, the step `number`. A kernel reads
    the record itself while it computes, without Python."""

    drops: NDArray[Any]
    number: int

    def dropped(self) -> bool:
        """Whether nobody needs the step any more."""
        return bool(self.number <= self.drops["last"][0])


@dataclass(frozen=True)
class SessionStep:
    """A step of one session: token ids [1, T] or a hidden state [1, T, H], after the `position` tokens in `cache`.

    A last stage gives the logits of the last `logits` tokens, 0 for all. `rope_length` and `arguments` are those of
    `models.cut.forward`. `mark` is that of `StageInput`.
    """

    cache: Any
    position: int
    x: Tensor
    logits: int = 0
    rope_length: int = 0
    arguments: Mapping[str, Any] = field(default_factory=dict)
    mark: DropMark | None = None

    @property
    def decodes(self) -> bool:
        """True for one token after others."""
        return self.position > 0 and self.x.shape[1] == 1


class Engine(Protocol):
    """Computes the steps of the sessions that it takes."""

    @property
    def name(self) -> str:
        """What `LocalStage.describe` says."""

    @property
    def compile_s(self) -> float:
        """Seconds that steps have waited for something to be compiled or captured, so far."""

    @property
    def window(self) -> int:
        """0; or, for an engine that is bound to places in memory, the block of tokens in which it wants them reserved.
        A later session should then lie where an earlier one did."""

    def takes(self, cache: Cache | None, arguments: Mapping[str, Any]) -> bool:
        """Whether it computes sessions with this cache and these arguments for the model's forward."""

    def compute(self, step: SessionStep) -> Tensor:
        """The hidden state [1, T, H] or the logits [1, logits, V]; the cache holds the new tokens afterwards.

        Raises StepUnwanted where the step is dropped in time; the cache is then as it was.
        """


@dataclass(frozen=True)
class Eager:
    """The model's own forward, compiled or not.

    On a CPU `token_threads` compute a step of one token. `precision` is the process's own float32_matmul_precision.
    """

    cut: CutModel
    device: torch.device
    token_threads: int
    precision: str
    window: int = 0

    @property
    def name(self) -> str:
        """Eager, or in which way it is compiled."""
        return f"compiled {self.cut.compiled}" if self.cut.compiled else "eager"

    @property
    def compile_s(self) -> float:
        """What this process has spent in torch.compile, if the stage is compiled."""
        return private_apis.compile_seconds() if self.cut.compiled else 0.0

    def takes(self, cache: Cache | None, arguments: Mapping[str, Any]) -> bool:
        """Any."""
        return True

    def compute(self, step: SessionStep) -> Tensor:
        """By `models.cut.forward`."""
        alone = step.x.shape[1] == 1 and self.device.type == "cpu"
        with computing_one_token(self.token_threads, self.precision) if alone else nullcontext():
            return forward(
                self.cut,
                step.x.to(self.device),
                step.position,
                step.cache,
                logits_to_keep=step.logits,
                arguments=step.arguments,
                rope_length=step.rope_length,
            )

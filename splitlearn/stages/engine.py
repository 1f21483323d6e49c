"""What computes a session's steps: the model's own forward, and engines that compute one token after others faster.

`fused_decode.Fused` and `cuda_graph.Captured` are such engines. A stage chooses when a session opens (stages/local.py).
"""

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from splitlearn.models.cut import CutModel, forward
from splitlearn.runtime import private_apis
from splitlearn.runtime.torch_threads import computing_one_token
from splitlearn.stages.base import StageInput


class TokenEngine(Protocol):
    """Computes one token after others, in sessions with a cache of the kind `caches` and without forward arguments.

    `compile_s` counts the seconds that steps have waited for something to be captured. `window` is 0; or, for an engine
    that is bound to places in memory, the block of tokens in which it wants them reserved: a later session should then
    lie where an earlier one did.
    """

    caches: type[Cache]
    compile_s: float
    window: int

    def token(self, step: StageInput) -> Tensor:
        """The hidden state [1, 1, H] or the logits [1, 1, V] of a step that decodes; the cache holds the token
        afterwards. Raises StepUnwanted where the step is dropped in time; the cache is then as it was."""


@dataclass(frozen=True)
class Eager:
    """The model's own forward, compiled or not.

    On a CPU `token_threads` compute a step of one token. `precision` is the process's own float32_matmul_precision.
    """

    cut: CutModel
    device: torch.device
    token_threads: int
    precision: str

    @property
    def compile_s(self) -> float:
        """What this process has spent in torch.compile, if the stage is compiled."""
        return private_apis.compile_seconds() if self.cut.compiled else 0.0

    def compute(self, step: StageInput) -> Tensor:
        """The hidden state [1, T, H] or the logits [1, logits, V]; the cache holds the new tokens afterwards."""
        alone = step.x.shape[1] == 1 and self.device.type == "cpu"
        with computing_one_token(self.token_threads, self.precision) if alone else nullcontext():
            return forward(
                self.cut,
                step.x.to(self.device),
                step.position,
                step.session.cache,
                logits_to_keep=step.logits,
                arguments=step.session.settings.forward_arguments,
                rope_length=step.rope_length,
            )

"""Engines compute a session's steps: the model's own forward does all of them, a token engine decodes faster.

`fused_decode.FusedEngine` and `cuda_graph.GraphEngine` are token engines. A stage chooses when a session opens
(stages/local.py).
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
    """Decodes single tokens in sessions that have a cache of the kind `caches` and no forward arguments.

    `compile_s` counts the seconds that steps have waited for a capture. `window` is 0, or for an engine that is bound
    to addresses the number of tokens in a block of memory: a later session should then reuse an earlier one's block.
    """

    caches: type[Cache]
    compile_s: float
    window: int

    def token(self, step: StageInput) -> Tensor:
        """The hidden state [1, 1, H] or the logits [1, 1, V] of a decode step. Appends the token to the cache. Raises
        StepUnwanted if the step is dropped in time; the cache is then unchanged."""


@dataclass(frozen=True)
class EagerEngine:
    """The model's own forward, compiled or not.

    On a CPU `token_threads` compute a step of one token. `precision` is the process's float32_matmul_precision.
    """

    cut: CutModel
    device: torch.device
    token_threads: int
    precision: str

    @property
    def compile_s(self) -> float:
        """The seconds that this process has spent in torch.compile; 0 for a stage that is not compiled."""
        return private_apis.compile_seconds() if self.cut.compiled else 0.0

    def compute(self, step: StageInput) -> Tensor:
        """The hidden state [1, T, H] or the logits [1, logits, V]. Appends the new tokens to the cache."""
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

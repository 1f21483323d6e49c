"""Engines compute a session's steps: a stage engine does all of them, a token engine decodes faster.

The stage engine is torch's, which calls the model's own forward (`EagerEngine`), or another (`splitlearn/engines/`).
`fused_decode.FusedEngine` and `cuda_graph.GraphEngine` are token engines beside torch's. A stage chooses when a session
opens (stages/local.py).
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from splitlearn.kvcache.pool import KVShape, shapes_of
from splitlearn.models.cut import CutModel, example, forward
from splitlearn.runtime import private_apis
from splitlearn.runtime.torch_threads import in_full_float32
from splitlearn.stages.base import StageInput


class TokenEngine(Protocol):
    """Decodes single tokens in sessions that have a cache of the kind `caches` and no forward arguments.

    `compile_s` counts the seconds that steps have waited for a capture. `window` is 0, or for an engine that is bound
    to addresses the number of tokens in a block of memory: a later session should then reuse an earlier one's block.
    `together` computes a ragged batch, as RaggedStage.forward does, where that is faster; None for an engine that never
    does.
    """

    caches: type[Cache]
    compile_s: float
    window: int

    @property
    def together(self) -> Callable[[Sequence[StageInput]], Sequence[Tensor]] | None: ...

    def token(self, step: StageInput) -> Tensor:
        """The hidden state [1, 1, H] or the logits [1, 1, V] of a decode step. Appends the token to the cache. Raises
        StepUnwanted if the step is dropped in time; the cache is then unchanged."""


class StageEngine(Protocol):
    """Computes all steps of a stage.

    `cut` says which layers they are; another engine than torch's need not keep its weights. `token_threads` compute a
    step of one token on a CPU, `precision` is torch's float32_matmul_precision, `compile_s` counts the seconds that
    steps have waited for a compiler.

    `new_cache` makes the cache of a session of at most so many tokens; None leaves it to the session's settings. Such a
    cache is a transformers `Cache` with `crop`. Its session forks by `begin_with` if it is a `ReservedCache`, else by a
    deep copy, and keeps prefixes if its layers have `keys` and `values` (kvcache/blocks.py). Sessions of an engine with
    caches of its own never share a forward.
    """

    @property
    def cut(self) -> CutModel: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def token_threads(self) -> int: ...
    @property
    def precision(self) -> str: ...
    @property
    def compile_s(self) -> float: ...
    @property
    def new_cache(self) -> Callable[[int], Cache] | None: ...

    def kv_shapes(self) -> Sequence[tuple[KVShape, KVShape]]:
        """What each layer keeps of a token. Raises FamilyRefused if that is not keys and values."""

    def compute(self, step: StageInput) -> Tensor:
        """The hidden state [1, T, H], or from a last stage the logits [1, step.logits, V], all T if that is 0.

        Appends the new tokens to the cache of the step's session, whose length is the step's position. Without a cache
        the step is the whole prefix. The stage without layers at the end is computed so, too.
        """


@dataclass(frozen=True)
class EagerEngine:
    """The model's own forward, compiled or not.

    On a CPU `token_threads` compute a step of one token. `precision` is the process's float32_matmul_precision; there,
    steps of fewer tokens than `long` are computed in full float32.
    """

    cut: CutModel
    device: torch.device
    token_threads: int
    precision: str
    long: int = 2
    new_cache: ClassVar[None] = None

    def kv_shapes(self) -> Sequence[tuple[KVShape, KVShape]]:
        return shapes_of(self.cut, example(self.cut, 1))

    @property
    def compile_s(self) -> float:
        """The seconds that this process has spent in torch.compile; 0 for a stage that is not compiled."""
        return private_apis.compile_seconds() if self.cut.compiled else 0.0

    def compute(self, step: StageInput) -> Tensor:
        tokens = step.x.shape[1]
        threads = self.token_threads if tokens == 1 else torch.get_num_threads()
        short = tokens < self.long and self.device.type == "cpu"
        with in_full_float32(threads, self.precision) if short else nullcontext():
            return forward(
                self.cut,
                step.x.to(self.device),
                step.position,
                step.session.cache,
                logits_to_keep=step.logits,
                arguments=step.session.settings.forward_arguments,
                parts=[(step.rope_length, tokens)],
            )

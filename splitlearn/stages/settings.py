"""Settings records of a stage: what flags change when its weights are loaded, and in each of its sessions.

The code that owns a seam applies its field, and does not know which flag set it. The registry (flags/registry.py) makes
these records from the flags' words. The defaults are those of a run with every flag off.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers.cache_utils import Cache

from splitlearn.models.cut import CutModel
from splitlearn.stages.defences import Defence
from splitlearn.wire.hidden_states import Plain, Rows

if TYPE_CHECKING:
    from splitlearn.checkpoints.folder import ModelFiles
    from splitlearn.stages.engine import EagerEngine, StageEngine, TokenEngine

MakeLinear = Callable[[Iterable[torch.Tensor], torch.Tensor | None], nn.Module]
"""Makes the replacement of a linear layer from the rows of its weight [out, in], some at a time, and its bias [out]."""
MakeLinears = Callable[[Sequence[tuple[int, int]]], MakeLinear]
"""Takes the shapes of the weights of several layers, and returns the function that makes them in that order."""


@dataclass(frozen=True)
class LoadSettings:
    """How weights are loaded and computed with.

    `assign_weights` takes tensors from the file without a second copy. `attention` None leaves the choice to
    transformers: sdpa, but eager for models without it (bloom, gemma2). `sdpa` is the implementation that is used if
    sdpa is chosen. `linear` makes replacements of the linear layers; None keeps the model's own. `head` does so for the
    LM head, if that differs. `weight_bits` is about how many bits each weight then takes; None means those of the
    dtype. `compile_stage` compiles a stage that has its weights. `token_engine` makes a faster token engine from the
    eager one, or returns None. `engine` makes what computes all steps in the place of torch, from the eager engine of a
    stage of that model, with weights of `weight_bits`; it raises FamilyRefused for a stage that it cannot compute.
    """

    assign_weights: bool = False
    attention: str | None = None
    sdpa: str = "sdpa"
    linear: MakeLinears | None = None
    head: MakeLinears | None = None
    weight_bits: int | None = None
    token_engine: "Callable[[EagerEngine], TokenEngine | None] | None" = None
    engine: "Callable[[EagerEngine, ModelFiles, int | None], StageEngine] | None" = None
    compile_stage: Callable[[CutModel], CutModel] | None = None


@dataclass(frozen=True)
class SessionSettings:
    """How one session computes.

    `words` name its flags to a trunk server. `new_cache` makes a cache from a number of layers and a maximum of tokens;
    None keeps no cache. `forward_arguments` go to the model's forward. `wire` is the form of hidden states on the wire;
    None means the dtype in which they are computed. `defences` change, one behind the other, what a client sends.
    `keeps_prefixes` keeps what is computed for later sessions.
    """

    words: frozenset[str] = frozenset()
    new_cache: Callable[[int, int], Cache] | None = None
    forward_arguments: Mapping[str, bool] = field(default_factory=dict)
    gradient_guard: Callable[[], AbstractContextManager[object]] = torch.no_grad
    wire: Rows | None = None
    defences: tuple[Defence, ...] = ()
    keeps_prefixes: bool = False

    @property
    def reuses_prefixes(self) -> bool:
        """Whether a session begins with what earlier ones have computed, which needs a KV cache."""
        return self.keeps_prefixes and self.new_cache is not None

    def rows(self, dtype: torch.dtype) -> Rows:
        """The form on the wire of hidden states that are computed in `dtype`."""
        return self.wire or Plain(dtype)

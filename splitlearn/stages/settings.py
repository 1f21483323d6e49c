"""What flags change in a stage: when its weights are loaded, and in each of its sessions.

Each owner of a seam applies what it is given here and does not know which flag asked. The registry (flags/registry.py)
makes these records of the flags' words. The defaults are what runs when every flag is off.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers.cache_utils import Cache

from splitlearn.models.cut import CutModel
from splitlearn.wire.hidden_states import Plain, Rows

if TYPE_CHECKING:
    from splitlearn.stages.engine import Eager, TokenEngine

MakeLinear = Callable[[Iterable[torch.Tensor], torch.Tensor | None], nn.Module]
"""Makes what stands for a linear layer of the rows of its weight [out, in], in pieces, and its bias [out]."""
MakeLinears = Callable[[Sequence[tuple[int, int]]], MakeLinear]
"""Given the shapes of some layers' weights, what makes one of these layers after the other, in that order."""


@dataclass(frozen=True)
class LoadSettings:
    """How weights are loaded and computed with.

    `assign_weights` takes tensors from the file without a second copy. `attention` None is what transformers chooses
    for the model: sdpa, but eager for those without it (bloom, gemma2); `sdpa` is what attends where sdpa is chosen.
    `linear` makes what stands for the linear layers; None leaves the model's own. `head` is the same for the LM head,
    where that differs. `weight_bits` are about those
    that each weight takes then, None for as many as the dtype has. `compile_stage` compiles a stage that has its
    weights. `engine` makes of its eager engine one that computes a token faster; None where it cannot.
    """

    assign_weights: bool = False
    attention: str | None = None
    sdpa: str = "sdpa"
    linear: MakeLinears | None = None
    head: MakeLinears | None = None
    weight_bits: int | None = None
    engine: "Callable[[Eager], TokenEngine | None] | None" = None
    compile_stage: Callable[[CutModel], CutModel] | None = None


@dataclass(frozen=True)
class SessionSettings:
    """How one session computes.

    `words` name its flags to a trunk server. `new_cache` makes its cache for a number of layers and at most a number of
    tokens; None keeps none. `forward_arguments` go to the model's forward. `wire` is the form of hidden states on the
    wire, None for that in which they are computed.
    """

    words: frozenset[str] = frozenset()
    new_cache: Callable[[int, int], Cache] | None = None
    forward_arguments: Mapping[str, bool] = field(default_factory=dict)
    gradient_guard: Callable[[], AbstractContextManager[object]] = torch.no_grad
    wire: Rows | None = None

    def rows(self, dtype: torch.dtype) -> Rows:
        """The form on the wire of hidden states that are computed in `dtype`."""
        return self.wire or Plain(dtype)

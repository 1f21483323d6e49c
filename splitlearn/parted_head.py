"""A LM head that can be computed in two parts, so that something can be done with its first logits before the others
are there (head_start.py).

The parts are rows of the same weights, cut where the layer's own kernel goes from one piece to the next.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import nn
from torch.nn.functional import linear

from splitlearn.block_linear import BlockLinear
from splitlearn.prepacked import PrepackedLinear
from splitlearn.threads import keeping_precision

FIRST = 1 / 4
"""The share of the vocabulary in the first part: with less it has the likeliest token too seldom, with more it takes
too long (docs/speed.md)."""

Part = Callable[[torch.Tensor], torch.Tensor]
Early = Callable[[torch.Tensor], None]


class PartedHead(nn.Module):
    """`head`, and for one token while somebody listens the same in two parts."""

    def __init__(self, head: nn.Module, first: Part, others: Part) -> None:
        super().__init__()
        self.head, self._first, self._others = head, first, others
        self._early: Early | None = None

    @property
    def weight(self) -> Any:
        """The head's own."""
        return self.head.weight

    @contextmanager
    def telling(self, early: Early | None) -> Iterator[None]:
        """Inside, `early` is told the first logits [1, 1, k] of one token, before the others are computed."""
        self._early = early
        try:
            yield
        finally:
            self._early = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[1, T, H] to [1, T, V]."""
        if self._early is None or x.shape[:-1].numel() != 1:
            whole: torch.Tensor = self.head(x)
            return whole
        first = self._first(x)
        with keeping_precision():
            self._early(first)
        return torch.cat([first, self._others(x)], dim=-1)


def part(module: Any) -> PartedHead | None:
    """Put a head that can be computed in parts in the place of the model's own, where that is of a kind that can."""
    head = module.get_output_embeddings()
    parts = _parts(head)
    if parts is None:
        return None
    parted = PartedHead(head, *parts)
    path = next(path for path, each in module.named_modules() if each is head)
    module.set_submodule(path, parted)
    return parted


def _parts(head: Any) -> tuple[Part, Part] | None:
    if isinstance(head, BlockLinear | PrepackedLinear):
        return cast(tuple[Part, Part] | None, head.parts(FIRST))
    if type(head) is nn.Linear:
        at = int(len(head.weight) * FIRST)
        return (partial(_rows, head, slice(at)), partial(_rows, head, slice(at, None))) if at else None
    return None


def _rows(head: nn.Linear, rows: slice, x: torch.Tensor) -> torch.Tensor:
    return linear(x, head.weight[rows], None if head.bias is None else head.bias[rows])

"""A LM head that can be computed in two parts, so that something can be done with its first logits before the others
are there (generation/head_overlap.py).

The parts are rows of the same weights, cut where the layer's own kernel goes from one piece to the next.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import nn
from torch.nn.functional import linear

from splitlearn.layers.block_linear import BlockLinear
from splitlearn.layers.onednn_linear import PrepackedLinear
from splitlearn.runtime.torch_threads import keeping_precision

FIRST = 1 / 4
"""The share of the vocabulary in the first part. Less has the likeliest token too seldom, more takes too long: of 1/6,
1/4, 1/3 and 1/2 it was 88, 91, 93 and 97% of tokens (SmolLM2-135M, 20 prompts), and TPOT was about the same."""

Part = Callable[[torch.Tensor], torch.Tensor]
Early = Callable[[torch.Tensor], None]


class PartedHead:
    """Makes `head`, while somebody listens, compute one token's logits in two parts.

    The layer stays in its place with its hooks, and its forward is another one.
    """

    def __init__(self, head: nn.Module, first: Part, others: Part) -> None:
        self._whole, self._first, self._others = head.forward, first, others
        self._early: Early | None = None
        head.forward = self._forward

    @contextmanager
    def telling(self, early: Early | None) -> Iterator[None]:
        """Inside, `early` is told the first logits [1, 1, k] of one token, before the others are computed."""
        self._early = early
        try:
            yield
        finally:
            self._early = None

    def _forward(self, x: torch.Tensor) -> torch.Tensor:
        """[1, T, H] to [1, T, V]."""
        if self._early is None or x.shape[:-1].numel() != 1:
            whole: torch.Tensor = self._whole(x)
            return whole
        first = self._first(x)
        with keeping_precision():
            self._early(first)
        return torch.cat([first, self._others(x)], dim=-1)


def parted(head: Any) -> PartedHead | None:
    """What makes `head` compute in parts, if it is of a kind that can."""
    parts = _parts(head)
    return None if parts is None else PartedHead(head, *parts)


def _parts(head: Any) -> tuple[Part, Part] | None:
    if isinstance(head, BlockLinear | PrepackedLinear):
        return cast(tuple[Part, Part] | None, head.parts(FIRST))
    if type(head) is nn.Linear:
        at = int(len(head.weight) * FIRST)
        return (partial(_rows, head, slice(at)), partial(_rows, head, slice(at, None))) if at else None
    return None


def _rows(head: nn.Linear, rows: slice, x: torch.Tensor) -> torch.Tensor:
    return linear(x, head.weight[rows], None if head.bias is None else head.bias[rows])

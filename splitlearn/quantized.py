"""Linear layers whose weights are kept in 4 or 8 bits (blocks.py). What is computed with stays as it is: weight-only.

One row through SmolLM2-135M's layers and head takes 3 ms with 4 bits on one core, where packed float32 takes 20.
"""

from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from splitlearn.blocks import GROUP, LANES, block_bytes, from_blocks, to_blocks

OP = "quantized_linear"
_library = torch.library.Library("splitlearn", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define(f"{OP}(Tensor x, Tensor blocks, int n) -> Tensor")  # type: ignore[no-untyped-call]


def _product(x: torch.Tensor, blocks: torch.Tensor, n: int) -> torch.Tensor:
    return _multiplied(x, blocks.view(-1).numpy(), blocks.shape[2] == block_bytes(4), n)


def _multiplied(x: torch.Tensor, blocks: NDArray[np.uint8], four_bits: bool, n: int) -> torch.Tensor:
    """[..., in] to [..., n]. By numpy's views: torch's would add a fifth to the time of one row."""
    from splitlearn.products import multiply  # loads a compiler, for which only these layers have a use

    width = x.shape[-1]
    rows = np.ascontiguousarray((x if x.dtype is torch.float32 else x.float()).numpy().reshape(-1, width))
    if width % GROUP:
        rows = np.pad(rows, ((0, 0), (0, -width % GROUP)))
    out = np.empty((len(rows), n + -n % LANES), np.float32)
    multiply(blocks, four_bits, rows, out)
    found = torch.from_numpy((out[:, :n] if n % LANES else out).reshape(*x.shape[:-1], n))
    return found if x.dtype is torch.float32 else found.to(x.dtype)


def _shape_of_product(x: torch.Tensor, blocks: torch.Tensor, n: int) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], n)


_library.impl(OP, _product, "CPU")  # type: ignore[no-untyped-call]
torch.library.register_fake(f"splitlearn::{OP}", _shape_of_product, lib=_library)


def why_not(device: str) -> str | None:
    """Why weights on `device` cannot be kept in few bits, or None."""
    return None if device == "cpu" else f"is for weights on the CPU; this is {device}"


class QuantizedLinear(nn.Module):
    """`x @ weight.T + bias` for x [..., in]; `pieces` are the rows of `weight` [out, in], some at a time.

    `array` holds the blocks, of 4 bits or of 8; `whole` says that nothing had to be filled up.
    """

    def __init__(self, pieces: Iterable[torch.Tensor], bias: torch.Tensor | None, bits: int) -> None:
        super().__init__()
        made, self.out_features = [], 0
        for piece in pieces:
            made.append(to_blocks(piece, bits))
            self.out_features, self.in_features = self.out_features + len(piece), piece.shape[1]
        self._blocks = made[0] if len(made) == 1 else torch.cat(made)
        self.array, self.four_bits = self._blocks.view(-1).numpy(), bits == 4
        self.whole = not (self.out_features % LANES or self.in_features % GROUP)
        self.bias = bias
        self(torch.zeros(1, self.in_features))  # what compiles does so now, not in the first answer

    @property
    def weight(self) -> torch.Tensor:
        """The matrix [out, in] in float32 that the blocks stand for, made anew."""
        return from_blocks(self._blocks, self.out_features, self.in_features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] to [..., out]."""
        if torch.compiler.is_compiling():
            out: torch.Tensor = torch.ops.splitlearn.quantized_linear(x, self._blocks, self.out_features)
        else:
            out = _multiplied(x, self.array, self.four_bits, self.out_features)
        return out if self.bias is None else out + self.bias

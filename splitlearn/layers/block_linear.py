"""Linear layers whose weights lie in blocks (kernels/block_format.py): in float32 in the order in which they are read,
or in 4 or 8 bits. What is computed with stays as it is: weight-only. With torch's float32_matmul_precision "medium",
prompts are multiplied in bfloat16 where the processor has such products: 512 rows take half as long.

One row through SmolLM2-135M's layers and head takes 3 ms with 4 bits on one core and 13 with 32, where oneDNN's packed
float32 takes 20.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import accumulate

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn.functional import linear

from splitlearn.errors import NotFinite
from splitlearn.kernels.block_format import (
    GROUP,
    LANES,
    SCALES_BYTES,
    bits_of,
    fill_blocks,
    from_blocks,
    memory,
    shape_in_blocks,
)

OP = "block_linear"
# Products of numbers from which on they are shared among threads, of which each has to be woken: 10 million take 1.0
# times as long on two, 14 million 0.9, 18 million 0.8 to 0.9 and 28 million 0.75 to 0.85, of 4 bits as of 32 (40 pairs,
# matrices of 576x576 to 1536x576 and 4 to 32 rows). A prompt of 20 tokens takes 0.89 [0.84, 0.94] times as long by it.
MANY = 12_000_000
# Rows from which on they are multiplied in bfloat16, for which the matrix is written anew: 64 rows take 0.62 to 1.04
# times as long, 128 0.5 to 0.76, 512 0.47 to 0.5 (192x576 to 5632x2048, one thread). Fewer than these are tokens of
# sessions that share a forward, which it must not change.
MANY_ROWS = 128
# As much of a matrix is written at a time, to the same memory.
MATRIX_BYTES = 4 << 20
_library = torch.library.Library("splitlearn", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define(f"{OP}(Tensor x, Tensor blocks, int n) -> Tensor")  # type: ignore[no-untyped-call]


def _product(x: torch.Tensor, blocks: torch.Tensor, n: int) -> torch.Tensor:
    return _multiplied(x, blocks.view(-1).numpy(), bits_of(blocks.shape[2]), n)


def _multiplied(x: torch.Tensor, blocks: NDArray[np.uint8], bits: int, n: int) -> torch.Tensor:
    """[..., in] to [..., n]. By numpy's views: torch's would add a fifth to the time of one row."""
    width = x.shape[-1]
    rows = np.ascontiguousarray((x if x.dtype is torch.float32 else x.float()).numpy().reshape(-1, width))
    if width % GROUP:
        rows = np.pad(rows, ((0, 0), (0, -width % GROUP)))
    out = np.empty((len(rows), n + -n % LANES), np.float32)
    fill = _fill_in_bfloat16 if _is_rounded(bits, len(rows)) else _fill
    fill(blocks, bits, rows, out)
    found = torch.from_numpy((out[:, :n] if n % LANES else out).reshape(*x.shape[:-1], n))
    return found if x.dtype is torch.float32 else found.to(x.dtype)


def _is_rounded(bits: int, rows: int) -> bool:
    """Whether so many rows are multiplied in bfloat16."""
    if bits == 32 or rows < MANY_ROWS or torch.get_float32_matmul_precision() != "medium":
        return False
    from splitlearn.kernels.block_values import MULTIPLIED

    return MULTIPLIED


def _fill(blocks: NDArray[np.uint8], bits: int, rows: NDArray[np.float32], out: NDArray[np.float32]) -> None:
    """`out` is set to the product; where that is much work, by as many threads as torch has."""
    from splitlearn.kernels.block_matmul import multiply  # loads a compiler, for which only these layers have a use

    many = out.size * rows.shape[1] >= MANY
    _share(partial(multiply, blocks, bits, rows, out), out.shape[1], torch.get_num_threads() if many else 1)


def _fill_in_bfloat16(
    blocks: NDArray[np.uint8], bits: int, rows: NDArray[np.float32], out: NDArray[np.float32]
) -> None:
    """As `_fill`, by torch's products of bfloat16 with some rows of the matrix at a time."""
    from splitlearn.kernels.block_values import to_bfloat16

    x, row_bytes, found = torch.from_numpy(rows).bfloat16(), len(blocks) // out.shape[1], torch.from_numpy(out)
    step = LANES * max(1, MATRIX_BYTES // (LANES * x.shape[1] * x.itemsize))
    matrix = torch.empty(min(step, out.shape[1]), x.shape[1], dtype=torch.uint16)
    for start in range(0, out.shape[1], step):
        columns = found[:, start : start + step]
        part = matrix[: columns.shape[1]]
        some = blocks[start * row_bytes :][: len(part) * row_bytes]
        _share(partial(to_bfloat16, some, bits, part.numpy()), len(part), torch.get_num_threads())
        columns.copy_(linear(x, part.view(torch.bfloat16)))


def _share(work: Callable[[int, int], None], n: int, threads: int) -> None:
    """Call `work(begin, end)` for parts of `[0, n)`, by so many threads."""
    from splitlearn.kernels.thread_team import helpers

    each = LANES * -(-n // (LANES * threads))
    others = [helpers().submit(work, begin, min(begin + each, n)) for begin in range(each, n, each)]
    work(0, min(each, n))
    for other in others:
        other.result()


def _shape_of_product(x: torch.Tensor, blocks: torch.Tensor, n: int) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], n)


_library.impl(OP, _product, "CPU")  # type: ignore[no-untyped-call]
torch.library.register_fake(f"splitlearn::{OP}", _shape_of_product, lib=_library)


def in_one_memory(
    bits: int, shapes: Sequence[tuple[int, int]]
) -> Callable[[Iterable[torch.Tensor], torch.Tensor | None], "BlockLinear"]:
    """Makes layers with weights of these shapes [out, in] of their pieces and bias, one after the other as they are
    called for; their blocks lie in that order in one piece of memory."""
    sizes = [math.prod(shape_in_blocks(*shape, bits)) for shape in shapes]
    room = memory(sum(sizes))
    places = (room[end - size : end] for size, end in zip(sizes, accumulate(sizes), strict=True))
    left = zip(shapes, places, strict=True)
    return lambda pieces, bias: BlockLinear(pieces, bias, bits, *next(left))


def _check_scales(blocks: torch.Tensor, bits: int) -> None:
    scales = blocks[:, :, : SCALES_BYTES if bits < 32 else 0].contiguous().view(torch.float16)
    if not bool(scales.isfinite().all()):
        raise NotFinite(f"Blocks of {bits} bits hold finite weights up to 65504 (float16) only; these are others.")


class BlockLinear(nn.Module):
    """`x @ weight.T + bias` for x [..., in]; `pieces` are the rows of `weight` [out, in], whole blocks of them at a
    time.

    `array`, of the size of its blocks, holds them then, of `bits` bits; `whole` says that nothing had to be filled up.
    Raises NotFinite for weights that such blocks cannot hold.
    """

    def __init__(
        self,
        pieces: Iterable[torch.Tensor],
        bias: torch.Tensor | None,
        bits: int,
        shape: tuple[int, int],
        array: NDArray[np.uint8],
    ) -> None:
        super().__init__()
        self.bits, (self.out_features, self.in_features), self.array = bits, shape, array
        self._blocks = torch.from_numpy(array).view(shape_in_blocks(*shape, bits))
        filled = 0
        for piece in pieces:
            part = self._blocks[filled : filled + -(-len(piece) // LANES)]
            fill_blocks(part, piece, bits)
            _check_scales(part, bits)
            filled += len(part)
        self.whole = not (self.out_features % LANES or self.in_features % GROUP)
        self.bias = bias
        self(torch.zeros(1, self.in_features))  # what compiles does so now, not in the first answer

    @property
    def weight(self) -> torch.Tensor:
        """The matrix [out, in] in float32 that the blocks stand for, made anew."""
        return from_blocks(self._blocks, self.out_features, self.in_features)

    def move(self, to: NDArray[np.uint8]) -> None:
        """Copy the blocks to memory of their size, and have them there from now on."""
        to[:] = self.array
        self._blocks, self.array = torch.from_numpy(to).view(self._blocks.shape), to

    def cut(self, share: float) -> tuple[int, NDArray[np.uint8], NDArray[np.uint8]]:
        """How many outputs are about that share of all, their blocks, and those of the others."""
        groups = max(1, round(share * len(self._blocks)))
        end = groups * (len(self.array) // len(self._blocks))
        return groups * LANES, self.array[:end], self.array[end:]

    def parts(self, share: float) -> tuple[Callable[[torch.Tensor], torch.Tensor], ...] | None:
        """What gives about that share of the outputs, from the first on, and the others; None where all are a block."""
        if len(self._blocks) == 1:
            return None
        at, *blocks = self.cut(share)
        outputs = (slice(at), slice(at, self.out_features))
        return tuple(partial(self._some, *each) for each in zip(blocks, outputs, strict=True))

    def _some(self, blocks: NDArray[np.uint8], outputs: slice, x: torch.Tensor) -> torch.Tensor:
        out = _multiplied(x, blocks, self.bits, outputs.stop - (outputs.start or 0))
        return out if self.bias is None else out + self.bias[outputs]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] to [..., out]."""
        if torch.compiler.is_compiling():
            out: torch.Tensor = torch.ops.splitlearn.block_linear(x, self._blocks, self.out_features)
        else:
            out = _multiplied(x, self.array, self.bits, self.out_features)
        return out if self.bias is None else out + self.bias

"""Writes the values of blocks in bfloat16, for products of many rows with them, which torch computes.

A processor with AVX512_BF16 makes twice as many products of bfloat16 as of float32 in the same time. To import this
module loads LLVM.
"""

from typing import Any

import numba
import numpy as np
from llvmlite import binding as llvm

from splitlearn.kernels.block_format import GROUP, LANES
from splitlearn.kernels.block_matmul import PANEL_BYTES, aligned, unpack
from splitlearn.kernels.jit import compiled

# Whether this processor multiplies bfloat16.
MULTIPLIED = bool(llvm.get_host_cpu_features().get("avx512bf16"))


@compiled
def to_bfloat16(blocks: Any, bits: Any, out: Any, begin: Any, end: Any) -> None:
    """Set the rows `[begin, end)` of `out` [N, K], the bits of bfloat16 in uint16, to those of the matrix in `blocks`
    of 4 or 8 `bits`. `begin` and `end` are multiples of LANES, K one of GROUP."""
    n, k = out.shape
    row_bytes = len(blocks) // n
    size = row_bytes * LANES // (k // GROUP)
    panel = aligned(PANEL_BYTES)
    values = panel.view(np.uint32)
    for first in range(begin, end, LANES):
        for group in range(k // GROUP):
            unpack(bits, blocks, first * row_bytes + group * size, panel)
            for lane in range(LANES):
                for column in range(GROUP):
                    out[first + lane, group * GROUP + column] = _rounded(values[column * LANES + lane])


@numba.njit  # type: ignore[untyped-decorator]
def _rounded(value: Any) -> Any:
    """The upper half of a float32's bits, rounded to nearest, ties to even. Not for NaN."""
    return np.uint16((value + np.uint32(0x7FFF) + ((value >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))

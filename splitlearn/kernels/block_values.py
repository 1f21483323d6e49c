"""Writes the values of blocks in bfloat16, for products of many rows with them, which torch computes.

A processor with AVX512_BF16 makes twice as many products of bfloat16 as of float32 in the same time. A block's columns
are vectors of LANES rows; shuffles turn them into rows before they are stored: 5632x2048 values take 1.2 ms of a core,
3.2 if they are stored one by one. To import this module loads LLVM.
"""

from typing import Any

import numba
from llvmlite import binding as llvm
from llvmlite import ir
from numba.core import cgutils
from numba.extending import intrinsic

from splitlearn.kernels.block_format import GROUP, LANES
from splitlearn.kernels.block_matmul import INTS, columns_of, constant, multiply_add, scale_and_offset
from splitlearn.kernels.jit import compiled

# Whether this processor multiplies bfloat16.
MULTIPLIED = bool(llvm.get_host_cpu_features().get("avx512bf16"))
SHORTS = ir.VectorType(ir.IntType(16), LANES)
# How two vectors become one of each two neighbours: two of LANES whole; of two of GROUP the lower and the upper halves.
WHOLE = [at for lane in range(LANES) for at in (lane, LANES + lane)]
LOWER = [at for lane in range(LANES) for at in (lane, GROUP + lane)]
UPPER = [LANES + at for at in LOWER]


@compiled
def to_bfloat16(blocks: Any, bits: Any, out: Any, begin: Any, end: Any) -> None:
    """Set the rows `[begin, end)` of `out` [N, K], the bits of bfloat16 in uint16, to those of the matrix in `blocks`
    of 4 or 8 `bits`. `begin` and `end` are multiples of LANES, K one of GROUP."""
    n, k = out.shape
    row_bytes = len(blocks) // n
    size = row_bytes * LANES // (k // GROUP)
    for row in range(begin, end, LANES):
        for group in range(k // GROUP):
            _write(bits, blocks, row * row_bytes + group * size, out, row, group * GROUP)


@intrinsic  # type: ignore[untyped-decorator]
def _write(typing: Any, bits: Any, blocks: Any, at: Any, out: Any, row: Any, column: Any) -> Any:
    """Write the block of `bits` at the byte `at` to LANES rows of `out` from `row` on, and GROUP columns from `column`
    on."""
    index = numba.types.intp

    def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        bits, from_blocks, at, to_out, row, column = given
        block = builder.gep(context.make_array(blocks)(context, builder, from_blocks).data, [at])
        target = context.make_array(out)(context, builder, to_out)
        width = cgutils.unpack_tuple(builder, target.shape)[1]
        for each in (4, 8):
            with builder.if_then(builder.icmp_signed("==", bits, constant(each))):
                for lane, values in enumerate(_rows(builder, block, each)):
                    place = builder.add(builder.mul(builder.add(row, constant(lane)), width), column)
                    pointer = builder.bitcast(builder.gep(target.data, [place]), values.type.as_pointer())
                    builder.store(values, pointer, align=2)
        return context.get_dummy_value()

    return numba.types.void(index, blocks, index, out, index, index), generate


def _rows(builder: Any, block: Any, bits: int) -> list[Any]:
    """The values of each of a block's LANES rows, in bfloat16.

    To put the first half of all values between those of the second half turns the bits of a value's place by one. So
    five times of it, as GROUP is 2 ** 5, make (column, lane) to (lane, column).
    """
    scale, offset = scale_and_offset(builder, block)
    integers = sorted(columns_of(builder, block, bits), key=lambda each: each[0])
    columns = [_rounded(builder, multiply_add(builder, values, scale, offset)) for _, values in integers]
    half = GROUP // 2
    found = [_merged(builder, columns[at], columns[at + half], WHOLE) for at in range(half)]
    for _ in range(LANES.bit_length() - 1):
        half = LANES // 2
        found = [_merged(builder, found[at], found[at + half], order) for at in range(half) for order in (LOWER, UPPER)]
    return found


def _merged(builder: Any, one: Any, other: Any, order: list[int]) -> Any:
    return builder.shuffle_vector(one, other, ir.Constant(ir.VectorType(ir.IntType(32), len(order)), order))


def _rounded(builder: Any, values: Any) -> Any:
    """The upper halves of float32's bits, rounded to nearest, ties to even. Not for NaN."""
    bits = builder.bitcast(values, INTS)
    odd = builder.and_(builder.lshr(bits, _everywhere(16)), _everywhere(1))
    return builder.trunc(
        builder.lshr(builder.add(builder.add(bits, _everywhere(0x7FFF)), odd), _everywhere(16)), SHORTS
    )


def _everywhere(number: int) -> Any:
    return ir.Constant(INTS, [number] * LANES)

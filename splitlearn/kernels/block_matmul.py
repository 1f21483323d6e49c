"""Products of float32 rows with a matrix that lies in blocks of few bits, in one compiled call.

    multiply(blocks, bits, x, out, 0, N)    # x [T, K], out [T, N], both float32 and contiguous

The matrix [N, K] is read once, as one stream, for up to SUMS rows at a time. A block is GROUP columns of LANES rows of
the matrix: a float16 scale for each of the LANES, a float16 offset for each, then the whole numbers q, of which each
value is scale * q + offset. x's products with q are summed and scaled once in a block, and so is the sum of x with the
offset (without AVX-512 a row of 1536x576 takes 56 us, 68 if each value is made). A column's LANES numbers stand side by
side, of 8 bits each; of 4 bits, with those of the column GROUP / 2 further on in the upper halves of the same bytes. A
block of 32 bits has the float32 values themselves.

On one core (AMD EPYC with AVX-512) a row is multiplied as fast as memory gives the matrix, 40 GB/s of float32, 26 to 30
of 4-bit blocks (oneDNN: 32 of float32), and 20 rows and more with 200 GFLOP/s. It is written in vectors of LLVM's own,
which any processor has in some form. Only what calls this module should import it, since that loads LLVM, and the first
call compiles: 2 s, or 0.2 s where an earlier process could keep what was compiled.
"""

from collections.abc import Iterator
from functools import reduce
from typing import Any

import numba
import numpy as np
from llvmlite import binding as llvm
from llvmlite import ir
from numba.core import cgutils
from numba.extending import intrinsic

from splitlearn.kernels.block_format import BITS, GROUP, LANES, SCALES_BYTES, block_bytes
from splitlearn.kernels.jit import CACHE_LINE, compiled, prefetch

# So many sums are under way at once, of one row or of as many rows: a single one would have to wait for the last
# addition to it each time. AVX-512 has 32 registers that hold LANES each. Without it two hold them, of 16, and with 8
# sums none is left for the values: 4 bits take 80 us for a row of 1536x576 and 1036 for 20, with 4 sums 68 and 556.
SUMS = 8 if llvm.get_host_cpu_features().get("avx512f") else 4
# How far ahead the lines of the blocks are asked for, where the processor's own prefetching falls behind: 8 rows with
# float32 blocks took 315 microseconds without, 123 with; a row with 4-bit blocks takes 0.93 times as long. A row with
# float32 blocks is as fast without.
AHEAD_BYTES = 8 << 10
FLOATS, INTS, BYTES, HALVES = (
    ir.VectorType(kind, LANES) for kind in (ir.FloatType(), ir.IntType(32), ir.IntType(8), ir.HalfType())
)


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def _product(
    typing: Any,
    rows: Any,
    bits: Any,
    blocks: Any,
    block: Any,
    x: Any,
    at: Any,
    sums: Any,
    width: Any,
    out: Any,
    to: Any,
    n: Any,
) -> Any:
    """The product of `rows` rows of x, a constant, with LANES rows of the matrix, of one of BITS each, for
    compiled code. The arrays are flat, each but `sums` followed by the index at which to begin; `sums` are those of
    x's GROUPs from its beginning on, `width` is K and `n` is N."""

    def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        flat = {
            number: builder.gep(
                context.make_array(signature.args[number])(context, builder, given[number]).data, [given[number + 1]]
            )
            for number in (2, 4, 8)
        }
        groups = context.make_array(signature.args[6])(context, builder, given[6]).data
        groups = builder.gep(groups, [builder.sdiv(given[5], _index(GROUP))])
        for each in BITS:
            with builder.if_then(builder.icmp_signed("==", given[1], _index(each))):
                _emit(builder, each, rows.literal_value, flat[2], flat[4], groups, given[7], flat[8], given[10])
        return context.get_dummy_value()

    index = numba.types.intp
    return numba.types.void(rows, index, blocks, index, x, index, sums, index, out, index, index), generate


def _emit(builder: Any, bits: int, rows: int, block: Any, x: Any, groups: Any, width: Any, out: Any, n: Any) -> None:
    """The instructions of `_product`; addresses in place of arrays."""
    zero, each, at_once = ir.Constant(FLOATS, None), range(rows), max(1, SUMS // rows)
    totals = [[cgutils.alloca_once_value(builder, zero) for _ in range(at_once if bits == 32 else 1)] for _ in each]
    n_groups = builder.sdiv(width, _index(GROUP))
    x_rows = [builder.gep(x, [builder.mul(width, _index(row))]) for row in each]
    group_rows = [builder.gep(groups, [builder.mul(n_groups, _index(row))]) for row in each]
    out_rows = [builder.gep(out, [builder.mul(n, _index(row))]) for row in each]
    with cgutils.for_range(builder, n_groups) as loop:
        here = builder.gep(block, [builder.mul(loop.index, _index(block_bytes(bits)))])
        begin = builder.mul(loop.index, _index(GROUP))
        if rows > 1 or bits < 32:
            for line in range(0, block_bytes(bits), CACHE_LINE):
                prefetch(builder, builder.gep(here, [_index(AHEAD_BYTES + line)]))
        sums = [[builder.load(total) for total in of_row] if bits == 32 else [zero] * at_once for of_row in totals]
        for column, values in _columns(builder, here, bits):
            for row in each:
                of_row = builder.load(builder.gep(x_rows[row], [builder.add(begin, _index(column))]))
                spread, place = _in_all_lanes(builder, of_row), column % at_once
                sums[row][place] = _multiply_add(builder, spread, values, sums[row][place])
        for row in each:
            if bits < 32:
                of_group = _in_all_lanes(builder, builder.load(builder.gep(group_rows[row], [loop.index])))
                sums[row] = [_scaled(builder, here, reduce(builder.fadd, sums[row]), of_group, totals[row][0])]
            for value, total in zip(sums[row], totals[row], strict=True):
                builder.store(value, total)
    for row in each:
        total = reduce(builder.fadd, map(builder.load, totals[row]))
        builder.store(total, builder.bitcast(out_rows[row], FLOATS.as_pointer()), align=4)


def _scaled(builder: Any, block: Any, found: Any, of_group: Any, total: Any) -> Any:
    """`total` and what a block adds to it: of x's products with its whole numbers, `found`, and of x's sum."""
    scale = builder.fpext(_load(builder, block, 0, HALVES), FLOATS)
    offset = builder.fpext(_load(builder, block, SCALES_BYTES // 2, HALVES), FLOATS)
    return _multiply_add(builder, of_group, offset, _multiply_add(builder, found, scale, builder.load(total)))


def _columns(builder: Any, block: Any, bits: int) -> Iterator[tuple[int, Any]]:
    """Each column of a block, and its values, or of 4 and 8 bits the whole numbers."""
    if bits == 32:
        for column in range(GROUP):
            yield column, _load(builder, block, 4 * LANES * column, FLOATS)
        return
    for column in range(GROUP * bits // 8):
        stored = builder.zext(_load(builder, block, SCALES_BYTES + LANES * column, BYTES), INTS)
        if bits == 8:
            yield column, builder.sitofp(stored, FLOATS)
        else:
            yield column, builder.sitofp(builder.and_(stored, ir.Constant(INTS, [15] * LANES)), FLOATS)
            yield column + GROUP // 2, builder.sitofp(builder.lshr(stored, ir.Constant(INTS, [4] * LANES)), FLOATS)


def _index(number: int) -> Any:
    return ir.Constant(ir.IntType(64), number)


def _load(builder: Any, base: Any, byte: int, kind: Any) -> Any:
    return builder.load(builder.bitcast(builder.gep(base, [_index(byte)]), kind.as_pointer()), align=1)


def _multiply_add(builder: Any, a: Any, b: Any, c: Any) -> Any:
    kind, name = ir.FunctionType(FLOATS, [FLOATS] * 3), f"llvm.fmuladd.v{LANES}f32"
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), [a, b, c])


def _in_all_lanes(builder: Any, value: Any) -> Any:
    nothing = ir.Constant(FLOATS, ir.Undefined)
    first = builder.insert_element(nothing, value, ir.Constant(ir.IntType(32), 0))
    return builder.shuffle_vector(first, nothing, ir.Constant(INTS, [0] * LANES))


@numba.njit(fastmath={"reassoc"})  # type: ignore[untyped-decorator]
def _sums(x: Any, sums: Any) -> None:
    """`sums` are set to those of `x`, GROUP by GROUP."""
    for group in range(len(sums)):
        total = np.float32(0)
        for value in x[group * GROUP : (group + 1) * GROUP]:
            total += value
        sums[group] = total


@compiled
def multiply(blocks: Any, bits: Any, x: Any, out: Any, begin: Any, end: Any) -> None:
    """The columns from `begin` to `end`, multiples of LANES, of `out` [T, N] are set to those of `x` [T, K] times the
    transposed matrix [N, K], where `blocks` are contiguous, all bytes of [N / LANES, K / GROUP, bytes of a block] one
    after the other."""
    n_rows, width, n = len(x), x.shape[1], out.shape[1]
    flat, results = x.reshape(-1), out.reshape(-1)
    sums = np.empty(0 if bits == 32 else len(flat) // GROUP, np.float32)
    _sums(flat, sums)
    for first in range(begin, end, LANES):
        block, row = first * (len(blocks) // n), 0
        while row < n_rows:
            at, to, left = row * width, row * n + first, n_rows - row
            if SUMS == 8 and left >= 8:
                _product(8, bits, blocks, block, flat, at, sums, width, results, to, n)
                row += 8
            elif left >= 4:
                _product(4, bits, blocks, block, flat, at, sums, width, results, to, n)
                row += 4
            elif left >= 2:
                _product(2, bits, blocks, block, flat, at, sums, width, results, to, n)
                row += 2
            else:
                _product(1, bits, blocks, block, flat, at, sums, width, results, to, n)
                row += 1

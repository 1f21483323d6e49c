"""Products of float32 rows with a matrix that lies in blocks of few bits, in one compiled call.

    multiply(blocks, bits, x, out, 0, N)    # x [T, K], out [T, N], both float32 and contiguous

The matrix [N, K] is read once, as one stream, for up to eight rows at a time. A block is GROUP columns of LANES rows of
the matrix: a float16 scale for each of the LANES, a float16 offset for each, then the whole numbers q, of which each
value is scale * q + offset. A column's LANES numbers stand side by side, of 8 bits each; of 4 bits, with those of the
column GROUP / 2 further on in the upper halves of the same bytes. A block of 32 bits has the float32 values themselves.

On one core (AMD EPYC with AVX-512) a row is multiplied as fast as memory gives the matrix, 40 GB/s of float32, 26 to 30
of 4-bit blocks (oneDNN: 32 of float32), and 20 rows and more with 200 GFLOP/s. It is written in vectors of LLVM's own,
which any processor has in some form. Only what calls this module should import it, since that loads LLVM, and the first
call compiles: 2 s, or 0.2 s where an earlier process could keep what was compiled.
"""

from collections.abc import Iterator
from functools import reduce
from typing import Any

import numba
from llvmlite import ir
from numba.core import cgutils
from numba.extending import intrinsic

from splitlearn.blocks import BITS, GROUP, LANES, SCALES_BYTES, block_bytes
from splitlearn.jit import CACHE_LINE, compiled, prefetch

# So many sums are under way at once: a single one would have to wait for the last addition to it each time.
SUMS = 8
# How far ahead the lines of the blocks are asked for, where the processor's own prefetching falls behind: 8 rows with
# float32 blocks took 315 microseconds without, 123 with; a row with 4-bit blocks takes 0.93 times as long. A row with
# float32 blocks is as fast without.
AHEAD_BYTES = 8 << 10
FLOATS, INTS, BYTES, HALVES = (
    ir.VectorType(kind, LANES) for kind in (ir.FloatType(), ir.IntType(32), ir.IntType(8), ir.HalfType())
)


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def _product(
    typing: Any, rows: Any, bits: Any, blocks: Any, block: Any, x: Any, at: Any, width: Any, out: Any, to: Any, n: Any
) -> Any:
    """The product of `rows` rows of x, a constant, with LANES rows of the matrix, of one of BITS each, for
    compiled code. The arrays are flat, each followed by the index at which to begin; `width` is K and `n` is N."""

    def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        flat = {
            number: builder.gep(
                context.make_array(signature.args[number])(context, builder, given[number]).data, [given[number + 1]]
            )
            for number in (2, 4, 7)
        }
        for each in BITS:
            with builder.if_then(builder.icmp_signed("==", given[1], _index(each))):
                _emit(builder, each, rows.literal_value, flat[2], flat[4], given[6], flat[7], given[9])
        return context.get_dummy_value()

    index = numba.types.intp
    return numba.types.void(rows, index, blocks, index, x, index, index, out, index, index), generate


def _emit(builder: Any, bits: int, rows: int, block: Any, x: Any, width: Any, out: Any, n: Any) -> None:
    """The instructions of `_product`; addresses in place of arrays."""
    zero, each = ir.Constant(FLOATS, None), range(rows)
    sums = [[cgutils.alloca_once_value(builder, zero) for _ in range(SUMS // rows)] for _ in each]
    x_rows = [builder.gep(x, [builder.mul(width, _index(row))]) for row in each]
    out_rows = [builder.gep(out, [builder.mul(n, _index(row))]) for row in each]
    with cgutils.for_range(builder, builder.sdiv(width, _index(GROUP))) as loop:
        here = builder.gep(block, [builder.mul(loop.index, _index(block_bytes(bits)))])
        begin = builder.mul(loop.index, _index(GROUP))
        if rows > 1 or bits < 32:
            for line in range(0, block_bytes(bits), CACHE_LINE):
                prefetch(builder, builder.gep(here, [_index(AHEAD_BYTES + line)]))
        for column, values in _columns(builder, here, bits):
            for row in each:
                of_row = builder.load(builder.gep(x_rows[row], [builder.add(begin, _index(column))]))
                total = sums[row][column % len(sums[row])]
                more = _multiply_add(builder, _in_all_lanes(builder, of_row), values, builder.load(total))
                builder.store(more, total)
    for row in each:
        total = reduce(builder.fadd, map(builder.load, sums[row]))
        builder.store(total, builder.bitcast(out_rows[row], FLOATS.as_pointer()), align=4)


def _columns(builder: Any, block: Any, bits: int) -> Iterator[tuple[int, Any]]:
    """Each column of a block, and its values."""
    if bits == 32:
        for column in range(GROUP):
            yield column, _load(builder, block, 4 * LANES * column, FLOATS)
        return
    scale = builder.fpext(_load(builder, block, 0, HALVES), FLOATS)
    offset = builder.fpext(_load(builder, block, SCALES_BYTES // 2, HALVES), FLOATS)

    def values(whole: Any) -> Any:
        return _multiply_add(builder, builder.uitofp(whole, FLOATS), scale, offset)

    for column in range(GROUP * bits // 8):
        stored = builder.zext(_load(builder, block, SCALES_BYTES + LANES * column, BYTES), INTS)
        if bits == 8:
            yield column, values(stored)
        else:
            yield column, values(builder.and_(stored, ir.Constant(INTS, [15] * LANES)))
            yield column + GROUP // 2, values(builder.lshr(stored, ir.Constant(INTS, [4] * LANES)))


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


@compiled
def multiply(blocks: Any, bits: Any, x: Any, out: Any, begin: Any, end: Any) -> None:
    """The columns from `begin` to `end`, multiples of LANES, of `out` [T, N] are set to those of `x` [T, K] times the
    transposed matrix [N, K], where `blocks` are contiguous, all bytes of [N / LANES, K / GROUP, bytes of a block] one
    after the other."""
    n_rows, width, n = len(x), x.shape[1], out.shape[1]
    flat, results = x.reshape(-1), out.reshape(-1)
    for first in range(begin, end, LANES):
        block, row = first * (len(blocks) // n), 0
        while row < n_rows:
            at, to, left = row * width, row * n + first, n_rows - row
            if left >= 8:
                _product(8, bits, blocks, block, flat, at, width, results, to, n)
                row += 8
            elif left >= 4:
                _product(4, bits, blocks, block, flat, at, width, results, to, n)
                row += 4
            elif left >= 2:
                _product(2, bits, blocks, block, flat, at, width, results, to, n)
                row += 2
            else:
                _product(1, bits, blocks, block, flat, at, width, results, to, n)
                row += 1

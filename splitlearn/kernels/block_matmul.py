"""Multiplies float32 rows with a matrix in blocks, in one compiled call.

    multiply(blocks, bits, x, out, 0, N)    # x [T, K], out [T, N], both float32 and contiguous

It reads the matrix [N, K] once, as one stream, for up to SUMS rows at a time. A block is GROUP columns of LANES rows of
the matrix. A block of 32 bits has their float32 values, column by column. A block of 4 or 8 bits begins with a float16
scale and a float16 offset for each of the LANES. Then come integers q; each value is scale * q + offset. A column's
LANES integers are side by side, each in a byte. With 4 bits, the upper halves of these bytes are the column GROUP / 2
further on.

For a few rows, the products of x with q are summed in each block, then scaled once; the sum of x is multiplied by the
offset once. Without AVX-512 a row of 1536x576 then takes 56 us, and 68 if each value is computed first.

Without AVX-512, for MANY_ROWS and more, the values of LANES rows of the matrix are computed first, into a panel of
float32 values that stays in the core's first cache. All rows are multiplied with it, TILE at a time: 20 rows take 0.95
times as long, 64 and more 0.85. A panel is laid out as blocks of 32 bits, so that both formats share the code. With
AVX-512 the processor computes values beside its products: a few rows at a time are as fast as its arithmetic, and a
panel would take 1.1 times as long.

On one core (AMD EPYC with AVX-512), a row takes as long as reading the matrix from memory: 40 GB/s of float32, 26 to 30
of 4-bit blocks (oneDNN: 32 of float32). 20 rows and more reach 200 GFLOP/s. The code uses LLVM's vectors, which work on
every processor. The first call compiles for 2 s, or takes 0.2 s if an earlier process cached the machine code. To
import this module loads LLVM.

Why not torch's `_weight_int4pack_mm_for_cpu`, which torchao calls, too: it reads 14 to 18 GB/s of 4-bit weights, this
26 to 30. It needs x in bfloat16, which changes the tokens (with float32 a row takes 100 times as long). And compiled
code, such as kernels/llama_decode.py, cannot call it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
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

# The number of independent sums, of one row or of as many rows: a single sum would have to wait for its last addition
# each time. AVX-512 has 32 registers that hold LANES each. Without it there are 16, two for the LANES, so that 8 sums
# leave none for the values. Then 4 bits take 80 us for a row of 1536x576 and 1036 for 20 rows; with 4 sums 68 and 556.
SUMS = 8 if llvm.get_host_cpu_features().get("avx512f") else 4
# Rows of x that are multiplied with float32 values at once, a sum of LANES each. Without AVX-512, 6 such sums fill the
# registers but for those of the values and of one number of x.
TILE = 8 if SUMS == 8 else 6
# This many rows and more are multiplied with values that are computed once, not with integers for each SUMS rows.
MANY_ROWS = 1 << 62 if SUMS == 8 else 12
# They are multiplied in passes of at most as many groups of columns, and as many rows.
PASS_GROUPS, PASS_ROWS = 18, 240
# The prefetch distance within the blocks, for cases in which the processor's own prefetching is too slow. 8 rows with
# float32 blocks took 315 us without and 123 with it; a row with 4-bit blocks takes 0.93 times as long. A single row
# with float32 blocks gains nothing.
AHEAD_BYTES = 8 << 10
PANEL_BYTES = block_bytes(32)
FLOATS, INTS, BYTES, HALVES = (
    ir.VectorType(kind, LANES) for kind in (ir.FloatType(), ir.IntType(32), ir.IntType(8), ir.HalfType())
)


@dataclass(frozen=True)
class _Tile:
    """Pointers for the product of some rows of x with LANES rows of the matrix, the number of column groups, and
    whether it is added to what is in `out`."""

    block: Any
    x: list[Any]
    sums: list[Any]
    out: list[Any]
    n_groups: Any
    adds: Any


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def _product(
    typing: Any,
    rows: Any,
    bits: Any,
    blocks: Any,
    at: Any,
    x: Any,
    sums: Any,
    out: Any,
    row: Any,
    first: Any,
    group: Any,
    groups: Any,
) -> Any:
    """`multiply` for `rows` rows (a literal) from `row` on, and LANES columns from `first` on, with so many `groups` of
    columns of x from `group` on, whose blocks begin at the byte `at`. If `group` is not 0, it is added to what is in
    `out`. `sums` [T, K / GROUP] are those of `_sum_groups`; with 32 bits they are not read. More than SUMS rows are for
    32 bits only."""
    kinds, n_rows = (blocks, x, sums, out), rows.literal_value
    if any(kind.layout != "C" for kind in kinds):
        raise numba.TypingError("multiply takes contiguous arrays")

    def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        _, bits, given_blocks, at, *arrays, row, first, group, groups = given
        blocks, x, sums, out = (
            context.make_array(kind)(context, builder, array)
            for kind, array in zip(kinds, (given_blocks, *arrays), strict=True)
        )
        (_, width), (_, n) = (cgutils.unpack_tuple(builder, each.shape) for each in (x, out))
        n_groups, in_rows = (
            builder.sdiv(width, constant(GROUP)),
            [builder.add(row, constant(each)) for each in range(n_rows)],
        )

        def pointers(array: Any, width: Any, column: Any) -> list[Any]:
            return [builder.gep(array.data, [builder.add(builder.mul(each, width), column)]) for each in in_rows]

        tile = _Tile(
            block=builder.gep(blocks.data, [at]),
            x=pointers(x, width, builder.mul(group, constant(GROUP))),
            sums=pointers(sums, n_groups, group),
            out=pointers(out, n, first),
            n_groups=groups,
            adds=builder.icmp_signed("!=", group, constant(0)),
        )
        for each in BITS if n_rows <= SUMS else (32,):
            with builder.if_then(builder.icmp_signed("==", bits, constant(each))):
                _emit(builder, each, tile)
        return context.get_dummy_value()

    index = numba.types.intp
    return numba.types.void(rows, index, blocks, index, x, sums, out, *[index] * 4), generate


@intrinsic  # type: ignore[untyped-decorator]
def _unpack(typing: Any, bits: Any, blocks: Any, at: Any, panel: Any) -> Any:
    """Set `panel` to a block of 32 bits for each block of 4 or 8 `bits` from the byte `at` on."""
    index = numba.types.intp

    def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        bits, from_blocks, at, to_panel = given
        source = builder.gep(context.make_array(blocks)(context, builder, from_blocks).data, [at])
        target = context.make_array(panel)(context, builder, to_panel)
        n_groups = builder.sdiv(cgutils.unpack_tuple(builder, target.shape)[0], constant(block_bytes(32)))
        for each in BITS[:-1]:
            with builder.if_then(builder.icmp_signed("==", bits, constant(each))):
                _emit_unpack(builder, each, source, target.data, n_groups)
        return context.get_dummy_value()

    return numba.types.void(index, blocks, index, panel), generate


def _emit_unpack(builder: Any, bits: int, source: Any, target: Any, n_groups: Any) -> None:
    """The instructions of `_unpack` for one format."""
    with cgutils.for_range(builder, n_groups) as loop:
        block = builder.gep(source, [builder.mul(loop.index, constant(block_bytes(bits)))])
        values = builder.gep(target, [builder.mul(loop.index, constant(block_bytes(32)))])
        scale, offset = scale_and_offset(builder, block)
        for column, integers in columns_of(builder, block, bits):
            place = builder.bitcast(builder.gep(values, [constant(4 * LANES * column)]), FLOATS.as_pointer())
            builder.store(multiply_add(builder, integers, scale, offset), place, align=4)


def _emit(builder: Any, bits: int, tile: _Tile) -> None:
    """The instructions of `_product` for one format."""
    zero, at_once, size = ir.Constant(FLOATS, None), max(1, SUMS // len(tile.x)), block_bytes(bits)
    totals = [[cgutils.alloca_once_value(builder, zero) for _ in range(at_once if bits == 32 else 1)] for _ in tile.x]
    with cgutils.for_range(builder, tile.n_groups) as loop:
        block = builder.gep(tile.block, [builder.mul(loop.index, constant(size))])
        begin = builder.mul(loop.index, constant(GROUP))
        for line in range(0, size if len(tile.x) > 1 or bits < 32 else 0, CACHE_LINE):
            prefetch(builder, builder.gep(block, [constant(AHEAD_BYTES + line)]))
        sums = [list(map(builder.load, of_row)) if bits == 32 else [zero] * at_once for of_row in totals]
        for column, values in columns_of(builder, block, bits):
            at, place = builder.add(begin, constant(column)), column % at_once
            for x, of_row in zip(tile.x, sums, strict=True):
                spread = _in_all_lanes(builder, builder.load(builder.gep(x, [at])))
                of_row[place] = multiply_add(builder, spread, values, of_row[place])
        for x_sums, of_row, kept in zip(tile.sums, sums, totals, strict=True):
            if bits < 32:
                x_sum = _in_all_lanes(builder, builder.load(builder.gep(x_sums, [loop.index])))
                of_row = [_scaled(builder, block, reduce(builder.fadd, of_row), x_sum, builder.load(kept[0]))]
            for value, to in zip(of_row, kept, strict=True):
                builder.store(value, to)
    for of_row, out in zip(totals, tile.out, strict=True):
        place = builder.bitcast(out, FLOATS.as_pointer())
        total = cgutils.alloca_once_value(builder, reduce(builder.fadd, map(builder.load, of_row)))
        with builder.if_then(tile.adds, likely=False):
            builder.store(builder.fadd(builder.load(total), builder.load(place, align=4)), total)
        builder.store(builder.load(total), place, align=4)


def columns_of(builder: Any, block: Any, bits: int) -> Iterator[tuple[int, Any]]:
    """Yield each column of a block with its values; with 4 and 8 bits, with its integers."""
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


def _scaled(builder: Any, block: Any, found: Any, x_sum: Any, total: Any) -> Any:
    """`total` plus the contribution of a block of integers: `found`, their products with x, times the scale, plus the
    sum of x times the offset."""
    scale, offset = scale_and_offset(builder, block)
    return multiply_add(builder, x_sum, offset, multiply_add(builder, found, scale, total))


def scale_and_offset(builder: Any, block: Any) -> tuple[Any, Any]:
    """The scale and the offset of each of a block's LANES, as float32."""
    places = (0, SCALES_BYTES // 2)
    scale, offset = (builder.fpext(_load(builder, block, at, HALVES), FLOATS) for at in places)
    return scale, offset


def constant(number: int) -> Any:
    return ir.Constant(ir.IntType(64), number)


def _load(builder: Any, base: Any, byte: int, kind: Any) -> Any:
    return builder.load(builder.bitcast(builder.gep(base, [constant(byte)]), kind.as_pointer()), align=1)


def multiply_add(builder: Any, a: Any, b: Any, c: Any) -> Any:
    kind, name = ir.FunctionType(FLOATS, [FLOATS] * 3), f"llvm.fmuladd.v{LANES}f32"
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), [a, b, c])


def _in_all_lanes(builder: Any, value: Any) -> Any:
    nothing = ir.Constant(FLOATS, ir.Undefined)
    first = builder.insert_element(nothing, value, ir.Constant(ir.IntType(32), 0))
    return builder.shuffle_vector(first, nothing, ir.Constant(INTS, [0] * LANES))


@numba.njit(fastmath={"reassoc"})  # type: ignore[untyped-decorator]
def _sum_groups(x: Any, sums: Any) -> None:
    """Set `sums` [T, K / GROUP] to the sums of each GROUP of columns of `x` [T, K]."""
    for row in range(len(x)):
        for group in range(sums.shape[1]):
            total = np.float32(0)
            for value in x[row, group * GROUP : (group + 1) * GROUP]:
                total += value
            sums[row, group] = total


@compiled
def multiply(blocks: Any, bits: Any, x: Any, out: Any, begin: Any, end: Any) -> None:
    """Set the columns `[begin, end)` of `out` [T, N] to those of `x` [T, K] times the transposed matrix [N, K].

    `begin` and `end` are multiples of LANES. `blocks` are the contiguous bytes of [N / LANES, K / GROUP, bytes of a
    block].
    """
    n_rows, n_groups = len(x), x.shape[1] // GROUP
    unpacks = bits < 32 and n_rows >= MANY_ROWS
    sums = np.empty((n_rows, 0 if bits == 32 or unpacks else n_groups), np.float32)
    _sum_groups(x, sums)
    passes = -(-n_groups // PASS_GROUPS) if unpacks else 1
    groups, rows = -(-n_groups // passes), PASS_ROWS if unpacks else n_rows
    panel = _aligned(groups * PANEL_BYTES if unpacks else 0)
    column_bytes = len(blocks) // out.shape[1]
    group_bytes = column_bytes * LANES // n_groups
    for row in range(0, n_rows, rows):
        end_row = min(row + rows, n_rows)
        for group in range(0, n_groups, groups):
            some = min(groups, n_groups - group)
            for first in range(begin, end, LANES):
                at = first * column_bytes + group * group_bytes
                if unpacks:
                    _unpack(bits, blocks, at, panel[: some * PANEL_BYTES])
                    _multiply_rows(panel, 32, 0, x, sums, out, row, end_row, first, group, some)
                else:
                    _multiply_rows(blocks, bits, at, x, sums, out, row, end_row, first, group, some)


@numba.njit  # type: ignore[untyped-decorator]
def _aligned(size: Any) -> Any:
    """`size` bytes that begin with a cache line."""
    memory = np.empty(size + CACHE_LINE, np.uint8)
    begin = -np.int64(memory.ctypes.data) % CACHE_LINE
    return memory[begin : begin + size]


@numba.njit  # type: ignore[untyped-decorator]
def _multiply_rows(
    blocks: Any,
    bits: Any,
    at: Any,
    x: Any,
    sums: Any,
    out: Any,
    row: Any,
    end: Any,
    first: Any,
    group: Any,
    groups: Any,
) -> None:
    """`multiply` for the rows `[row, end)` and LANES columns from `first` on, with so many `groups` of
    columns of x from `group` on, whose blocks begin at the byte `at`."""
    while row < end:
        left = end - row
        if bits == 32 and left >= TILE:
            _product(TILE, bits, blocks, at, x, sums, out, row, first, group, groups)
            row += TILE
        elif SUMS == 8 and left >= 8:
            _product(8, bits, blocks, at, x, sums, out, row, first, group, groups)
            row += 8
        elif left >= 4:
            _product(4, bits, blocks, at, x, sums, out, row, first, group, groups)
            row += 4
        elif left >= 2:
            _product(2, bits, blocks, at, x, sums, out, row, first, group, groups)
            row += 2
        else:
            _product(1, bits, blocks, at, x, sums, out, row, first, group, groups)
            row += 1

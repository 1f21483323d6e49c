"""Decode attention for one token of each of many sessions, with keys and values in one pool, in one compiled call.

    attend(query, keys, values, starts, lengths, scale)    # [1, heads, T, size] to [1, T, heads, size]

Row t sees the keys `[starts[t], starts[t] + lengths[t])` of the pool, and nothing else of it is read. To import this
module loads LLVM, and the first call for a dtype compiles. That costs a trunk server 2 s and 140 MB when it starts, or
0.2 s and 100 MB if an earlier process cached the machine code.

torch's own attention, called for each session and layer, takes 31 us; this takes 9. With keys and values in the core's
caches it takes 20 us, and this 6. Most of the rest is waiting for memory, since a step reads all keys and values once.
So it prefetches values while it compares keys, and the next keys while it adds values. 26 layers of 32 sessions of 100
tokens take 7 ms instead of 13.
"""

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import torch
from numba.extending import intrinsic, overload
from numpy.typing import NDArray

from splitlearn.kernels.jit import CACHE_LINE, compiled, prefetch

# Sums may be computed in any order. NaN and infinity keep their meaning, since the server checks for them.
ANY_ORDER = {"reassoc", "contract", "arcp", "nsz"}
# A float32 of this size has no bits for a fraction. Adding a number to it rounds the number to an integer, in the last
# bits.
ROUNDS = np.float32(1.5 * 2**23)
EXPONENT_OF_ONE = np.int32(127)
ROUNDED_ZERO = ROUNDS.view(np.int32)
# Weights below 2**LEAST are raised to it, which is negligible next to the largest weight, 1.
LEAST = np.float32(-100.0)
# Taylor coefficients ln(2)**k / k! of 2**x for -0.5 to 0.5. The first term left out is at most a float32's last bit.
ONE, C1, C2, C3, C4, C5, C6 = (
    np.float32(c) for c in (1.0, 0.6931472, 0.24022651, 0.05550411, 0.009618129, 0.0013333558, 0.00015403530)
)


def attend(
    query: torch.Tensor,
    keys: NDArray[Any],
    values: NDArray[Any],
    starts: NDArray[np.int64],
    lengths: NDArray[np.int64],
    scale: float | None,
) -> torch.Tensor:
    """Attend each row of `query` [1, heads, T, size] to its own keys. Returns [1, T, heads, size of values], in the
    query's dtype.

    `keys` and `values` [groups, capacity, size] are float32, or bfloat16 as numpy's uint16. Each group serves
    neighbouring heads. `scale` None is 1 / sqrt(size), as in torch's scaled_dot_product_attention.
    """
    rows = query[0].transpose(0, 1).float().contiguous().numpy()
    out = np.empty((*rows.shape[:2], values.shape[2]), np.float32)
    attend_arrays(rows, keys, values, starts, lengths, rows.shape[2] ** -0.5 if scale is None else scale, out)
    return torch.from_numpy(out).to(query.dtype).unsqueeze(0)


@intrinsic  # type: ignore[untyped-decorator]
def _prefetch(typing: Any, array: Any, index: Any) -> Any:
    """Prefetch the cache line of element `index` of a contiguous array. An address outside of memory is no error."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        prefetch(builder, builder.gep(data, [arguments[1]]))
        return context.get_dummy_value()

    return numba.types.void(array, numba.types.intp), generate


@numba.njit  # type: ignore[untyped-decorator]
def _prefetch_rows(rows: Any, first: Any, count: Any) -> None:
    """Prefetch at most `count` of `rows` [n, size], from `first` on."""
    size = rows.shape[1]
    for at in range(first * size, min(first + count, len(rows)) * size, CACHE_LINE // rows.itemsize):
        _prefetch(rows, at)


def _float(value: Any) -> Any:
    """An element of keys or values as float32; for compiled code only."""
    raise NotImplementedError


@overload(_float)  # type: ignore[untyped-decorator]
def _float_of(value: Any) -> Callable[[Any], Any]:
    def same(value: Any) -> Any:
        return value

    def widened(value: Any) -> Any:  # bfloat16 is the upper half of a float32
        return np.int32(np.uint32(value) << np.uint32(16)).view(np.float32)

    return widened if value == numba.types.uint16 else same


@numba.njit(fastmath=ANY_ORDER)  # type: ignore[untyped-decorator]
def _compare(query: Any, keys: Any, ahead: Any, scores: Any) -> None:
    """Products of `query` [heads, size] with `keys` [n, size], to `scores` [heads, n or more]."""
    for at in range(len(keys)):
        _prefetch_rows(ahead, at, 1)
        for head in range(len(query)):
            score = np.float32(0)
            for d in range(keys.shape[1]):
                score += query[head, d] * _float(keys[at, d])
            scores[head, at] = score


@numba.njit(fastmath={"contract"})  # type: ignore[untyped-decorator]
def power_of_two(x: Any) -> Any:
    """2**x for x <= 0, without a call or a branch, so that LLVM vectorises it. NaN stays NaN.

    Not compiled with ANY_ORDER: the order of its sums does the rounding.
    """
    x = LEAST if x < LEAST else x
    rounded = x + ROUNDS
    part = x - (rounded - ROUNDS)
    exponent = np.float32(rounded).view(np.int32) - ROUNDED_ZERO + EXPONENT_OF_ONE
    fraction = ONE + part * (C1 + part * (C2 + part * (C3 + part * (C4 + part * (C5 + part * C6)))))
    return fraction * np.int32(exponent << 23).view(np.float32)


@numba.njit(fastmath=ANY_ORDER)  # type: ignore[untyped-decorator]
def _weigh(scores: Any) -> None:
    """Replace `scores` [n] by their softmax of base 2."""
    top = np.float32(-np.inf)
    for at in range(len(scores)):
        if scores[at] > top:
            top = scores[at]
    total = np.float32(0)
    for at in range(len(scores)):
        scores[at] = power_of_two(scores[at] - top)
        total += scores[at]
    for at in range(len(scores)):
        scores[at] /= total


@numba.njit(fastmath=ANY_ORDER)  # type: ignore[untyped-decorator]
def _add_up(weights: Any, values: Any, ahead: Any, out: Any) -> None:
    """Set `out` [heads, size] to the sum of `values` [n, size], weighted by `weights` [heads, n or more]. Takes four
    values at a time, since each pass reads and writes all of `out`."""
    out[:] = 0
    by_four = len(values) // 4 * 4
    for at in range(0, by_four, 4):
        _prefetch_rows(ahead, at, 4)
        for head in range(len(out)):
            a, b, c, e = weights[head, at], weights[head, at + 1], weights[head, at + 2], weights[head, at + 3]
            for d in range(values.shape[1]):
                first = a * _float(values[at, d]) + b * _float(values[at + 1, d])
                out[head, d] += first + c * _float(values[at + 2, d]) + e * _float(values[at + 3, d])
    for at in range(by_four, len(values)):
        for head in range(len(out)):
            for d in range(values.shape[1]):
                out[head, d] += weights[head, at] * _float(values[at, d])


@compiled
def attend_arrays(query: Any, keys: Any, values: Any, starts: Any, lengths: Any, scale: Any, out: Any) -> None:
    """As `attend`, for `query` [T, heads, size], to `out` [T, heads, size of values]."""
    groups, shared = len(keys), query.shape[1] // len(keys)
    scores = np.empty((shared, lengths.max()), np.float32)
    scaled = query * np.float32(scale * np.log2(np.e))
    for row in range(len(starts)):
        own = slice(starts[row], starts[row] + lengths[row])
        after = slice(starts[row + 1], starts[row + 1] + lengths[row + 1]) if row + 1 < len(starts) else slice(0, 0)
        for group in range(groups):
            heads = slice(group * shared, (group + 1) * shared)
            _compare(scaled[row, heads], keys[group, own], values[group, own], scores)
            for head in range(shared):
                _weigh(scores[head, : lengths[row]])
            ahead = keys[group + 1, own] if group + 1 < groups else keys[0, after]
            _add_up(scores, values[group, own], ahead, out[row, heads])

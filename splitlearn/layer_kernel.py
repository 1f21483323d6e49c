"""One token through one decoder layer as Llama has it, in one compiled call: norms, products (products.py), rotary
embedding, attention (attention.py) and the gated MLP, without torch's way in and out of each.

Only what calls this module should import it, since that loads LLVM.
"""

from typing import Any

import numba
import numpy as np

from splitlearn.attention import ANY_ORDER, attend_arrays
from splitlearn.jit import compiled
from splitlearn.products import multiply


@numba.njit(fastmath=ANY_ORDER)  # type: ignore[untyped-decorator]
def _normed(x: Any, weight: Any, eps: Any) -> Any:
    """x / sqrt(mean(x ** 2) + eps) * weight (Zhang and Sennrich 2019, arXiv:1910.07467), as a row."""
    total = np.float32(0)
    for value in x:
        total += value * value
    by = np.float32(1) / np.sqrt(total / np.float32(len(x)) + np.float32(eps))
    out = np.empty((1, len(x)), np.float32)
    for at in range(len(x)):
        out[0, at] = x[at] * by * weight[at]
    return out


@numba.njit(fastmath=ANY_ORDER)  # type: ignore[untyped-decorator]
def _rotate(heads: Any, cos: Any, sin: Any) -> None:
    """Rotary embedding of `heads` [n, size], in place, the halves of each head as pairs (Su et al. 2021,
    arXiv:2104.09864, in the layout of GPT-NeoX)."""
    half = heads.shape[1] // 2
    for head in heads:
        for at in range(half):
            low, high = head[at], head[at + half]
            head[at] = low * cos[at] - high * sin[at]
            head[at + half] = high * cos[at + half] + low * sin[at + half]


@numba.njit(fastmath=ANY_ORDER)  # type: ignore[untyped-decorator]
def _gate(gate: Any, up: Any) -> None:
    """`up` times SiLU of `gate`, in place of `up`."""
    for at in range(gate.shape[1]):
        up[0, at] *= gate[0, at] / (np.float32(1) + np.exp(-gate[0, at]))


@compiled
def step(
    x: Any,
    norms: Any,
    eps: Any,
    q: Any,
    k: Any,
    v: Any,
    o: Any,
    gate: Any,
    up: Any,
    down: Any,
    inner: Any,
    four_bits: Any,
    cos: Any,
    sin: Any,
    scale: Any,
    keys: Any,
    values: Any,
    start: Any,
    length: Any,
    out: Any,
) -> None:
    """`out` [H] is set to what the layer makes of `x` [H]; its key and value are written to where they belong.

    `norms` [2, H]; q to down: the blocks of the products, `inner` the width between gate and down; `cos`, `sin` [size];
    `keys`, `values` [groups, capacity, size], of which this session's begin at `start` and are `length`.
    """
    width, groups, size = len(x), keys.shape[0], keys.shape[2]
    n_heads = len(q) // (len(k) // groups)
    query, key, value = (
        np.empty((1, n_heads * size), np.float32),
        np.empty((1, groups * size), np.float32),
        np.empty((1, groups * size), np.float32),
    )
    normed = _normed(x, norms[0], eps)
    multiply(q, four_bits, normed, query)
    multiply(k, four_bits, normed, key)
    multiply(v, four_bits, normed, value)
    _rotate(query.reshape(n_heads, size), cos, sin)
    _rotate(key.reshape(groups, size), cos, sin)
    keys[:, start + length] = key.reshape(groups, size)
    values[:, start + length] = value.reshape(groups, size)
    attended = np.empty((1, n_heads, size), np.float32)
    starts, lengths = np.array([start]), np.array([length + 1])
    attend_arrays(query.reshape(1, n_heads, size), keys, values, starts, lengths, scale, attended)
    between, result = np.empty((1, width), np.float32), np.empty((1, width), np.float32)
    multiply(o, four_bits, attended.reshape(1, n_heads * size), between)
    after = x + between[0]
    normed = _normed(after, norms[1], eps)
    gated, wide = np.empty((1, inner), np.float32), np.empty((1, inner), np.float32)
    multiply(gate, four_bits, normed, gated)
    multiply(up, four_bits, normed, wide)
    _gate(gated, wide)
    multiply(down, four_bits, wide, result)
    for at in range(width):
        out[at] = after[at] + result[0, at]

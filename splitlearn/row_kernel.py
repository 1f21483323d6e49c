"""One token through decoder layers as Llama has them, all of a stage's in one compiled call: norms, products
(products.py), rotary embedding, attention (attention.py) and the gated MLP, without torch's way in and out of each.

Only what calls this module should import it, since that loads LLVM.

numba keeps the machine code by this file's own time: where products.py or attention.py change, whose code goes into it,
what is kept stays as it was until this file changes, or __pycache__ is gone (`make clean`).
"""

from typing import Any

import numba
import numpy as np
from numba.extending import intrinsic

from splitlearn.attention import ANY_ORDER, attend_arrays
from splitlearn.jit import compiled
from splitlearn.products import multiply

# The products of a layer in the order in which their blocks lie.
QUERY, KEY, VALUE, OUT, GATE, UP, DOWN, PRODUCTS = range(8)


@intrinsic  # type: ignore[untyped-decorator]
def _floats_at(typing: Any, address: Any) -> Any:
    """An address as a pointer to float32."""

    def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        return builder.inttoptr(given[0], context.get_value_type(signature.return_type))

    return numba.types.CPointer(numba.types.float32)(address), generate


@numba.njit(fastmath=ANY_ORDER)  # type: ignore[untyped-decorator]
def _norm(x: Any, weight: Any, eps: Any, out: Any) -> None:
    """`out` [H] is set to x / sqrt(mean(x ** 2) + eps) * weight (Zhang and Sennrich 2019, arXiv:1910.07467)."""
    total = np.float32(0)
    for value in x:
        total += value * value
    by = np.float32(1) / np.sqrt(total / np.float32(len(x)) + np.float32(eps))
    for at in range(len(x)):
        out[at] = x[at] * by * weight[at]


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
    for at in range(len(gate)):
        up[at] *= gate[at] / (np.float32(1) + np.exp(-gate[at]))


@numba.njit  # type: ignore[untyped-decorator]
def _part(blocks: Any, ends: Any, number: Any) -> Any:
    return blocks[ends[number] : ends[number + 1]]


@compiled
def step(
    x: Any,
    blocks: Any,
    ends: Any,
    bits: Any,
    norms: Any,
    eps: Any,
    n_heads: Any,
    inner: Any,
    scale: Any,
    turn: Any,
    kept: Any,
    shape: Any,
    start: Any,
    length: Any,
) -> None:
    """`x` [1, H] is changed to what the layers make of it; each layer's key and value are written where they belong.

    `blocks` are those of all products of all layers, of which the first end at `ends` [1 + layers * PRODUCTS], from 0
    on. `norms` [layers, 2, H]. `inner` is the width between gate and down. `turn` [2, size] are cos and sin. `kept`
    [layers, 2] are the addresses of keys and values, each of `shape` (groups, capacity, size), of which this session's
    begin at `start` and are `length`.
    """
    width, groups, size = x.shape[1], shape[0], shape[2]
    normed, result = np.empty((1, width), np.float32), np.empty((1, width), np.float32)
    query, attended = np.empty((1, n_heads, size), np.float32), np.empty((1, n_heads, size), np.float32)
    key, value = np.empty((1, groups * size), np.float32), np.empty((1, groups * size), np.float32)
    gated, wide = np.empty((1, inner), np.float32), np.empty((1, inner), np.float32)
    flat_query, flat_attended = query.reshape(1, n_heads * size), attended.reshape(1, n_heads * size)
    starts, lengths = np.array([start]), np.array([length + 1])
    for layer in range(len(kept)):
        first = layer * PRODUCTS
        keys, values = numba.carray(_floats_at(kept[layer, 0]), shape), numba.carray(_floats_at(kept[layer, 1]), shape)
        _norm(x[0], norms[layer, 0], eps, normed[0])
        multiply(_part(blocks, ends, first + QUERY), bits, normed, flat_query, 0, n_heads * size)
        multiply(_part(blocks, ends, first + KEY), bits, normed, key, 0, groups * size)
        multiply(_part(blocks, ends, first + VALUE), bits, normed, value, 0, groups * size)
        _rotate(query[0], turn[0], turn[1])
        _rotate(key.reshape(groups, size), turn[0], turn[1])
        keys[:, start + length] = key.reshape(groups, size)
        values[:, start + length] = value.reshape(groups, size)
        attend_arrays(query, keys, values, starts, lengths, scale, attended)
        multiply(_part(blocks, ends, first + OUT), bits, flat_attended, result, 0, width)
        x += result
        _norm(x[0], norms[layer, 1], eps, normed[0])
        multiply(_part(blocks, ends, first + GATE), bits, normed, gated, 0, inner)
        multiply(_part(blocks, ends, first + UP), bits, normed, wide, 0, inner)
        _gate(gated[0], wide[0])
        multiply(_part(blocks, ends, first + DOWN), bits, wide, result, 0, width)
        x += result


@compiled
def head(x: Any, norm: Any, eps: Any, blocks: Any, bits: Any, logits: Any) -> None:
    """`logits` [1, V] are set to the LM head's products with the norm of `x` [1, H]."""
    normed = np.empty_like(x)
    _norm(x[0], norm, eps, normed[0])
    multiply(blocks, bits, normed, logits, 0, logits.shape[1])

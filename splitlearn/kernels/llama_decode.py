"""One token through decoder layers as Llama has them, all of a stage's in one compiled call: norms, products
(kernels/block_matmul.py), rotary embedding, attention (kernels/decode_attention.py) and the gated MLP, without
torch's way in and out of each.

Only what calls this module should import it, since that loads LLVM.
"""

from typing import Any

import numba
import numpy as np

from splitlearn.kernels.decode_attention import ANY_ORDER, power_of_two
from splitlearn.kernels.jit import compiled
from splitlearn.kernels.team_phases import attention, floats, product

# The products of a layer in the order in which their blocks lie.
QUERY, KEY, VALUE, OUT, GATE, UP, DOWN, PRODUCTS = range(8)
LOG2_E = np.float32(np.log2(np.e))


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


@numba.njit(fastmath={"contract"}, error_model="numpy")  # type: ignore[untyped-decorator]
def _gate(gate: Any, up: Any) -> None:
    """`up` times SiLU of `gate`, in place of `up`. A division that could raise would be done one by one: 1536 take 1.3
    microseconds, so 5.8."""
    for at in range(len(gate)):
        power = power_of_two(-abs(gate[at]) * LOG2_E)
        up[at] *= gate[at] * (np.float32(1) if gate[at] >= 0 else power) / (np.float32(1) + power)


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
    memory: Any,
    shares: Any,
) -> None:
    """`x` [1, H] is changed to what the layers make of it; each layer's key and value are written where they belong.

    `blocks` are those of all products of all layers, of which the first end at `ends` [1 + layers * PRODUCTS], from 0
    on. `norms` [layers, 2, H]. `inner` is the width between gate and down. `turn` [2, size] are cos and sin. `kept`
    [layers, 2] are the addresses of keys and values, each of `shape` (groups, capacity, size), of which this session's
    begin at `start` and are `length`. `memory` and `shares` are those of a Lead (kernels/thread_team.py).
    """
    width, groups, size = x.shape[1], shape[0], shape[2]
    heads, rows = n_heads * size, groups * size
    normed, result = np.empty((1, width), np.float32), np.empty((1, width), np.float32)
    projected, attended = np.empty((1, heads + 2 * rows), np.float32), np.empty((1, heads), np.float32)
    wide = np.empty((2, inner), np.float32)
    gate_and_up, up = wide.reshape(1, 2 * inner), wide[1:]
    query, key = projected[0][:heads].reshape(n_heads, size), projected[0][heads : heads + rows].reshape(groups, size)
    value = projected[0][heads + rows :].reshape(groups, size)
    for layer in range(len(kept)):
        ends_here = ends[layer * PRODUCTS :]
        keys, values = floats(kept[layer, 0], shape), floats(kept[layer, 1], shape)
        _norm(x[0], norms[layer, 0], eps, normed[0])
        product(memory, shares, blocks, ends_here[QUERY], ends_here[VALUE + 1], bits, normed, projected)
        _rotate(query, turn[0], turn[1])
        _rotate(key, turn[0], turn[1])
        keys[:, start + length] = key
        values[:, start + length] = value
        attention(memory, shares, projected, kept[layer, 0], kept[layer, 1], shape, start, length + 1, scale, attended)
        product(memory, shares, blocks, ends_here[OUT], ends_here[OUT + 1], bits, attended, result)
        x += result
        _norm(x[0], norms[layer, 1], eps, normed[0])
        product(memory, shares, blocks, ends_here[GATE], ends_here[UP + 1], bits, normed, gate_and_up)
        _gate(wide[0], wide[1])
        product(memory, shares, blocks, ends_here[DOWN], ends_here[DOWN + 1], bits, up, result)
        x += result


@compiled
def head(x: Any, norm: Any, eps: Any, blocks: Any, bits: Any, logits: Any, memory: Any, shares: Any) -> None:
    """`logits` [1, V] are set to the LM head's products with the norm of `x` [1, H]."""
    normed = np.empty_like(x)
    _norm(x[0], norm, eps, normed[0])
    product(memory, shares, blocks, 0, len(blocks), bits, normed, logits)

"""Fused decode: takes one token through all of a stage's Llama layers in one compiled call.

Norms, products (kernels/block_matmul.py), rotary embedding, attention (kernels/decode_attention.py) and the gated MLP
run without torch's overhead per operation. To import this module loads LLVM.
"""

from typing import Any, NamedTuple

import numba
import numpy as np
from numpy.typing import NDArray

from splitlearn.kernels.atomics import atomic_load
from splitlearn.kernels.decode_attention import ANY_ORDER, power_of_two
from splitlearn.kernels.jit import compiled
from splitlearn.kernels.thread_team import attention, floats, product

# The products of a layer in the order of their blocks.
QUERY, KEY, VALUE, OUT, GATE, UP, DOWN, PRODUCTS = range(8)
LOG2_E = np.float32(np.log2(np.e))


@numba.njit(fastmath=ANY_ORDER)  # type: ignore[untyped-decorator]
def _norm(x: Any, weight: Any, eps: Any, out: Any) -> None:
    """Set `out` [H] to x / sqrt(mean(x ** 2) + eps) * weight (RMSNorm, Zhang and Sennrich 2019, arXiv:1910.07467)."""
    total = np.float32(0)
    for value in x:
        total += value * value
    by = np.float32(1) / np.sqrt(total / np.float32(len(x)) + np.float32(eps))
    for at in range(len(x)):
        out[at] = x[at] * by * weight[at]


@numba.njit(fastmath=ANY_ORDER)  # type: ignore[untyped-decorator]
def _rotate(heads: Any, cos: Any, sin: Any) -> None:
    """Apply the rotary embedding to `heads` [n, size] in place. The halves of each head form the pairs (Su et al. 2021,
    arXiv:2104.09864, in the layout of GPT-NeoX)."""
    half = heads.shape[1] // 2
    for head in heads:
        for at in range(half):
            low, high = head[at], head[at + half]
            head[at] = low * cos[at] - high * sin[at]
            head[at + half] = high * cos[at + half] + low * sin[at + half]


@numba.njit(fastmath={"contract"}, error_model="numpy")  # type: ignore[untyped-decorator]
def _gate(gate: Any, up: Any) -> None:
    """Multiply `up` by SiLU of `gate`, in place. With numba's default error model a division may raise, and is
    not vectorised: 1536 values take 5.8 us instead of 1.3."""
    for at in range(len(gate)):
        power = power_of_two(-abs(gate[at]) * LOG2_E)
        up[at] *= gate[at] * (np.float32(1) if gate[at] >= 0 else power) / (np.float32(1) + power)


class Layers(NamedTuple):
    """The decoder layers of a stage, all of one shape."""

    blocks: NDArray[np.uint8]
    """The blocks of all products of all layers, one after the other."""
    ends: NDArray[np.int64]
    """The offset in `blocks` at which each product ends, [1 + layers * PRODUCTS]. The first entry is 0."""
    bits: int
    norms: NDArray[np.float32]
    """Weights [layers, 2, H] of the norms before attention and before the MLP."""
    eps: float
    n_heads: int
    inner: int
    """The intermediate size of the MLP."""
    scale: float
    """The scale of the products of queries and keys."""


class KVPlace(NamedTuple):
    """The place of a session's keys and values in memory."""

    addresses: NDArray[np.int64]
    """The addresses [layers, 2] of each layer's keys and values, float32 arrays of `shape`."""
    shape: tuple[int, ...]
    """(groups, capacity, head size)"""
    start: int
    """The index of the session's first token within `capacity`."""
    length: int
    """The session's tokens so far."""


@compiled
def step(x: Any, layers: Any, kv: Any, turn: Any, drops: Any, number: Any, record: Any) -> Any:
    """Take `x` [1, H], in place, through all `layers`, and append each layer's key and value to those in `kv`, a
    KVPlace. `turn` [2, size] has cos and sin. `record` is a team's (kernels/thread_team.py).

    Another thread may set the field `last` of the record `drops`, which is read before each layer. Once it reaches
    `number`, the step stops and returns False.
    """
    team, (groups, _, size), position = record[0], kv.shape, kv.start + kv.length
    heads, rows = layers.n_heads * size, groups * size
    normed, result = np.empty_like(x), np.empty_like(x)
    projected, attended = np.empty((1, heads + 2 * rows), np.float32), np.empty((1, heads), np.float32)
    wide = np.empty((2, layers.inner), np.float32)
    gate_and_up, up = wide.reshape(1, 2 * layers.inner), wide[1:]
    query, key = projected[0, :heads].reshape(-1, size), projected[0, heads : heads + rows].reshape(groups, size)
    value = projected[0, heads + rows :].reshape(groups, size)
    for layer in range(len(layers.norms)):
        if atomic_load(drops[0], "last") >= number:
            return False
        norms, addresses = layers.norms[layer], kv.addresses[layer]
        _norm(x[0], norms[0], layers.eps, normed[0])
        _products(team, layers, layer, QUERY, VALUE, normed, projected)
        _rotate(query, turn[0], turn[1])
        _rotate(key, turn[0], turn[1])
        floats(addresses[0], kv.shape)[:, position] = key
        floats(addresses[1], kv.shape)[:, position] = value
        attention(team, projected, addresses, kv.shape, kv.start, kv.length + 1, layers.scale, attended)
        _products(team, layers, layer, OUT, OUT, attended, result)
        x += result
        _norm(x[0], norms[1], layers.eps, normed[0])
        _products(team, layers, layer, GATE, UP, normed, gate_and_up)
        _gate(wide[0], wide[1])
        _products(team, layers, layer, DOWN, DOWN, up, result)
        x += result
    return True


@numba.njit  # type: ignore[untyped-decorator]
def _products(team: Any, layers: Any, layer: Any, first: Any, last: Any, x: Any, out: Any) -> None:
    """Set `out` [1, N] to the products of `x` [1, K] with the adjacent matrices `first` to `last` of a layer."""
    begin, end = layers.ends[layer * PRODUCTS + first], layers.ends[layer * PRODUCTS + last + 1]
    product(team, layers.blocks, begin, end, layers.bits, x, out)


@compiled
def head(x: Any, norm: Any, eps: Any, blocks: Any, bits: Any, logits: Any, record: Any) -> None:
    """Set `logits` [1, V] to the LM head's products with the norm of `x` [1, H]."""
    normed = np.empty_like(x)
    _norm(x[0], norm, eps, normed[0])
    product(record[0], blocks, 0, len(blocks), bits, normed, logits)

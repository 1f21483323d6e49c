"""Fused decode: takes some tokens through all of a stage's Llama layers in one compiled call.

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
def _gate(gate: Any, up: Any, out: Any) -> None:
    """Set `out` to `up` times SiLU of `gate`. With numba's default error model a division may raise, and is not
    vectorised: 1536 values take 5.8 us instead of 1.3."""
    for at in range(len(gate)):
        power = power_of_two(-abs(gate[at]) * LOG2_E)
        out[at] = up[at] * (gate[at] * (np.float32(1) if gate[at] >= 0 else power) / (np.float32(1) + power))


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
    """The places of the tokens' keys and values in memory."""

    addresses: NDArray[np.int64]
    """The addresses [layers, 2] of each layer's keys and values, float32 arrays of `shape`."""
    shape: tuple[int, ...]
    """(groups, capacity, head size)"""
    starts: NDArray[np.int64]
    """For each token, the index of its session's first one within `capacity`."""
    lengths: NDArray[np.int64]
    """The tokens of its session before it."""


@compiled
def step(x: Any, layers: Any, kv: Any, turns: Any, drops: Any, number: Any, record: Any) -> Any:
    """Take `x` [T, H] in place through all `layers`, and append each layer's keys and values to those in `kv`, a
    KVPlace. Tokens of one session are in order. `turns` [T, 2, size] have cos and sin. `record` is a team's
    (kernels/thread_team.py).

    Another thread may set the field `last` of the record `drops`, which is read before each layer. Once it reaches
    `number`, the step stops and returns False.
    """
    team, (groups, _, size), count, inner = record[0], kv.shape, len(x), layers.inner
    heads, ends = layers.n_heads * size, kv.lengths + 1
    normed, result = np.empty_like(x), np.empty_like(x)
    projected = np.empty((count, heads + 2 * groups * size), np.float32)
    attended, gated = np.empty((count, heads), np.float32), np.empty((count, inner), np.float32)
    wide = np.empty((count, 2 * inner), np.float32)
    for layer in range(len(layers.norms)):
        if atomic_load(drops[0], "last") >= number:
            return False
        norms, addresses = layers.norms[layer], kv.addresses[layer]
        for row in range(count):
            _norm(x[row], norms[0], layers.eps, normed[row])
        _products(team, layers, layer, QUERY, VALUE, normed, projected)
        for row in range(count):
            _append(projected[row, heads:], turns[row], kv, addresses, row)
            _rotate(projected[row, :heads].reshape(-1, size), turns[row, 0], turns[row, 1])
        attention(team, projected, addresses, kv.shape, kv.starts, ends, layers.scale, attended)
        _products(team, layers, layer, OUT, OUT, attended, result)
        x += result
        for row in range(count):
            _norm(x[row], norms[1], layers.eps, normed[row])
        _products(team, layers, layer, GATE, UP, normed, wide)
        for row in range(count):
            _gate(wide[row, :inner], wide[row, inner:], gated[row])
        _products(team, layers, layer, DOWN, DOWN, gated, result)
        x += result
    return True


@numba.njit  # type: ignore[untyped-decorator]
def _append(new: Any, turn: Any, kv: Any, addresses: Any, row: Any) -> None:
    """Append the key and the value of the token `row`: `new` has one after the other. The key is rotated first."""
    (groups, _, size), position = kv.shape, kv.starts[row] + kv.lengths[row]
    key, value = new[: groups * size].reshape(groups, size), new[groups * size :].reshape(groups, size)
    _rotate(key, turn[0], turn[1])
    floats(addresses[0], kv.shape)[:, position] = key
    floats(addresses[1], kv.shape)[:, position] = value


@numba.njit  # type: ignore[untyped-decorator]
def _products(team: Any, layers: Any, layer: Any, first: Any, last: Any, x: Any, out: Any) -> None:
    """Set `out` [T, N] to the products of `x` [T, K] with the adjacent matrices `first` to `last` of a layer."""
    begin, end = layers.ends[layer * PRODUCTS + first], layers.ends[layer * PRODUCTS + last + 1]
    product(team, layers.blocks, begin, end, layers.bits, x, out)


@compiled
def head(x: Any, norm: Any, eps: Any, blocks: Any, bits: Any, logits: Any, record: Any) -> None:
    """Set `logits` [T, V] to the LM head's products with the norms of `x` [T, H]."""
    normed = np.empty_like(x)
    for row in range(len(x)):
        _norm(x[row], norm, eps, normed[row])
    product(record[0], blocks, 0, len(blocks), bits, normed, logits)

"""Keys and values of one session in JAX arrays, all memory for `capacity` tokens from the start.

A step takes the arrays and returns new ones; XLA writes them in place, because the old ones are donated to it. Which
tokens a step may see follows from its position. So to truncate a cache nothing is done: what lies behind the position
is masked, and then overwritten.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import torch
from torch.utils.dlpack import from_dlpack

from splitlearn.engines.padding import power_of_two
from splitlearn.kvcache.pool import KVShape

LEAST = 64
"""The least capacity. Shapes below would each be compiled for some tokens."""
State = tuple[jax.Array, jax.Array]


@dataclass(frozen=True)
class LayerView:
    """Keys and values [1, heads, capacity, size] of one layer, as torch sees the same memory."""

    keys: torch.Tensor
    values: torch.Tensor
    is_initialized: bool = True


class JaxCache:
    """A session's cache. `states` has keys and values [1, heads, capacity, size] of each layer."""

    def __init__(self, states: list[State]) -> None:
        self.states = states

    @classmethod
    def empty(cls, shapes: Sequence[tuple[KVShape, KVShape]], max_length: int, dtype: Any) -> JaxCache:
        """A cache for `max_length` tokens. A stage without layers gets one that nothing is written to: from a cache the
        model takes the position."""
        capacity = max(LEAST, power_of_two(max_length))
        pairs = shapes or ((KVShape(1, 1), KVShape(1, 1)),)
        return cls([(_zeros(keys, capacity, dtype), _zeros(values, capacity, dtype)) for keys, values in pairs])

    @property
    def capacity(self) -> int:
        """The number of tokens that there is memory for."""
        return int(self.states[0][0].shape[2])

    @property
    def layers(self) -> list[LayerView]:
        """The memory itself, to be copied before the next step (kvcache/blocks.py)."""
        return [LayerView(from_dlpack(keys), from_dlpack(values)) for keys, values in self.states]

    def crop(self, tokens_to_remove: int) -> None:
        """There is nothing to do: a step says its position."""

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer: int) -> None:
        """Write the first tokens of a layer, before the first step."""
        own = self.layers[layer]
        own.keys.narrow(2, 0, keys.shape[2]).copy_(keys)
        own.values.narrow(2, 0, values.shape[2]).copy_(values)

    def __deepcopy__(self, memo: object) -> JaxCache:
        return JaxCache([(jnp.copy(keys), jnp.copy(values)) for keys, values in self.states])


def _zeros(shape: KVShape, capacity: int, dtype: Any) -> jax.Array:
    return jnp.zeros((1, shape.heads, capacity, shape.size), dtype)

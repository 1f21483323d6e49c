"""The kinds of KV cache for a session at a local stage. Each is made for a number of layers and a maximum length.

All but `reserved` are transformers' own. A trunk's pool (kvcache/pool.py) uses the layers of `reserved`, too.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, StaticLayer


def dynamic(layers: int, max_length: int) -> Cache:
    """A cache that copies keys and values to a longer tensor for each token."""
    return DynamicCache()


def static(layers: int, max_length: int) -> Cache:
    """A cache with memory for `max_length` tokens. Attention reads all of it, masked behind the last token, so that its
    shape never changes."""
    return Cache(layers=[_StaticLayer(max_length) for _ in range(max(1, layers))])


def reserved(layers: int, max_length: int) -> Cache:
    """A cache with memory for `max_length` tokens. Attention reads only the tokens so far."""
    return ReservedCache(layers=[ReservedLayer(max_length) for _ in range(max(1, layers))])


class _StaticLayer(StaticLayer):  # type: ignore[misc]
    """transformers' static layer, which can also be cropped: tokens behind the new length are masked, then
    overwritten."""

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last tokens. Their number is negative, as in DynamicLayer."""
        self.cumulative_length.add_(tokens_to_remove)


class StepLayer(CacheLayerMixin):  # type: ignore[misc]
    """A layer's cache for one forward. Positions and masks come from elsewhere; `update` is the subclass's."""

    is_sliding = False

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """There is nothing to do."""

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Not used."""
        return query_length, 0

    def get_seq_length(self) -> int:
        """Not used."""
        return 0

    def get_max_length(self) -> int:
        """There is no limit."""
        return -1


class ReservedLayer(CacheLayerMixin):  # type: ignore[misc]
    """Keys and values [1, heads, tokens, size] of one layer: written in place, returned as views."""

    is_sliding = False
    is_croppable = True

    def __init__(self, max_length: int) -> None:
        super().__init__()
        self.max_length, self.length = max_length, 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Reserve the memory. It takes no pages until it is written."""
        self.keys, self.values = (
            state.new_empty(*state.shape[:2], self.max_length, state.shape[3]) for state in (key_states, value_states)
        )
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: object, **__: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append the new tokens. Returns views of all keys and values."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        new = key_states.shape[-2]
        self.keys.narrow(2, self.length, new).copy_(key_states)
        self.values.narrow(2, self.length, new).copy_(value_states)
        self.length += new
        return self.keys.narrow(2, 0, self.length), self.values.narrow(2, 0, self.length)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys in the next step."""
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens in the cache."""
        return self.length

    def get_max_length(self) -> int:
        """The capacity in tokens."""
        return self.max_length

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last tokens. Their number is negative, as in DynamicLayer."""
        self.length += tokens_to_remove


class ReservedCache(Cache):  # type: ignore[misc]
    """Reserved layers, all of the same length."""

    @property
    def addresses(self) -> "KVAddresses | None":
        """The addresses of keys and values. None before there are any, or if a kernel cannot read them."""
        return self._addresses if self.layers[0].is_initialized else None

    @cached_property
    def _addresses(self) -> "KVAddresses | None":
        found = [(in_memory(layer.keys), in_memory(layer.values)) for layer in self.layers]
        parts = [part for pair in found for part in pair if part is not None]
        if len(parts) < 2 * len(found) or len({(array.shape, start) for array, start in parts}) > 1:
            return None
        (array, start), addresses = parts[0], [array.ctypes.data for array, _ in parts]
        return KVAddresses(np.array(addresses).reshape(-1, 2), array.shape, start)

    def begin_with(self, other: "ReservedCache", tokens: int) -> None:
        """Copy the first `tokens` of a cache of the same layers into this empty one."""
        for own, theirs in zip(self.layers, other.layers, strict=True):
            if not theirs.is_initialized:  # of a stage without layers
                continue
            keys, values = theirs.keys.narrow(2, 0, tokens), theirs.values.narrow(2, 0, tokens)
            own.update(keys, values)

    def grow(self, tokens: int) -> None:
        """Count `tokens` that a kernel has appended in place."""
        for layer in self.layers:
            layer.length += tokens


@dataclass(frozen=True)
class KVAddresses:
    """The addresses [layers, 2] of keys and values. Each is a float32 array [groups, capacity, size], in which the
    session begins at `start`."""

    layers: NDArray[np.int64]
    shape: tuple[int, ...]
    start: int


def in_memory(state: torch.Tensor) -> tuple[NDArray[Any], int] | None:
    """The array [groups, capacity, size] of which keys or values [1, groups, tokens, size] are a part, and the token at
    which they begin. None for another layout, another dtype than float32, or another device than the CPU."""
    (batch, groups, _, size), (_, step, row, one) = state.shape, state.stride()
    readable = state.device.type == "cpu" and state.dtype == torch.float32
    if not readable or batch != 1 or (row, one) != (size, 1) or step % size:
        return None
    offset = state.storage_offset()
    start = offset % step // size
    return state.as_strided((groups, step // size, size), (step, size, 1), offset - start * size).numpy(), start

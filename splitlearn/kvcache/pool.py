"""A pool of preallocated KV-cache blocks. Each session gets one contiguous slot of them.

    pool = KVPool(shapes_of(cut, x), n_blocks, block_tokens, dtype, device)
    slot = pool.reserve(max_length)      # None if there is no room
    cache = pool.cache(slot)             # a transformers cache for one session, within its slot
    pool.release(slot)

A session states its maximum length when it opens, and gets that much memory. So nothing is moved, swapped or recomputed
later. Its keys and values are views of one tensor, which any attention function can use. Reserved memory takes no pages
until it is written.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from typing import Any

import torch
from numpy.typing import NDArray
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from splitlearn.errors import FamilyRefused
from splitlearn.kvcache.layers import ReservedCache, ReservedLayer
from splitlearn.models.cut import CutModel, eagerly, forward


@dataclass(frozen=True)
class KVShape:
    """Heads and head size of a layer's keys, or of its values."""

    heads: int
    size: int


@dataclass(frozen=True)
class Slot:
    """Contiguous blocks of a pool: the tokens `[start, start + tokens)`."""

    start: int
    tokens: int


class KVPool:
    """Keys and values of `capacity` tokens for every layer, `nbytes` in `n_blocks` blocks of `block_tokens` tokens.

    With `new_cache` the blocks are only counted: it makes each session's cache for a number of tokens, with memory of
    its own. For engines whose caches are not torch's, or not part of one tensor.
    """

    def __init__(
        self,
        shapes: Sequence[tuple[KVShape, KVShape]],
        n_blocks: int,
        block_tokens: int,
        dtype: torch.dtype,
        device: torch.device,
        new_cache: Callable[[int], Cache] | None = None,
    ) -> None:
        flat = [shape for pair in shapes for shape in pair] if new_cache is None else []
        self.n_blocks, self.block_tokens = n_blocks, block_tokens
        self.capacity = n_blocks * block_tokens
        self.nbytes = bytes_per_token(shapes, dtype) * self.capacity
        self._new_cache = new_cache
        self._free = [Slot(0, self.capacity)]
        # One tensor [n, 1, heads, capacity, size] for all layers of one shape: two calls make all views of a session.
        self._stacks = {
            shape: torch.empty(flat.count(shape), 1, shape.heads, self.capacity, shape.size, dtype=dtype, device=device)
            for shape in dict.fromkeys(flat)
        }
        numbers = {shape: count() for shape in self._stacks}
        self._places = [(shape, next(numbers[shape])) for shape in flat]

    @property
    def blocks_used(self) -> int:
        """The number of reserved blocks."""
        return self.n_blocks - sum(slot.tokens for slot in tuple(self._free)) // self.block_tokens

    def fits(self, tokens: int, start: int = 0) -> bool:
        """Whether some contiguous free blocks from token `start` on, a block's first, hold `tokens`."""
        return any(_behind(start, free).tokens >= tokens for free in self._free)

    def reserve(self, tokens: int, start: int = 0) -> Slot | None:
        """Reserve the first contiguous free blocks from token `start` on that hold `tokens`. None if there are none."""
        needed = -(-tokens // self.block_tokens) * self.block_tokens
        for index, free in enumerate(self._free):
            usable = _behind(start, free)
            if usable.tokens >= needed:
                before = Slot(free.start, usable.start - free.start)
                rest = Slot(usable.start + needed, usable.tokens - needed)
                self._free[index : index + 1] = [each for each in (before, rest) if each.tokens]
                return Slot(usable.start, needed)
        return None

    def release(self, slot: Slot) -> None:
        """Free `slot`, and merge it with its free neighbours."""
        merged: list[Slot] = []
        for free in sorted([*self._free, slot], key=lambda each: each.start):
            if merged and merged[-1].start + merged[-1].tokens == free.start:
                merged[-1] = Slot(merged[-1].start, merged[-1].tokens + free.tokens)
            else:
                merged.append(free)
        self._free = merged

    def views(self, start: int, tokens: int) -> list[torch.Tensor]:
        """Keys and values [1, heads, tokens, size]: keys of layer 0, values of layer 0, keys of layer 1, and so on."""
        cut = {shape: stack.narrow(3, start, tokens).unbind(0) for shape, stack in self._stacks.items()}
        return [cut[shape][index] for shape, index in self._places]

    @cached_property
    def arrays(self) -> list[NDArray[Any]]:
        """The whole pool as numpy arrays [heads, capacity, size], in the order of `views`.

        bfloat16 is given as uint16 of the same bits. Empty if numpy cannot read the pool: another device or dtype.
        """
        whole = [view[0] for view in self.views(0, self.capacity)]
        if whole[0].device.type != "cpu" or whole[0].dtype not in (torch.float32, torch.bfloat16):
            return []
        return [(view.view(torch.uint16) if view.dtype == torch.bfloat16 else view).numpy() for view in whole]

    def cache(self, slot: Slot) -> Cache:
        """An empty cache within `slot`."""
        return PooledCache(self, slot) if self._new_cache is None else self._new_cache(slot.tokens)


class StandingPool:
    """Keeps a pool for later sessions, which then have the same addresses as earlier ones.

    `make` makes a pool from a number of blocks and the tokens of each. Sessions get whole blocks.
    """

    def __init__(self, make: Callable[[int, int], KVPool], block_tokens: int) -> None:
        self._make, self._block_tokens = make, block_tokens
        self._pool: KVPool | None = None

    def with_room(self, max_length: int, count: int) -> KVPool:
        """A pool with room for `count` sessions side by side: the current one, or a new one of up to twice the size."""
        needed = count * -(-max_length // self._block_tokens) * self._block_tokens
        if self._pool is None or not self._pool.fits(needed):
            self._pool = self._make((1 << (needed - 1).bit_length()) // self._block_tokens, self._block_tokens)
        return self._pool


class _PooledLayer(ReservedLayer):
    """A layer whose memory is a slot of the pool."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        super().__init__(keys.shape[2])
        self.keys, self.values = keys, values
        self.is_initialized = True


class PooledCache(ReservedCache):
    """One session's cache within its slot of a pool."""

    def __init__(self, pool: KVPool, slot: Slot) -> None:
        flat = pool.views(slot.start, slot.tokens)
        super().__init__(layers=[_PooledLayer(*flat[at : at + 2]) for at in range(0, len(flat), 2)])
        self.pool = pool
        self.slot = slot


def _behind(start: int, slot: Slot) -> Slot:
    """What of `slot` is from token `start` on."""
    skipped = min(slot.tokens, max(0, start - slot.start))
    return Slot(slot.start + skipped, slot.tokens - skipped)


def shapes_of(cut: CutModel, x: torch.Tensor) -> list[tuple[KVShape, KVShape]]:
    """The shapes of each layer's keys and values, found by a step of one token. `x` is a token id [1, 1] for a first
    stage, otherwise a hidden state [1, 1, H].

    Raises FamilyRefused for layers that keep something else, such as a recurrent state.
    """
    cache = DynamicCache()
    with torch.inference_mode(), eagerly(cut):
        forward(cut, x, 0, cache)
    layers = cache.layers
    if len(layers) != cut.end - cut.start or not all(
        type(layer) is DynamicLayer and layer.keys is not None for layer in layers
    ):
        raise FamilyRefused(f"the layers of {type(cut.module).__name__} keep something else than keys and values")
    return [(_shape(layer.keys), _shape(layer.values)) for layer in layers]


def bytes_per_token(shapes: Sequence[tuple[KVShape, KVShape]], dtype: torch.dtype) -> int:
    """Bytes of one token in a pool of these shapes."""
    return sum(shape.heads * shape.size for pair in shapes for shape in pair) * dtype.itemsize


def _shape(state: torch.Tensor) -> KVShape:
    return KVShape(state.shape[1], state.shape[3])

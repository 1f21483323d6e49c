"""Kept prefixes: what sessions have computed, in blocks by content, each tier within a budget of bytes.

    store = PrefixStore([Memory("memory", max_bytes)])
    blocks = store.find(keys)                    # the leading ones that are here
    first = store.first_missing(keys)
    store.put(keys, first, blocks)               # those from `first` on

A block has the state of BLOCK_TOKENS tokens. Its key stands for these tokens and for all before them, as in vLLM's
prefix cache, so a block is usable only together with all blocks before it. The least recently used blocks go first, of
one sequence the last ones: a block is not here without those before it. What goes from one tier goes to the next.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Protocol

import torch

BLOCK_TOKENS = 16
BlockPart = tuple[torch.Tensor, ...]
"""What one session keeps of a block's tokens."""
Block = tuple[BlockPart, ...]
"""What the sessions of a chain keep of the same tokens, in the order of the chain."""
Reader = Callable[[], Block | None]


@dataclass
class Counts:
    """Of one tier: tokens that were found there, blocks that went from it, and bytes that were copied in and out."""

    hits: int = 0
    evictions: int = 0
    bytes_in: int = 0
    bytes_out: int = 0


class Tier(Protocol):
    """Blocks of at most `max_bytes`, of which `nbytes` are in use."""

    name: str
    max_bytes: int
    nbytes: int
    counts: Counts

    def __contains__(self, key: bytes) -> bool: ...

    def touch(self, key: bytes) -> None:
        """Make the block of `key` the last to go."""

    def oldest(self) -> bytes | None:
        """The key of the block that goes first."""

    def reader(self, key: bytes) -> Reader:
        """What reads the block of `key`, without the store's lock, and gives None if it is damaged or has gone."""

    def add(self, key: bytes, block: Block) -> None:
        """Keep a block, which fits, as the last to go."""

    def remove(self, key: bytes) -> Block | None:
        """Let the block of `key` go, and return it where it is at hand."""


class Memory:
    """A tier in memory: blocks stay on the device where they were computed, or come to `device`."""

    def __init__(self, name: str, max_bytes: int, device: torch.device | None = None) -> None:
        self.name, self.max_bytes, self.nbytes, self.counts = name, max_bytes, 0, Counts()
        self._device = device
        self._blocks: OrderedDict[bytes, Block] = OrderedDict()

    def __contains__(self, key: bytes) -> bool:
        return key in self._blocks

    def touch(self, key: bytes) -> None:
        self._blocks.move_to_end(key)

    def oldest(self) -> bytes | None:
        return next(iter(self._blocks), None)

    def reader(self, key: bytes) -> Reader:
        block = self._blocks[key]
        return lambda: block

    def add(self, key: bytes, block: Block) -> None:
        here = tuple(tuple(tensor.to(self._device or tensor.device) for tensor in part) for part in block)
        self._blocks[key] = here
        self.nbytes += nbytes(here)

    def remove(self, key: bytes) -> Block | None:
        block = self._blocks.pop(key)
        self.nbytes -= nbytes(block)
        return block


class PrefixStore:
    """Blocks in `tiers`, the fastest first. `misses` counts tokens that no tier had. Any thread may use it."""

    def __init__(self, tiers: Sequence[Tier]) -> None:
        self.tiers = [tier for tier in tiers if tier.max_bytes]
        self.misses = 0
        self._lock = threading.Lock()

    def __contains__(self, key: bytes) -> bool:
        return self._tier_of(key) is not None

    @property
    def hits(self) -> int:
        """Tokens that were found."""
        return sum(tier.counts.hits for tier in self.tiers)

    def find(self, keys: Sequence[bytes]) -> list[Block]:
        """The blocks of `keys` up to the first that is missing. They stay valid when they are evicted."""
        with self._lock:
            tiers = list(takewhile(lambda tier: tier is not None, map(self._tier_of, keys)))
            places = [(tier, key, tier.reader(key)) for tier, key in zip(tiers, keys, strict=False) if tier is not None]
        found = list(takewhile(lambda block: block is not None, (read() for *_, read in places)))
        blocks = [block for block in found if block is not None]
        with self._lock:
            for (tier, _, _), block in zip(places, blocks, strict=False):
                tier.counts.hits += BLOCK_TOKENS
                tier.counts.bytes_out += nbytes(block)
            for tier, key, _ in places[len(blocks) : len(blocks) + 1]:  # is damaged
                if key in tier:
                    tier.remove(key)
            self._touch_locked(keys[: len(blocks)])
            self.misses += (len(keys) - len(blocks)) * BLOCK_TOKENS
        return blocks

    def unused_bytes(self, name: str) -> int:
        """What the tier of this name may still come to take; 0 for none."""
        return sum(tier.max_bytes - tier.nbytes for tier in self.tiers if tier.name == name)

    def first_missing(self, keys: Sequence[bytes]) -> int:
        """The index of the first key whose block is not in the first tier; the number of keys if all are."""
        with self._lock:
            return self._count_locked(keys)

    def put(self, keys: Sequence[bytes], first: int, blocks: Sequence[Block]) -> None:
        """Keep `blocks`, those of `keys[first:]`, as far as they fit. None if one before them has gone meanwhile."""
        with self._lock:
            here = self._count_locked(keys)
            self._touch_locked(keys[:here])  # so that nothing of this sequence is evicted for its end
            end = first + len(blocks) if here >= first else here
            for at in range(max(here, first), end):
                if not self._place_locked(keys[at], blocks[at - first], set(keys[:at])):
                    break
                here = at + 1
            self._touch_locked(keys[:here])

    def _tier_of(self, key: bytes) -> Tier | None:
        return next((tier for tier in self.tiers if key in tier), None)

    def _count_locked(self, keys: Sequence[bytes]) -> int:
        first = self.tiers[0] if self.tiers else ()
        return next((at for at, key in enumerate(keys) if key not in first), len(keys))

    def _touch_locked(self, keys: Sequence[bytes]) -> None:
        """Make `keys` the last to go, and of them the first ones the very last."""
        for key in reversed(keys):
            for tier in self.tiers:
                if key in tier:
                    tier.touch(key)

    def _place_locked(self, key: bytes, block: Block, needed: Collection[bytes], below: int = 0) -> bool:
        """Put a block into the first tier from `below` on that has room without letting go of `needed` ones."""
        for number in range(below, len(self.tiers)):
            tier = self.tiers[number]
            if key in tier:
                tier.touch(key)
                return True
            if self._make_room_locked(number, nbytes(block), needed):
                tier.add(key, block)
                tier.counts.bytes_in += nbytes(block)
                return True
        return False

    def _make_room_locked(self, number: int, size: int, needed: Collection[bytes]) -> bool:
        """Move the least recently used blocks of a tier to the next ones until `size` bytes are free. False if only
        `needed` ones are left."""
        tier = self.tiers[number]
        if size > tier.max_bytes:
            return False
        while tier.nbytes + size > tier.max_bytes:
            key = tier.oldest()
            if key is None or key in needed:
                return False
            tier.counts.evictions += 1
            last = number + 1 == len(self.tiers)
            block = tier.remove(key)
            if not last and block is not None:
                self._place_locked(key, block, (), number + 1)
        return True


def nbytes(block: Block) -> int:
    """The size of a block in bytes."""
    return sum(tensor.nbytes for part in block for tensor in part)

"""A session of a stage in this process: its cache, its settings, and the function that decodes its tokens."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from splitlearn.errors import InputError
from splitlearn.kvcache import blocks
from splitlearn.kvcache.layers import ReservedCache
from splitlearn.kvcache.prefix_store import BLOCK_TOKENS, BlockPart
from splitlearn.runtime.torch_threads import computing_on
from splitlearn.stages.base import StageInput
from splitlearn.stages.settings import SessionSettings

CPU = torch.device("cpu")


@dataclass
class LocalSession:
    """A session's cache and settings. `length` counts the tokens in the cache.

    `token` decodes one token. `shares`: its steps can share a forward with those of other sessions in its pool.
    `release` returns the cache's memory to a pool that keeps it for later sessions. `device` has the cache.
    """

    cache: Cache | None
    settings: SessionSettings
    max_length: int
    token: Callable[[StageInput], Tensor]
    length: int = 0
    shares: bool = False
    release: Callable[[], None] | None = None
    device: torch.device = CPU

    def fork(self, other: "LocalSession", tokens: int) -> None:
        """Copy the first `tokens` of the other session's cache."""
        with self.settings.gradient_guard(), computing_on(1):
            if isinstance(self.cache, ReservedCache) and isinstance(other.cache, ReservedCache):
                self.cache.begin_with(other.cache, tokens)
                self.length = tokens
            else:
                self.cache, self.length = copy.deepcopy(other.cache), other.length
                self.make_room(tokens, 0)

    @property
    def most_blocks(self) -> int:
        return self.max_length // BLOCK_TOKENS

    def write_blocks(self, parts: Sequence[BlockPart]) -> None:
        """Fill the cache, which is empty, with the first blocks of a sequence."""
        if self.cache is not None:
            with self.settings.gradient_guard(), computing_on(1):
                blocks.write(self.cache, parts, self.device)
            self.length = len(parts) * BLOCK_TOKENS

    def keep_blocks(self, keys: Sequence[bytes], first: int) -> list[BlockPart]:
        """Copies of what the cache has of its blocks from `first` on, up to as many as there are `keys`."""
        if self.cache is None:
            return []
        with self.settings.gradient_guard(), computing_on(1):
            return blocks.read(self.cache, first, len(keys) - first)

    def close(self) -> None:
        if self.release is not None:
            self.release()
        self.cache, self.length, self.max_length, self.release = None, 0, 0, None

    def make_room(self, position: int, tokens: int) -> None:
        """Truncate the cache to `position`. Raises InputError for a gap, a missing prefix, or a step that does not
        fit."""
        cached = 0 if self.cache is None else self.length
        if not 0 <= position <= cached:
            raise InputError("position", position, f"a whole number from 0 to {cached}, the cached length")
        if position + tokens > self.max_length:
            limit = f"at most {self.max_length} tokens in all, the session's max_length"
            raise InputError("position", position, limit)
        if self.cache is not None and position < self.length:
            self.cache.crop(position - self.length)
            self.length = position  # the engine may retry this step alone: do not crop twice

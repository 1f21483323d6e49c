"""A session of a stage in this process: its cache, its flags, and what computes its tokens."""

import copy
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor
from transformers.cache_utils import Cache

from splitlearn.errors import InputError
from splitlearn.kvcache.layers import ReservedCache
from splitlearn.runtime.torch_threads import computing_on
from splitlearn.stages.base import StageInput
from splitlearn.stages.settings import SessionSettings


@dataclass
class LocalSession:
    """A session's cache and what its flags ask of each step. `length` counts the tokens that the cache holds.

    `token` computes one token after others. `shares` says whether its steps can share a forward with those of others in
    its pool. `release` gives the cache's memory back, where a pool keeps it for later sessions.
    """

    cache: Cache | None
    settings: SessionSettings
    max_length: int
    token: Callable[[StageInput], Tensor]
    length: int = 0
    shares: bool = False
    release: Callable[[], None] | None = None

    def fork(self, other: "LocalSession", tokens: int) -> None:
        """Copy the first `tokens` of the other session's cache."""
        with self.settings.gradient_guard(), computing_on(1):
            if isinstance(self.cache, ReservedCache) and isinstance(other.cache, ReservedCache):
                self.cache.begin_with(other.cache, tokens)
                self.length = tokens
            else:
                self.cache, self.length = copy.deepcopy(other.cache), other.length
                self.make_room(tokens, 0)

    def close(self) -> None:
        if self.release is not None:
            self.release()
        self.cache, self.length, self.max_length, self.release = None, 0, 0, None

    def make_room(self, position: int, tokens: int) -> None:
        """Truncate the cache to `position`. Raises InputError for a gap, a missing prefix, or a step that does not
        fit."""
        kept = 0 if self.cache is None else self.length
        if not 0 <= position <= kept:
            raise InputError("position", position, f"a whole number from 0 to {kept}, the cached length")
        if position + tokens > self.max_length:
            most = f"at most {self.max_length} tokens in all, as the session was opened"
            raise InputError("position", position, most)
        if self.cache is not None and position < self.length:
            self.cache.crop(position - self.length)
            self.length = position  # the server may retry this step by itself: do not crop twice

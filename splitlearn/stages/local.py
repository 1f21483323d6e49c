"""A stage that computes in this process: opens sessions, chooses their engine, and computes their steps.

Steps of several sessions share a forward where their caches lie in one pool (stages/ragged_batch.py).
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial

import torch
from transformers.cache_utils import Cache

from splitlearn.errors import FamilyRefused, InputError
from splitlearn.kvcache.layers import reserved, static
from splitlearn.kvcache.pool import KVPool, KVShape, StandingPool
from splitlearn.models.cut import CutModel, body_of
from splitlearn.models.structure import rope_restart
from splitlearn.stages import nonfinite
from splitlearn.stages.base import StageInput, StageOutput, timed
from splitlearn.stages.engine import StageEngine, TokenEngine
from splitlearn.stages.equivalence import SHARED_FORWARD, STATIC_CACHE
from splitlearn.stages.ragged_batch import RaggedStage
from splitlearn.stages.session import LocalSession
from splitlearn.stages.settings import SessionSettings

# On an H200, 8 tokens of SmolLM2's trunk took 22 ms as replays one after the other. They took 25 ms in one forward that
# is launched kernel by kernel. 12 tokens took 32 and 31 ms (docs/results/gpu.md).
MAX_REPLAYS = 8
# An engine of tokens attends token by token, torch to a chunk of a prompt at once. Up to so many queries times keys the
# engine is faster: 4 tokens beside 64 of a prompt, after 64 others (8,192), take 92 ms of both cores, and 227 by torch.
MOST_BY_TOKENS = 8192


@dataclass(frozen=True)
class LocalStage:
    """A cut model on a device of this process. `label` names its time in the time breakdown.

    `eager` computes all steps, `faster` decodes single tokens in the sessions that suit it. `allows` says what else was
    shown exact for the architecture, whatever the sessions' lengths (stages/equivalence/together.py).
    """

    eager: StageEngine
    label: str
    dtype: torch.dtype
    hidden_size: int
    faster: TokenEngine | None = None
    allows: Callable[[], frozenset[str]] = frozenset
    _tried: dict[frozenset[str], bool] = field(init=False, default_factory=dict, compare=False)

    @property
    def cut(self) -> CutModel:
        return self.eager.cut

    @property
    def device(self) -> torch.device:
        return self.eager.device

    @property
    def _window(self) -> int:
        return 0 if self.faster is None else self.faster.window

    def size(self, item: StageInput) -> int:
        """How many tokens a forward has to compute for `item`."""
        return item.x.shape[1]

    def computes_on_caller(self, item: StageInput) -> bool:
        """Whether the calling thread alone computes `item`."""
        return item.x.shape[1] == 1 and self.eager.token_threads == 1

    def block_tokens(self, least: int) -> int:
        """Tokens of a block of KV memory, at least `least`. A multiple of the engine's window, so that sessions of
        similar length share windows."""
        window = self._window or 1
        return -(-least // window) * window

    def session(
        self,
        cache: Cache | None,
        settings: SessionSettings,
        max_length: int,
        *,
        shares: bool = False,
        release: Callable[[], None] | None = None,
    ) -> LocalSession:
        """A session with this cache. The fastest engine that suits it decodes its tokens."""
        faster = None if settings.forward_arguments else self.faster
        token = faster.token if faster is not None and isinstance(cache, faster.caches) else self.eager.compute
        return LocalSession(cache, settings, max_length, token, shares=shares, release=release, device=self.device)

    def open(self, settings: SessionSettings, max_length: int) -> LocalSession:
        """Open a session. It gets a cache only if the settings keep one. Raises InputError for a kind of cache with
        which the layers would give other outputs."""
        return self.open_together(settings, max_length, 1)[0]

    def open_together(self, settings: SessionSettings, max_length: int, count: int) -> list[LocalSession]:
        """Open sessions whose steps can share a forward, if the settings reserve the cache and the layers permit it."""
        new_cache, layers = settings.new_cache, self.cut.end - self.cut.start
        if new_cache is not None and self.eager.new_cache is not None:
            return [self.session(self.eager.new_cache(max_length), settings, max_length) for _ in range(count)]
        if new_cache is static and STATIC_CACHE not in self.allows():
            raise InputError("cache", "static", "dynamic or reserved for this model: it counts masked keys, too")
        shares = count > 1 and new_cache is reserved and self.packs(settings)
        if self._window and new_cache is reserved and self._pools():  # a later session should reuse this one's memory
            pool = self._standing.with_room(max_length, count)
        elif shares:
            pool = self.pool(count, max_length)
        else:
            caches = [None if new_cache is None else new_cache(layers, max_length) for _ in range(count)]
            return [self.session(cache, settings, max_length) for cache in caches]
        sessions = []
        for _ in range(count):
            run = pool.reserve(max_length)
            if run is None:
                raise ValueError(f"no room for {count} sessions of {max_length} tokens")
            release = partial(pool.release, run)
            sessions.append(self.session(pool.cache(run), settings, max_length, shares=shares, release=release))
        return sessions

    def packs(self, settings: SessionSettings) -> bool:
        """Whether sessions with these settings can share a forward. Tried once, and remembered.

        The trial runs these layers with a few tokens. That of the architecture has lengths on either side of each
        boundary (stages/equivalence/together.py).
        """
        words = settings.words
        if self.eager.new_cache is not None:
            return False
        if words not in self._tried:
            self._tried[words] = self._pools() and self._ragged.agrees(settings) and SHARED_FORWARD in self.allows()
        return self._tried[words]

    def _pools(self) -> bool:
        """Whether this stage has layers that keep keys and values, so that a pool can hold them."""
        try:
            return bool(self.kv_shapes)
        except FamilyRefused:
            return False

    def pool(self, n_blocks: int, block_tokens: int) -> KVPool:
        """A pool of KV memory for this stage's layers. Raises FamilyRefused if they keep something else."""
        return KVPool(self.kv_shapes, n_blocks, block_tokens, self.dtype, self.device, self.eager.new_cache)

    @cached_property
    def kv_shapes(self) -> Sequence[tuple[KVShape, KVShape]]:
        """What each layer keeps of a token. Raises FamilyRefused if that is not keys and values."""
        return self.eager.kv_shapes()

    @cached_property
    def rope_restart(self) -> int | None:
        """The length beyond which the whole sequence is computed again (models/structure.py)."""
        return rope_restart(body_of(self.cut).config)

    @cached_property
    def _ragged(self) -> RaggedStage:
        return RaggedStage(self.cut)

    @cached_property
    def _standing(self) -> StandingPool:
        return StandingPool(self.pool, self._window)

    def step(self, batch: Sequence[StageInput]) -> list[StageOutput]:
        """Compute one step of each session, in one forward if they can share it; their flags must then be the same.

        Raises InputError for a position beyond the cached length or for too many tokens, NotFinite for NaN or Inf.
        """
        outputs = self.compute(batch)
        for item, output in zip(batch, outputs, strict=True):
            self.check(item, output)
        return outputs

    def check(self, item: StageInput, output: StageOutput) -> None:
        """Raise NotFinite if the output for `item` holds NaN or Inf. The error names the layer where that began."""
        again = partial(self._step, replace(item, mark=None), self.eager.compute)
        nonfinite.check(self.cut, self.dtype, item, output.x, again)

    def compute(self, batch: Sequence[StageInput]) -> list[StageOutput]:
        """`step` without the check of the outputs."""
        if len(batch) > 1 and all(item.session.shares for item in batch) and not self._replays(batch):
            return self._together(batch, self._forward_of(batch))
        return [self._step(item, item.session.token if item.decodes else self.eager.compute) for item in batch]

    def _replays(self, batch: Sequence[StageInput]) -> bool:
        """Whether the steps can be replayed and are few: then replays in turn are faster than one forward."""
        few = bool(self._window) and len(batch) <= MAX_REPLAYS
        return few and all(item.x.shape[1] == 1 for item in batch)

    def _compile_s(self) -> float:
        return self.eager.compile_s + (0.0 if self.faster is None else self.faster.compile_s)

    def _step(self, item: StageInput, compute: Callable[[StageInput], torch.Tensor]) -> StageOutput:
        return self._together([item], lambda steps: [compute(item)])[0]

    def _together(
        self, batch: Sequence[StageInput], forward: Callable[[Sequence[StageInput]], Sequence[torch.Tensor]]
    ) -> list[StageOutput]:
        """Compute the batch in one forward."""
        started, compiled = time.perf_counter(), self._compile_s()
        for item in batch:
            item.session.make_room(item.position, item.x.shape[1])
        with batch[0].session.settings.gradient_guard():
            out = forward(batch)
        for item in batch:
            item.session.length = item.position + item.x.shape[1]
        return timed(self.label, out, started, self._compile_s() - compiled)

    def _forward_of(self, batch: Sequence[StageInput]) -> Callable[[Sequence[StageInput]], Sequence[torch.Tensor]]:
        """The fastest forward for a batch that shares one."""
        faster = self.faster
        if faster is None or faster.together is None:
            return self._ragged.forward
        prompts = sum(item.x.shape[1] * (item.position + item.x.shape[1]) for item in batch if item.x.shape[1] > 1)
        fused = prompts <= MOST_BY_TOKENS and all(item.session.token == faster.token for item in batch)
        return faster.together if fused else self._ragged.forward

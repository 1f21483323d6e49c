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
from splitlearn.kvcache.pool import KVPool, KVShape, StandingPool, shapes_of
from splitlearn.models.cut import CutModel, body_of, example
from splitlearn.models.structure import rope_restart
from splitlearn.stages import nonfinite
from splitlearn.stages.base import StageInput, StageOutput, timed
from splitlearn.stages.engine import Eager, TokenEngine
from splitlearn.stages.equivalence import SHARED_FORWARD, STATIC_CACHE
from splitlearn.stages.ragged_batch import RaggedStage
from splitlearn.stages.session import LocalSession
from splitlearn.stages.settings import SessionSettings

# On an H200 8 replays of SmolLM2's trunk took 22 ms one after the other, and 25 in one forward that is launched kernel
# by kernel; 12 of them 32 and 31 (docs/results/gpu.md).
MOST_REPLAYED = 8


@dataclass(frozen=True)
class LocalStage:
    """A cut model on a device of this process. `word` is the time breakdown's name for its time.

    `faster` computes one token after others in the sessions that suit it. `allows` says what else the architecture was
    found to do exactly with sessions of any lengths (stages/equivalence/together.py).
    """

    eager: Eager
    word: str
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

    def computes_on_caller(self, tokens: int) -> bool:
        """Whether a step of so many tokens is computed by the calling thread alone."""
        return tokens <= 1 and self.eager.token_threads == 1

    def block_tokens(self, least: int) -> int:
        """Tokens of a block of KV memory, at least `least`: sessions of like lengths should have like windows, where an
        engine is bound to windows of their memory."""
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
        """A session with this cache, whose tokens the fastest engine computes that it suits."""
        faster = None if settings.forward_arguments else self.faster
        token = faster.token if faster is not None and isinstance(cache, faster.caches) else self.eager.compute
        return LocalSession(cache, settings, max_length, token, shares=shares, release=release)

    def open(self, settings: SessionSettings, max_length: int) -> LocalSession:
        """A new session; a cache is made only when the settings keep one. Raises InputError for a kind of cache over
        which the layers would answer otherwise."""
        return self.open_together(settings, max_length, 1)[0]

    def open_together(self, settings: SessionSettings, max_length: int, count: int) -> list[LocalSession]:
        """Sessions whose steps can be one forward, where the settings reserve the cache and the layers permit it."""
        new_cache, layers = settings.new_cache, self.cut.end - self.cut.start
        if new_cache is static and STATIC_CACHE not in self.allows():
            raise InputError("cache", "static", "dynamic or reserved for this model: it counts masked keys, too")
        shares = count > 1 and new_cache is reserved and self.packs(settings)
        if self._window and new_cache is reserved and self._pools():  # a later session should lie where this one does
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
        """Whether sessions with these settings can share a forward: tried once.

        These very layers with a few tokens, and their architecture with lengths on either side of each boundary.
        """
        words = settings.words
        if words not in self._tried:
            self._tried[words] = self._pools() and self._ragged.agrees(settings) and SHARED_FORWARD in self.allows()
        return self._tried[words]

    def _pools(self) -> bool:
        """Whether there are layers here, and they keep what can lie in a pool."""
        try:
            return bool(self.kv_shapes)
        except FamilyRefused:
            return False

    def pool(self, n_blocks: int, block_tokens: int) -> KVPool:
        """KV memory for this stage's layers. Raises FamilyRefused where they keep something else."""
        return KVPool(self.kv_shapes, n_blocks, block_tokens, self.dtype, self.device)

    @cached_property
    def kv_shapes(self) -> list[tuple[KVShape, KVShape]]:
        """What each layer keeps of a token. Raises FamilyRefused where that is not keys and values."""
        return shapes_of(self.cut, example(self.cut, 1))

    @cached_property
    def rope_restart(self) -> int | None:
        """The length past which the model's whole sequence is computed anew (models/structure.py)."""
        return rope_restart(body_of(self.cut).config)

    @cached_property
    def _ragged(self) -> RaggedStage:
        return RaggedStage(self.cut)

    @cached_property
    def _standing(self) -> StandingPool:
        return StandingPool(self.pool, self._window)

    def step(self, batch: Sequence[StageInput]) -> list[StageOutput]:
        """One step of each session; of several in one forward where they can share it, for which their flags are the
        same. Raises InputError for a position beyond the cached length or too many tokens, NotFinite for what is no
        number."""
        outputs = self.compute(batch)
        for item, output in zip(batch, outputs, strict=True):
            self.check(item, output)
        return outputs

    def check(self, item: StageInput, output: StageOutput) -> None:
        """Raise NotFinite that names the layer where it began if `output`, of `item`, holds NaN or Inf."""
        again = partial(self._step, replace(item, mark=None), self.eager.compute)
        nonfinite.check(self.cut, self.dtype, item, output.x, again)

    def compute(self, batch: Sequence[StageInput]) -> list[StageOutput]:
        """`step` without the check of what comes out."""
        if len(batch) > 1 and all(item.session.shares for item in batch) and not self._replays(batch):
            return self._together(batch)
        return [self._step(item, item.session.token if item.decodes else self.eager.compute) for item in batch]

    def _replays(self, batch: Sequence[StageInput]) -> bool:
        """Whether the steps are replays, and so few that they take less one after the other than in a forward."""
        few = bool(self._window) and len(batch) <= MOST_REPLAYED
        return few and all(item.x.shape[1] == 1 for item in batch)

    def _compile_s(self) -> float:
        return self.eager.compile_s + (0.0 if self.faster is None else self.faster.compile_s)

    def _step(self, item: StageInput, compute: Callable[[StageInput], torch.Tensor]) -> StageOutput:
        session, started, compiled = item.session, time.perf_counter(), self._compile_s()
        session.make_room(item.position, item.x.shape[1])
        with session.settings.gradient_guard():
            out = compute(item)
        session.length = item.position + item.x.shape[1]
        return timed(self.word, [out], started, self._compile_s() - compiled)[0]

    def _together(self, batch: Sequence[StageInput]) -> list[StageOutput]:
        """One forward. Compiled stages have none: see RaggedStage."""
        started = time.perf_counter()
        for item in batch:
            item.session.make_room(item.position, item.x.shape[1])
        with batch[0].session.settings.gradient_guard():
            out = self._ragged.forward(batch)
        for item in batch:
            item.session.length = item.position + item.x.shape[1]
        return timed(self.word, out, started)

"""A stage that computes in this process: a cut model, its sessions' caches, and how a step is taken.

One token can be taken through all of a stage in one call, by what a flag has put there (`Row`); steps of several
sessions can share a forward, where their caches lie in one pool (stages/ragged_batch.py).
"""

import copy
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import chain, repeat

import torch
from transformers.cache_utils import Cache

from splitlearn.errors import FamilyRefused, InputError, NotFinite
from splitlearn.events import StageTiming
from splitlearn.kvcache.layers import ReservedCache, reserved, static
from splitlearn.kvcache.pool import KVPool, KVShape, shapes_of
from splitlearn.models.cut import CutModel, body_of, example, forward
from splitlearn.models.structure import rope_restart
from splitlearn.runtime import private_apis
from splitlearn.runtime.torch_threads import computing_on, computing_one_token
from splitlearn.stages import nonfinite
from splitlearn.stages.base import StageInput, StageOutput
from splitlearn.stages.cuda_graph import LEAST_WINDOW
from splitlearn.stages.equivalence import SHARED_FORWARD, STATIC_CACHE
from splitlearn.stages.fused_decode import Row
from splitlearn.stages.ragged_batch import RaggedStage
from splitlearn.stages.settings import SessionSettings
from splitlearn.stages.verify import SessionStep

# On an H200 8 recorded steps of SmolLM2's trunk took 22 ms one after the other, in one forward that is launched kernel
# by kernel 25; 12 of them 32 and 31 (docs/results/gpu.md).
MOST_REPLAYED = 8


@dataclass
class LocalSession:
    """A session's cache and what its flags ask of each step. `length` counts the tokens that the cache holds."""

    cache: Cache | None
    settings: SessionSettings
    max_length: int
    length: int = 0
    shares: bool = False
    """Whether its steps can share a forward with those of others in its pool."""
    release: Callable[[], None] | None = None
    """What gives the cache's memory to later sessions, where somebody keeps it for them."""

    def fork(self, other: "LocalSession", tokens: int) -> None:
        """Copy the cache."""
        with self.settings.gradient_guard(), computing_on(1):
            if isinstance(self.cache, ReservedCache) and isinstance(other.cache, ReservedCache):
                self.cache.begin_with(other.cache, tokens)
                self.length = tokens
            else:
                self.cache, self.length = copy.deepcopy(other.cache), other.length
                _make_room(self, tokens, 0)

    def close(self) -> None:
        """Drop the cache."""
        if self.release is not None:
            self.release()
        self.cache, self.length, self.max_length, self.release = None, 0, 0, None


@dataclass(frozen=True)
class LocalStage:
    """A cut model on a device of this process. `word` is the ledger's name for its time."""

    cut: CutModel
    word: str
    device: torch.device
    dtype: torch.dtype
    hidden_size: int
    row_threads: int
    """Threads for a step of one token through the model's own forward; longer steps have those of the process."""
    precision: str
    """torch's float32_matmul_precision in this process, in which longer steps are computed."""
    row: Row | None = None
    """What takes one token through the stage, where it can, in place of the model's forward."""
    allows: Callable[[], frozenset[str]] = frozenset
    """What its architecture was found to do right with sessions of any lengths (stages/equivalence/together.py)."""

    def open(self, settings: SessionSettings, max_length: int) -> LocalSession:
        """A new session; a cache is made only when the settings keep one. Raises InputError for a kind of cache over
        which the layers would answer otherwise."""
        if settings.new_cache is static and STATIC_CACHE not in self._allowed:
            raise InputError("cache", "static", "dynamic or reserved for this model: it counts masked keys, too")
        if self._keeps_places(settings):
            return self._opened_in(self._kept_pool(max_length, 1), settings, max_length, 1, shares=False)[0]
        layers = self.cut.end - self.cut.start
        cache = settings.new_cache(layers, max_length) if settings.new_cache else None
        return LocalSession(cache, settings, max_length)

    def open_together(self, settings: SessionSettings, max_length: int, count: int) -> list[LocalSession]:
        """Sessions whose steps can be one forward, where the settings reserve the cache and the layers permit it."""
        shares = settings.new_cache is reserved and self.packs(settings)
        if self._keeps_places(settings):
            return self._opened_in(self._kept_pool(max_length, count), settings, max_length, count, shares=shares)
        if shares:
            return self._opened_in(self.pool(count, max_length), settings, max_length, count, shares=True)
        return [self.open(settings, max_length) for _ in range(count)]

    def _keeps_places(self, settings: SessionSettings) -> bool:
        """Whether sessions should lie where earlier ones did: for them something is recorded there."""
        recorded = self.row is not None and self.row.recorded
        return recorded and settings.new_cache is reserved and self._pools()

    def _kept_pool(self, max_length: int, count: int) -> KVPool:
        """Memory with room for `count` sessions, kept for later ones; where it is too small, twice as much is made in
        its place."""
        needed = count * -(-max_length // LEAST_WINDOW) * LEAST_WINDOW
        pool = next((pool for pool in self._kept if pool.fits(needed)), None)
        if pool is None:
            pool = self.pool((1 << (needed - 1).bit_length()) // LEAST_WINDOW, LEAST_WINDOW)
            self._kept[:] = [pool]
            if self.row is not None:
                self.row.forget()
        return pool

    def _opened_in(
        self, pool: KVPool, settings: SessionSettings, max_length: int, count: int, *, shares: bool
    ) -> list[LocalSession]:
        """Sessions beside each other in `pool`, which has room for them."""
        sessions = []
        for _ in range(count):
            run = pool.reserve(max_length)
            if run is None:
                raise ValueError(f"no room for {count} sessions of {max_length} tokens")
            release = partial(pool.release, run)
            sessions.append(LocalSession(pool.cache(run), settings, max_length, shares=shares, release=release))
        return sessions

    def packs(self, settings: SessionSettings) -> bool:
        """Whether sessions with these settings can share a forward: tried once.

        These very layers with a few tokens, and their architecture with lengths on either side of each boundary.
        """
        words = settings.words
        if words not in self._tried:
            self._tried[words] = (
                self._pools() and self._ragged.agrees(settings.forward_arguments) and SHARED_FORWARD in self._allowed
            )
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
        return shapes_of(self.cut, self._example[:, :1])

    @cached_property
    def rope_restart(self) -> int | None:
        """The length past which the model's whole sequence is computed anew (models/structure.py)."""
        return rope_restart(body_of(self.cut).config)

    @cached_property
    def _example(self) -> torch.Tensor:
        """Something to try the stage with: 8 token ids, or as many rows of a hidden state."""
        return example(self.cut, 8)

    @cached_property
    def _ragged(self) -> RaggedStage:
        return RaggedStage(self.cut)

    @cached_property
    def _allowed(self) -> frozenset[str]:
        return self.allows()

    @cached_property
    def _kept(self) -> list[KVPool]:
        return []

    @cached_property
    def _tried(self) -> dict[frozenset[str], bool]:
        return {}

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
        wrong = nonfinite.wrong_place(output.x, logits=self.cut.last)
        if wrong is None:
            return
        row, value = wrong
        position = item.position + item.x.shape[1] - output.x.shape[1] + row
        by_layers, again = replace(self, row=None), replace(item, unwanted=None)
        raise NotFinite(nonfinite.told(self.cut, value, position, self.dtype, lambda: by_layers.compute([again])))

    def compute(self, batch: Sequence[StageInput]) -> list[StageOutput]:
        """`step` without the check of what comes out."""
        if len(batch) > 1 and all(item.session.shares for item in batch) and not self._replays(batch):
            return self._packed(batch)
        return [self._step(item) for item in batch]

    def _replays(self, batch: Sequence[StageInput]) -> bool:
        """Whether the steps are recorded ones, and so few that they take less one after the other than in a forward."""
        recorded = self.row is not None and self.row.recorded
        return recorded and len(batch) <= MOST_REPLAYED and all(item.x.shape[1] == 1 for item in batch)

    def _step(self, item: StageInput) -> StageOutput:
        session, position, x = item.session, item.position, item.x
        started, compiled = time.perf_counter(), self._compile_seconds()
        _make_room(session, position, x.shape[1])
        with session.settings.gradient_guard():
            out = self._forward(item)
        session.length = position + x.shape[1]
        return StageOutput(out, self._timing(out, started, compiled))

    def _forward(self, item: StageInput) -> torch.Tensor:
        session, arguments = item.session, item.session.settings.forward_arguments
        if self.row is not None and not arguments:
            out = self.row(item.x, item.position, session.cache, item.unwanted)
            if out is not None:
                return out
        alone, x = item.x.shape[1] == 1 and self.device.type == "cpu", item.x.to(self.device)
        with computing_one_token(self.row_threads, self.precision) if alone else nullcontext():
            return forward(
                self.cut,
                x,
                item.position,
                session.cache,
                logits_to_keep=item.logits,
                arguments=arguments,
                rope_length=item.rope_length,
            )

    def _packed(self, batch: Sequence[StageInput]) -> list[StageOutput]:
        started, compiled = time.perf_counter(), self._compile_seconds()
        for item in batch:
            _make_room(item.session, item.position, item.x.shape[1])
        steps = [
            SessionStep(item.session.cache, item.position, item.x, item.logits, item.rope_length) for item in batch
        ]
        settings = batch[0].session.settings
        with settings.gradient_guard():
            out = self._ragged.forward(steps, settings.forward_arguments)
        for item in batch:
            item.session.length = item.position + item.x.shape[1]
        timings = chain([self._timing(out[0], started, compiled)], repeat(StageTiming({})))
        return [StageOutput(own, timing) for own, timing in zip(out, timings, strict=False)]

    def _timing(self, out: torch.Tensor, started: float, compiled: float) -> StageTiming:
        """What was spent since `started`, once `out` is there."""
        if out.device.type != "cpu":
            torch.accelerator.synchronize(out.device)
        spent = time.perf_counter() - started
        return StageTiming({self.word: spent}, compile_s=self._compile_seconds() - compiled)

    def _compile_seconds(self) -> float:
        """Seconds that this process has spent in torch.compile so far, if this stage is compiled, and in making what
        takes one token through it."""
        row = 0.0 if self.row is None else self.row.compile_s
        return row + (private_apis.compile_seconds() if self.cut.compiled else 0.0)


def _make_room(session: LocalSession, position: int, tokens: int) -> None:
    """Roll the cache back to `position`; refuse a gap, a missing prefix and a step that does not fit."""
    kept = 0 if session.cache is None else session.length
    if not 0 <= position <= kept:
        raise InputError("position", position, f"a whole number from 0 to {kept}, the cached length")
    if position + tokens > session.max_length:
        raise InputError("position", position, f"at most {session.max_length} tokens in all, as the session was opened")
    if session.cache is not None and position < session.length:
        session.cache.crop(position - session.length)
        session.length = position  # what is tried again, alone, must not be cropped again

"""JAX as the engine of a stage: the carved torch module, traced once by torchax and compiled by XLA.

    engine = of(eager, files)                    # of one stage; importing this module imports jax
    cache = engine.new_cache(max_length)         # of one session
    hidden = engine.compute(step)                # as EagerEngine.compute

A step is a pure function of weights, keys and values, input, position and number of rows: weights are arguments, keys
and values are donated, the position is an array. A program is compiled for a number of rows and a capacity, each padded
to a power of two. So an answer of any length takes one program for its tokens, and a prompt one for its length.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call
from torch.utils.dlpack import from_dlpack
from transformers.cache_utils import Cache, StaticLayer

from splitlearn.checkpoints.folder import ModelFiles
from splitlearn.engines.jax_cache import JaxCache, State
from splitlearn.engines.jax_programs import Programs, keep
from splitlearn.engines.padding import Piece, pieces, power_of_two
from splitlearn.errors import FamilyRefused
from splitlearn.kvcache.pool import KVShape
from splitlearn.models import rope
from splitlearn.models.cut import CutModel, dtype_of, forward
from splitlearn.runtime import private_apis
from splitlearn.stages.base import StageInput
from splitlearn.stages.engine import EagerEngine

torchax = private_apis.import_torchax()
THREADS = "PJRT_NPROC"
"""The environment variable that sets the number of threads of JAX's pool, which it makes with its first array."""
HEAD_ROWS = 1 << 16
"""Most hidden states that the head computes in one piece. Its cache takes no more than 4 bytes for each."""
GROWING = "that change with the length of the sequence, which no program of fixed shapes has"


@dataclass
class JaxEngine:
    """Computes all steps of a stage (stages/engine.StageEngine)."""

    eager: EagerEngine
    _programs: Programs = field(init=False, default_factory=Programs)
    _lock: threading.Lock = field(init=False, default_factory=threading.Lock)
    _unwritten: JaxCache | None = field(init=False, default=None)

    @property
    def cut(self) -> CutModel:
        return self.eager.cut

    @property
    def device(self) -> torch.device:
        return self.eager.device

    @property
    def compile_s(self) -> float:
        return self._programs.compile_s

    @property
    def token_threads(self) -> int:
        return self.eager.token_threads

    @property
    def precision(self) -> str:
        return self.eager.precision

    @cached_property
    def weights(self) -> dict[str, jax.Array]:
        """Parameters and buffers by their names, in the memory that torch has them in where its alignment permits."""
        named = (*self.cut.module.named_parameters(remove_duplicate=False), *self.cut.module.named_buffers())
        return {name: _shared(tensor) for name, tensor in named}

    @cached_property
    def _shapes(self) -> Sequence[tuple[KVShape, KVShape]]:
        return self.eager.kv_shapes()

    def kv_shapes(self) -> Sequence[tuple[KVShape, KVShape]]:
        """What each layer keeps of a token. Raises FamilyRefused if that is not keys and values."""
        return self._shapes

    def new_cache(self, max_length: int) -> JaxCache:
        """The cache of a session of at most `max_length` tokens."""
        return JaxCache.empty(self._shapes, max_length, _DTYPES[dtype_of(self.cut)])

    def compute(self, step: StageInput) -> Tensor:
        """The hidden state [1, T, H] or the logits [1, logits, V]. Writes the new tokens into the session's cache."""
        cache = None if step.session is None else step.session.cache
        if cache is None and not self._shapes:
            with self._lock:  # the head, whose steps share a cache that nothing is written to
                self._unwritten = self._unwritten or self.new_cache(HEAD_ROWS)
                return self._compute(self._unwritten, step)
        return self._compute(self.new_cache(step.x.shape[1]) if cache is None else cache, step)

    def _compute(self, cache: JaxCache, step: StageInput) -> Tensor:
        rows = step.x.shape[1]
        wanted = (step.logits or rows) if self.cut.last else rows
        parts = pieces(step.position, rows, cache.capacity, wanted)
        outs = [self._piece(cache, step, part)[:, -part.wanted or part.rows :] for part in parts]
        return outs[0] if len(outs) == 1 else torch.cat(outs, dim=1)

    def _piece(self, cache: JaxCache, step: StageInput, piece: Piece) -> Tensor:
        """The output of a piece's rows; of a last stage the logits of at least the wanted ones."""
        x = _padded(step.x[:, piece.at : piece.at + piece.rows], piece.padded)
        logits = power_of_two(piece.wanted) if self.cut.last else 0
        arguments = self.weights, cache.states, x, np.int32(step.position + piece.at), np.int32(piece.rows)
        key, function = (piece.padded, logits, cache.capacity), partial(pure_step, self.cut, logits)
        out, cache.states = self._programs.get(key, function, arguments)(*arguments)
        found = from_dlpack(out)
        return found if self.cut.last else found[:, : piece.rows]


def of(eager: EagerEngine, files: ModelFiles, weight_bits: int | None = None) -> JaxEngine:
    """The engine of a stage that has its weights. JAX computes with as many threads as torch had been given.

    Raises FamilyRefused for a stage that cannot be traced: what its rotary embeddings are depends on values.
    """
    if rope.is_pure(eager.cut.module):
        raise FamilyRefused(f"engine=jax: {type(eager.cut.module).__name__} has rotary embeddings {GROWING}")
    os.environ.setdefault(THREADS, str(torch.get_num_threads()))
    jax.config.update("jax_platforms", "cpu")
    keep(files)
    return JaxEngine(eager)


def pure_step(
    cut: CutModel,
    logits: int,
    weights: Mapping[str, jax.Array],
    states: list[State],
    x: jax.Array,
    position: jax.Array,
    rows: jax.Array,
) -> tuple[jax.Array, list[State]]:
    """A step as a pure function: output, and keys and values with the new tokens. Of `x` the first `rows` are real.

    A last stage gives the logits of the last `logits` of them, with 0 of all. JAX traces it once for each shape.
    """
    environment = torchax.default_env()
    # In inference mode torch does not take an operation apart that torchax knows by its parts alone, as layer_norm.
    with torch.inference_mode(False), torch.no_grad(), environment:
        own, pairs, x_, position_ = environment.j2t_iso((dict(weights), states, x, position))
        layers = [_Layer(keys, values, position_, rows) for keys, values in pairs]
        keep = environment.j2t_iso(jnp.clip(rows - logits + jnp.arange(logits), 0)) if logits else 0
        out = forward(with_weights(cut, own), x_, position_, Cache(layers=layers), logits_to_keep=keep)
    found: tuple[jax.Array, list[State]] = environment.t2j_iso((out, [(each.keys, each.values) for each in layers]))
    return found


def with_weights(cut: CutModel, weights: dict[str, Tensor]) -> CutModel:
    """The stage with these parameters and buffers in the place of its own, for a forward within torchax."""

    def call(**arguments: Any) -> Any:
        return functional_call(cut.module, weights, (), arguments)

    return replace(cut, module=cast(torch.nn.Module, call))


class _Layer(StaticLayer):  # type: ignore[misc]
    """A layer of the cache while a step is traced. Keys and values have the shape of the whole memory, and `position`
    is an array, so that the program is the same at each position."""

    def __init__(self, keys: Tensor, values: Tensor, position: Tensor, rows: jax.Array) -> None:
        super().__init__(keys.shape[2])
        self.keys, self.values, self.cumulative_length = keys, values, position
        self.is_initialized, self._rows = True, rows

    def update(self, key_states: Tensor, value_states: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """Write the new tokens. Returns all memory."""
        write = partial(_written, rows=self._rows)
        self.keys = torchax.interop.call_jax(write, self.keys, key_states, self.cumulative_length)
        self.values = torchax.interop.call_jax(write, self.values, value_states, self.cumulative_length)
        return self.keys, self.values


def _written(memory: jax.Array, new: jax.Array, position: jax.Array, rows: jax.Array) -> jax.Array:
    """`memory` [1, heads, capacity, size] with `new` [1, heads, T, size] at `position`. Behind the first `rows` of it
    are zeros: a padded row may be NaN, as one past the model's last position is, and 0 * NaN is NaN."""
    if new.shape[2] > 1:
        new = jnp.where(jnp.arange(new.shape[2])[:, None] < rows, new, 0)
    return jax.lax.dynamic_update_slice(memory, new.astype(memory.dtype), (0, 0, position, 0))


def _shared(tensor: Tensor) -> jax.Array:
    """The tensor as an array: the same memory where it begins at a multiple of 64 bytes, otherwise a copy."""
    return jnp.from_dlpack(tensor.detach().contiguous())


def _padded(x: Tensor, rows: int) -> Any:
    """Token ids or hidden states [1, T, ...] with zeros behind them, as an array [1, rows, ...]."""
    if x.shape[1] < rows:
        x = torch.cat([x, x.new_zeros(1, rows - x.shape[1], *x.shape[2:])], dim=1)
    return x.to(torch.int32).numpy() if x.dtype == torch.int64 else jnp.from_dlpack(x.contiguous())


_DTYPES = {torch.float32: jnp.float32, torch.bfloat16: jnp.bfloat16, torch.float16: jnp.float16}

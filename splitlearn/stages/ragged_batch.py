"""One forward for steps of several sessions: their tokens side by side in one row, each with its own keys and values.

Everything in a layer but attention works on each token alone, so the tokens of all sessions are one input [1, T, H]
with their own positions. Attention is taken apart: transformers lets a model run with a registered attention function,
and this one runs the model's own once for each session, on that session's part of the row. Masks are transformers' own,
too, made for each session. (transformers' continuous batching packs in the same way.) One token of each of many
sessions, the usual step, is attended in one call instead, where torch's sdpa would do and the pool is the processor's.
"""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from itertools import accumulate, takewhile
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from splitlearn.kvcache.pool import PooledCache
from splitlearn.layers import kernel_attention
from splitlearn.models import rope
from splitlearn.models.cut import CutModel
from splitlearn.runtime import private_apis
from splitlearn.runtime.torch_threads import computing_on

NAME = "splitlearn_packed"
# Queries times keys of a session up to which its attention is computed on one thread.
ONE_THREAD_WORK = 1024


@dataclass(frozen=True)
class Packed:
    """One session's tokens in a packed step: `tokens` of them from `position` on. A last stage gives the logits of the
    last `logits` of them. `rope_length` is that of `split.forward`."""

    cache: PooledCache
    position: int
    tokens: int
    logits: int = 1
    rope_length: int = 0


@dataclass(frozen=True)
class _Row:
    """What the attention function needs to know of the forward that is under way."""

    attention: str
    parts: Sequence[Packed]
    single: int
    """How many of the first sessions bring one token that `splitlearn.kernels.decode_attention` can attend."""
    starts: NDArray[np.int64]
    """Where in the pool each session's keys begin."""
    counts: NDArray[np.int64]
    """How many keys each session has, its new ones among them."""
    seen: dict[int, list[torch.Tensor]] = field(default_factory=dict)

    def views(self, index: int) -> list[torch.Tensor]:
        """Keys and values of each layer in turn of the session `index`; made when first asked for."""
        if index not in self.seen:
            pool = self.parts[index].cache.pool
            self.seen[index] = pool.views(int(self.starts[index]), int(self.counts[index]))
        return self.seen[index]


_current: ContextVar[_Row] = ContextVar("packed row")


class _PackedLayer(CacheLayerMixin):  # type: ignore[misc]
    """Writes the new tokens of all sessions to their places in the pool with one call each for keys and values."""

    is_sliding = False

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, places: torch.Tensor) -> None:
        super().__init__()
        self._keys, self._values, self._places = keys, values, places

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing is left to do."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: object, **__: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The attention function looks up what each session has by itself: what is returned only has the right type."""
        self._keys.index_copy_(2, self._places, key_states)
        self._values.index_copy_(2, self._places, value_states)
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Of no use to a row of several sessions; `_masks` has the real ones."""
        return query_length, 0

    def get_seq_length(self) -> int:
        """As above."""
        return 0

    def get_max_length(self) -> int:
        """As above."""
        return -1


def forward_packed(
    cut: CutModel, x: torch.Tensor, parts: Sequence[Packed], arguments: Mapping[str, Any] | None = None
) -> Sequence[torch.Tensor]:
    """One step of each of `parts`: token ids [1, T] or hidden states [1, T, H], T = all their tokens in order, to a
    hidden state [1, tokens, H] or logits [1, logits, V] for each.

    Each cache must hold `position` tokens, of one pool, and holds its new ones afterwards.
    """
    device = x.device
    pool = parts[0].cache.pool
    places = torch.cat(
        [
            torch.arange(part.cache.run.start + part.position, part.cache.run.start + part.position + part.tokens)
            for part in parts
        ]
    ).to(device)
    positions = torch.cat([torch.arange(part.position, part.position + part.tokens) for part in parts]).to(device)
    whole = pool.views(0, pool.capacity)
    cache = Cache(layers=[_PackedLayer(whole[at], whole[at + 1], places) for at in range(0, len(whole), 2)])
    call: dict[str, Any] = {"past_key_values": cache, "use_cache": True, **(arguments or {})}
    call["input_ids" if cut.first else "inputs_embeds"] = x
    if "position_ids" in cut.accepts:
        call["position_ids"] = positions.unsqueeze(0)
    with _attending(cut, parts), rope.computing([(part.rope_length, part.tokens) for part in parts]):
        out = _logits(cut, call, parts, device) if cut.last else cut.module(**call).last_hidden_state
    for part in parts:
        part.cache.grown(part.tokens)
    return torch.split(out, [part.logits if cut.last else part.tokens for part in parts], dim=1)


def _logits(cut: CutModel, call: dict[str, Any], parts: Sequence[Packed], device: torch.device) -> torch.Tensor:
    """The logits [1, N, V] that `parts` want, N of all."""
    ends = accumulate(part.tokens for part in parts)
    wanted = torch.cat([torch.arange(end - part.logits, end) for end, part in zip(ends, parts, strict=True)]).to(device)
    if "logits_to_keep" in cut.accepts:
        return cast(torch.Tensor, cut.module(**call, logits_to_keep=wanted).logits)
    return cast(torch.Tensor, cut.module(**call).logits[:, wanted])


@contextmanager
def _attending(cut: CutModel, parts: Sequence[Packed]) -> Iterator[None]:
    """Within it the model's layers attend by `_attend`."""
    before = [private_apis.attention_of(config) for config in cut.configs]
    module: Any = cut.module
    named = private_apis.attention_of(module.config) or "eager"
    used = "sdpa" if named == kernel_attention.NAME else named
    readable = used == "sdpa" and parts[0].cache.pool.arrays
    single = len(list(takewhile(lambda part: part.tokens == 1, parts))) if readable else 0
    starts = np.array([part.cache.run.start for part in parts])
    counts = np.array([part.position + part.tokens for part in parts])
    token = _current.set(_Row(used, parts, single, starts, counts))
    for config in cut.configs:
        private_apis.set_attention(config, NAME)
    try:
        yield
    finally:
        for config, own in zip(cut.configs, before, strict=True):
            private_apis.set_attention(config, own)
        _current.reset(token)


def _attend(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any, **arguments: Any
) -> tuple[torch.Tensor, None]:
    """The model's own attention for each session: query [1, heads, T, size] to [1, T, heads, size]."""
    row = _current.get()
    masks = attention_mask or [None] * len(row.parts)
    masked = arguments.get("position_bias") is not None or any(map(torch.is_tensor, masks[: row.single]))
    single = 0 if masked else row.single
    outputs = []
    if single:
        outputs.append(_attend_singly(query[:, :, :single], module.layer_idx, arguments.get("scaling")))
    if single < len(row.parts):
        outputs += _attend_apart(module, query, masks, single, arguments)
    return torch.cat(outputs, dim=1) if len(outputs) > 1 else outputs[0], None


def _attend_singly(query: torch.Tensor, layer: int, scale: float | None) -> torch.Tensor:
    """What `sdpa` does for one token of each of the first sessions, which sees all keys of its own: [1, heads, T, size]
    to [1, T, heads, size]."""
    from splitlearn.kernels.decode_attention import attend  # loads a compiler, of which a client has no need

    row, tokens = _current.get(), query.shape[2]
    keys, values = row.parts[0].cache.pool.arrays[2 * layer : 2 * layer + 2]
    return attend(query, keys, values, row.starts[:tokens], row.counts[:tokens], scale)


def _attend_apart(
    module: Any, query: torch.Tensor, masks: Sequence[Any], first: int, arguments: Mapping[str, Any]
) -> list[torch.Tensor]:
    """The model's own attention for each session from `first` on: each [1, tokens, heads, size]."""
    row, at = _current.get(), 2 * module.layer_idx
    attend, queries = _own_attention(module, row.attention), torch.split(query, [p.tokens for p in row.parts], dim=2)
    folds = row.attention == "sdpa" and arguments.get("position_bias") is None
    outputs = []
    for index in range(first, len(row.parts)):
        (keys, values), mask = row.views(index)[at : at + 2], masks[index]
        with computing_on(_threads(row.parts[index])):
            if folds and torch.is_tensor(mask) and mask.shape[1] == 1:
                outputs.append(_attend_folded(queries[index], keys, values, mask, arguments.get("scaling")))
            else:
                outputs.append(attend(module, queries[index], keys, values, mask, **arguments)[0])
    return outputs


def _attend_folded(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, scale: float | None
) -> torch.Tensor:
    """What `sdpa` does for a piece of a prompt: [1, heads, T, size], masked by [1, 1, T, keys], to [1, T, heads, size].

    The heads that share keys are the rows of one product. transformers' own function copies keys and values for each
    head first: 13 of 163 ms of a forward of 8 sessions and 16 tokens of a prompt after 1,000.
    """
    heads, tokens, size = query.shape[1:]
    rows = query.reshape(1, keys.shape[1], -1, size)
    shared = mask.repeat(1, 1, heads // keys.shape[1], 1)
    out = scaled_dot_product_attention(rows, keys, values, attn_mask=shared, scale=scale)
    return out.reshape(1, heads, tokens, -1).transpose(1, 2)


def _threads(part: Packed) -> int:
    """One for a small product: it would wait for the other threads for longer than it computes."""
    work = part.tokens * (part.position + part.tokens)
    return 1 if work <= ONE_THREAD_WORK else torch.get_num_threads()


def _masks(*, mask_function: Callable[..., Any], **arguments: Any) -> list[torch.Tensor | None]:
    """The masks that transformers makes for each session alone, by the same rule (causal, sliding, chunked)."""
    row = _current.get()
    make = ALL_MASK_ATTENTION_FUNCTIONS[row.attention]
    own = {
        name: value
        for name, value in arguments.items()
        if name not in ("q_length", "kv_length", "q_offset", "kv_offset")
    }
    return [
        make(
            q_length=part.tokens,
            kv_length=part.position + part.tokens,
            q_offset=part.position,
            kv_offset=0,
            mask_function=mask_function,
            **own,
        )
        for part in row.parts
    ]


def _own_attention(module: Any, name: str) -> Callable[..., Any]:
    """What the layer would attend with; each model's file has an eager function of its own."""
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    function: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager)
    return function


AttentionInterface.register(NAME, _attend)
AttentionMaskInterface.register(NAME, _masks)

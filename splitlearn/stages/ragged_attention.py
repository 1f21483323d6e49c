"""Attention for a ragged batch: each session attends to its own keys and values in the pool.

`NAME` is registered with transformers as an attention implementation. A model whose configuration names it calls
`_attend` in each layer and `_mask_rule` once for each kind of mask. The cache returns keys that carry the batch to
`_attend` (`with_batch`), so that no state is kept between calls.

The model's own implementation computes each session's attention, with transformers' own mask for that session. The
usual step has one token of each session. It takes one call of a kernel if the model uses sdpa and the pool is on the
CPU.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from splitlearn.kvcache.pool import PooledCache
from splitlearn.layers import kernel_attention
from splitlearn.runtime.torch_threads import computing_on

NAME = "splitlearn_ragged"
BATCH = "ragged_batch"
# Up to so many queries times keys, one thread computes a session's attention.
ONE_THREAD_WORK = 1024


@dataclass(frozen=True)
class MaskRule:
    """The arguments of transformers' mask function for a rule (causal, sliding, chunked), without the lengths."""

    arguments: Mapping[str, Any]


@dataclass(frozen=True)
class RaggedBatch:
    """The sessions of a forward, as attention needs them. The first `single` have one token each, whose attention
    `splitlearn.kernels.decode_attention` can compute."""

    attention: str
    """The model's own implementation."""
    caches: Sequence[PooledCache]
    positions: Sequence[int]
    tokens: Sequence[int]
    starts: NDArray[np.int64]
    """The position in the pool at which each session's keys begin."""
    counts: NDArray[np.int64]
    """The number of each session's keys, including the new ones."""
    single: int
    seen: dict[int, list[torch.Tensor]] = field(default_factory=dict)
    masks_seen: dict[int, list[torch.Tensor | None]] = field(default_factory=dict)

    @classmethod
    def of(
        cls, attention: str, caches: Sequence[PooledCache], positions: Sequence[int], tokens: Sequence[int]
    ) -> "RaggedBatch":
        """The batch of a step: `tokens` of each session, after the `positions` in its cache."""
        own = "sdpa" if attention == kernel_attention.NAME else attention
        readable = own == "sdpa" and caches[0].pool.arrays
        single = len(list(takewhile(lambda count: count == 1, tokens))) if readable else 0
        starts = np.array([cache.slot.start for cache in caches])
        return cls(own, caches, positions, tokens, starts, np.add(positions, tokens), single)

    def views(self, index: int) -> list[torch.Tensor]:
        """Keys and values of each layer in turn, for session number `index`. Made at the first call."""
        if index not in self.seen:
            pool = self.caches[index].pool
            self.seen[index] = pool.views(int(self.starts[index]), int(self.counts[index]))
        return self.seen[index]

    def masks(self, rule: MaskRule | None) -> list[torch.Tensor | None]:
        """The masks that transformers makes by `rule` for each session alone."""
        if rule is None:
            return [None] * len(self.tokens)
        if id(rule) not in self.masks_seen:
            make = ALL_MASK_ATTENTION_FUNCTIONS[self.attention]
            self.masks_seen[id(rule)] = [
                make(**rule.arguments, q_length=tokens, kv_length=at + tokens, q_offset=at, kv_offset=0)
                for at, tokens in zip(self.positions, self.tokens, strict=True)
            ]
        return self.masks_seen[id(rule)]

    def threads(self, index: int) -> int:
        """The threads for a session's attention: one for a small product, since to wake others takes longer."""
        work = self.tokens[index] * int(self.counts[index])
        return 1 if work <= ONE_THREAD_WORK else torch.get_num_threads()


def with_batch(keys: torch.Tensor, batch: RaggedBatch) -> torch.Tensor:
    """Attach the batch to `keys`, where `_attend` finds it."""
    setattr(keys, BATCH, batch)
    return keys


def _attend(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any, **arguments: Any
) -> tuple[torch.Tensor, None]:
    """The model's own attention for each session: query [1, heads, T, size] to [1, T, heads, size]."""
    batch: RaggedBatch = getattr(key, BATCH)
    masks = batch.masks(attention_mask)
    masked = arguments.get("position_bias") is not None or any(map(torch.is_tensor, masks[: batch.single]))
    single = 0 if masked else batch.single
    outputs = []
    if single:
        outputs.append(_attend_singly(batch, query[:, :, :single], module.layer_idx, arguments.get("scaling")))
    if single < len(batch.tokens):
        outputs += _attend_apart(batch, module, query, masks, single, arguments)
    return torch.cat(outputs, dim=1) if len(outputs) > 1 else outputs[0], None


def _attend_singly(batch: RaggedBatch, query: torch.Tensor, layer: int, scale: float | None) -> torch.Tensor:
    """`sdpa` for one token of each of the first sessions, which sees all its keys: [1, heads, T, size] to [1, T, heads,
    size]."""
    from splitlearn.kernels.decode_attention import attend  # loads a compiler, which a client does not need

    tokens = query.shape[2]
    keys, values = batch.caches[0].pool.arrays[2 * layer : 2 * layer + 2]
    return attend(query, keys, values, batch.starts[:tokens], batch.counts[:tokens], scale)


def _attend_apart(
    batch: RaggedBatch,
    module: Any,
    query: torch.Tensor,
    masks: Sequence[Any],
    first: int,
    arguments: Mapping[str, Any],
) -> list[torch.Tensor]:
    """The model's own attention for each session from `first` on: each [1, tokens, heads, size]."""
    at, queries = 2 * module.layer_idx, torch.split(query, list(batch.tokens), dim=2)
    attend = _own_attention(module, batch.attention)
    folds = batch.attention == "sdpa" and arguments.get("position_bias") is None
    outputs = []
    for index in range(first, len(batch.tokens)):
        (keys, values), mask = batch.views(index)[at : at + 2], masks[index]
        with computing_on(batch.threads(index)):
            if folds and torch.is_tensor(mask) and mask.shape[1] == 1:
                outputs.append(_attend_folded(queries[index], keys, values, mask, arguments.get("scaling")))
            else:
                outputs.append(attend(module, queries[index], keys, values, mask, **arguments)[0])
    return outputs


def _attend_folded(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, scale: float | None
) -> torch.Tensor:
    """`sdpa` for a chunk of a prompt: [1, heads, T, size], masked by [1, 1, T, keys], to [1, T, heads, size].

    Heads that share keys are the rows of one product. transformers' own function first copies keys and values for each
    head. That takes 13 of the 163 ms of a forward of 8 sessions with 16 tokens of a prompt after 1,000.
    """
    heads, tokens, size = query.shape[1:]
    rows = query.reshape(1, keys.shape[1], -1, size)
    shared = mask.repeat(1, 1, heads // keys.shape[1], 1)
    out = scaled_dot_product_attention(rows, keys, values, attn_mask=shared, scale=scale)
    return out.reshape(1, heads, tokens, -1).transpose(1, 2)


def _mask_rule(**arguments: Any) -> MaskRule:
    """Returns a rule instead of a mask: the masks are made later, for each session of the batch."""
    lengths = ("q_length", "kv_length", "q_offset", "kv_offset")
    return MaskRule({name: value for name, value in arguments.items() if name not in lengths})


def _own_attention(module: Any, name: str) -> Callable[..., Any]:
    """The layer's own attention function. Each model's file has its own eager function."""
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    function: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager)
    return function


AttentionInterface.register(NAME, _attend)
AttentionMaskInterface.register(NAME, _mask_rule)

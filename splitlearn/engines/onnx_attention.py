"""The attention of exported stages: one operator of ONNX Runtime, which also appends to the KV cache.

`NAME` is registered with transformers as an attention implementation. While a stage is traced, its cache has a
`GraphLayer` for each layer. `update` returns the new keys and values alone, and the attention that follows writes a
`GroupQueryAttention` into the graph. That operator reads the cached tokens from an input [1, heads, capacity, size],
and writes the new ones behind them. Where input and output are the same memory, nothing is copied.

The operator is causal. It takes a sliding window and soft-capping as attributes, and head sizes that are multiples of
SIZE_STEP: smaller ones are padded with zeros, which change no product.
"""

from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import AttentionInterface
from transformers.cache_utils import Cache

from splitlearn.kvcache.layers import StepLayer
from splitlearn.kvcache.pool import KVShape

NAME = "splitlearn_onnx"
OPERATOR = "com.microsoft::GroupQueryAttention"
SIZE_STEP = 8


@dataclass(frozen=True)
class Lengths:
    """How many tokens the cache has after the step: `last` int32 [1] is one less, `total` int32 [] all of them."""

    last: Tensor
    total: Tensor

    @classmethod
    def after(cls, position: Tensor, tokens: int) -> "Lengths":
        """After a step of `tokens` at `position` int64 []."""
        total = (position + tokens).to(torch.int32)
        return cls((total - 1).reshape(1), total)


class GraphLayer(StepLayer):
    """A layer's cache while its stage is traced. `past` are keys and values of the tokens before the step; `present`,
    which the layer's attention sets, those after it."""

    def __init__(self, past: tuple[Tensor, Tensor], lengths: Lengths) -> None:
        super().__init__()
        self.past, self.lengths, self.present = past, lengths, past

    def update(self, key_states: Tensor, value_states: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """The new keys and values alone. The next call of the attention is this layer's."""
        _latest.set(self)
        return key_states, value_states


_latest: ContextVar[GraphLayer] = ContextVar("the layer whose attention comes next")


def cache_of(past: list[Tensor], lengths: Lengths) -> Cache:
    """A cache for tracing a stage whose layers have `past`: keys of layer 0, values of layer 0, keys of layer 1 ..."""
    return Cache(layers=[GraphLayer(pair, lengths) for pair in zip(past[::2], past[1::2], strict=True)])


def padded(shape: KVShape) -> KVShape:
    """The shape in which keys or values of `shape` are kept."""
    return KVShape(shape.heads, -(-shape.size // SIZE_STEP) * SIZE_STEP)


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """The attention of the latest layer: query [1, heads, T, size] to [1, T, heads, size].

    A `sliding_window` counts the token itself, as the operator's does.
    """
    layer = _latest.get()
    heads, tokens, size = query.shape[1:]
    attributes: dict[str, Any] = {
        "num_heads": heads,
        "kv_num_heads": key.shape[1],
        "scale": float(size**-0.5 if scaling is None else scaling),
        "softcap": float(softcap or 0.0),
        "local_window_size": sliding_window or -1,
    }
    rows = [_joined(each) for each in (query, key, value)]
    lengths = layer.lengths
    out, *present = torch.onnx.ops.symbolic_multi_out(
        OPERATOR,
        [*rows, *layer.past, lengths.last, lengths.total],
        attributes,
        dtypes=[torch.float32] * 3,
        shapes=[rows[0].shape, *(each.shape for each in layer.past)],
        version=1,
    )
    layer.present = (present[0], present[1])
    return out.reshape(1, tokens, heads, -1)[..., : value.shape[-1]], None


def _joined(states: Tensor) -> Tensor:
    """[1, heads, T, size] as [1, T, heads * padded size]."""
    missing = -states.shape[-1] % SIZE_STEP
    whole = pad(states, (0, missing)) if missing else states
    return whole.transpose(1, 2).flatten(2)


AttentionInterface.register(NAME, _attend)

"""Decoder layers through which one token goes in one call (layer_kernel.py), where they are such as Llama's.

Whether a layer is, its parts tell, and then its own outputs: a token goes through both, after a few others, and where
the two differ by more than rounding the layer is left as it is. So is every step of more than one token.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from splitlearn import caches, row_attention
from splitlearn.caches import Arrays, ReservedLayer
from splitlearn.quantized import QuantizedLinear
from splitlearn.split import CutModel, layers_of

ATTENTION, MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
NORMS = ("input_layernorm", "post_attention_layernorm")
CHILDREN = {*NORMS, "self_attn", "mlp"}
NEAR = 1e-3


def fuse(cut: CutModel) -> None:
    """Have each of the stage's layers that can take a token in one call."""
    layers = layers_of(cut)
    for layer in layers:
        if (fused := _of(layer)) is not None and _same(layer, fused, len(layers)):
            layer.forward = fused


class _Fused:
    """Stands for a layer's own forward."""

    def __init__(self, layer: Any, linears: list[QuantizedLinear], norms: list[Any]) -> None:
        self._own: Callable[..., torch.Tensor] = layer.forward
        self._index, self._scale = layer.self_attn.layer_idx, float(layer.self_attn.scaling)
        self._size = layer.self_attn.head_dim
        self._norms = torch.stack([norm.weight.detach() for norm in norms]).numpy()
        self._eps = float(norms[0].variance_epsilon)
        self._blocks = [linear.array for linear in linears]
        self._inner, self._four_bits = linears[-1].in_features, linears[0].four_bits

    def __call__(self, hidden_states: torch.Tensor, **named: Any) -> torch.Tensor:
        """Of hidden states [1, T, H] the same, as the layer's own forward."""
        kept = self._kept(hidden_states, **named)
        if kept is None:
            return self._own(hidden_states, **named)
        from splitlearn.layer_kernel import step  # loads a compiler

        cache, (keys, values, start) = kept
        cos, sin = (part[0, 0].numpy() for part in named["position_embeddings"])
        x = hidden_states.numpy()
        out = np.empty_like(x)
        step(
            x[0, 0],
            self._norms,
            self._eps,
            *self._blocks,
            self._inner,
            self._four_bits,
            cos,
            sin,
            self._scale,
            keys,
            values,
            start,
            cache.length,
            out[0, 0],
        )
        cache.length += 1
        return torch.from_numpy(out)

    def _kept(
        self,
        x: torch.Tensor,
        attention_mask: Any = None,
        past_key_values: Any = None,
        position_embeddings: Any = None,
        **_: Any,
    ) -> tuple[ReservedLayer, Arrays] | None:
        """Where the keys and values of the step are, if it is one that goes in one call."""
        if x.shape[:2] != (1, 1) or attention_mask is not None or past_key_values is None or not position_embeddings:
            return None
        if torch.compiler.is_compiling() or position_embeddings[0].shape[-1] != self._size:
            return None
        layers = past_key_values.layers  # a dynamic cache has none before it has been given something
        cache = layers[self._index] if self._index < len(layers) else None
        if not isinstance(cache, ReservedLayer) or not cache.is_initialized or (arrays := cache.arrays) is None:
            return None
        return cache, arrays


def _of(layer: Any) -> _Fused | None:
    """What stands for `layer` if it has Llama's parts and no others."""
    if {name for name, _ in layer.named_children()} != CHILDREN:
        return None
    if layer.self_attn.config._attn_implementation not in ("sdpa", row_attention.NAME):
        return None
    parts = [getattr(layer.self_attn, name, None) for name in ATTENTION] + [
        getattr(layer.mlp, name, None) for name in MLP
    ]
    norms = [getattr(layer, name) for name in NORMS]
    linears = [part for part in parts if isinstance(part, QuantizedLinear) and part.whole and part.bias is None]
    if len(linears) < len(parts) or not all(hasattr(norm, "variance_epsilon") for norm in norms):
        return None
    return _Fused(layer, linears, norms)


def _same(layer: Any, fused: _Fused, count: int) -> bool:
    """Whether a fifth token comes out of both alike."""
    size, width = layer.self_attn.head_dim, layer.self_attn.q_proj.in_features
    made = torch.Generator().manual_seed(0)
    x = torch.randn(1, 5, width, generator=made)
    angles = torch.arange(5)[:, None] * torch.rand(size // 2, generator=made)
    turned = torch.cat([angles, angles], dim=-1).unsqueeze(0)
    found = []
    with torch.inference_mode():
        for forward in (layer.forward, fused):
            cache = caches.reserved(count, 8)
            for part in (slice(0, 4), slice(4, 5)):
                turn = (turned[:, part].cos(), turned[:, part].sin())
                out = forward(x[:, part], attention_mask=None, past_key_values=cache, position_embeddings=turn)
            found.append(out)
    one, other = found
    return torch.allclose(one, other, rtol=NEAR, atol=NEAR * float(one.abs().max()))

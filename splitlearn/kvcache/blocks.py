"""Copies keys and values between a session's cache and blocks (prefix_store.py).

A cache's part of a block has a tensor [heads, BLOCK_TOKENS, size] for each state: keys of layer 0, values of layer 0,
keys of layer 1, and so on.
"""

from collections.abc import Sequence

import torch
from transformers.cache_utils import Cache

from splitlearn.kvcache.prefix_store import BLOCK_TOKENS, BlockPart


def read(cache: Cache, first: int, count: int) -> list[BlockPart]:
    """Copies of the blocks `[first, first + count)` of a cache."""
    start, tokens = first * BLOCK_TOKENS, count * BLOCK_TOKENS
    layers = [layer for layer in cache.layers if layer.is_initialized]
    states = [state[0].narrow(1, start, tokens) for layer in layers for state in (layer.keys, layer.values)]
    return [
        tuple(state.narrow(1, at, BLOCK_TOKENS).clone() for state in states) for at in range(0, tokens, BLOCK_TOKENS)
    ]


def write(cache: Cache, parts: Sequence[BlockPart], device: torch.device) -> None:
    """Fill an empty cache with the first blocks of a sequence."""
    states = [torch.cat([each.to(device) for each in blocks], dim=1)[None] for blocks in zip(*parts, strict=True)]
    for layer, (keys, values) in enumerate(zip(states[::2], states[1::2], strict=True)):
        cache.update(keys, values, layer)

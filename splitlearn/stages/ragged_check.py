"""Whether the sessions of a stage can share a forward: its layers are asked, not its family's name."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from splitlearn.kvcache.pool import KVPool, PooledCache, Run
from splitlearn.models.cut import CutModel, agree, forward
from splitlearn.stages.ragged_batch import Packed, forward_packed
from splitlearn.stages.settings import SessionSettings

# Tokens of two sessions in two steps: prompts from their beginnings; then one token, and a piece of a prompt.
STEPS = ((3, 2), (1, 2))


def agrees(cut: CutModel, pool: KVPool, x: torch.Tensor, settings: SessionSettings) -> bool:
    """Whether the layers give in one packed forward what they give apart, but for rounding.

    `x` are 8 token ids [1, 8] or rows of a hidden state [1, 8, H], `pool` has 4 blocks of 4 tokens. A family whose
    attention does not go through transformers' interface, or that does more with keys and values than keep them, shows
    it here. So does a compiled stage, which would be compiled anew for each mix of sessions.
    """
    if cut.compiled:
        return False
    caches = [PooledCache(pool, Run(4 * at, 4)) for at in range(4)]
    pieces = torch.split(x, [tokens for step in STEPS for tokens in step], dim=1)
    items = list(zip((0, 0, *STEPS[0]), pieces, strict=True))
    arguments = settings.forward_arguments
    with settings.gradient_guard():
        apart = [
            forward(cut, piece, position, cache, arguments=arguments)
            for (position, piece), cache in zip(items, caches[:2] * 2, strict=True)
        ]
        try:
            packed = [
                *_packed(cut, caches[2:], items[:2], arguments),
                *_packed(cut, caches[2:], items[2:], arguments),
            ]
        except Exception:  # whatever the layers raise, they cannot
            return False
    close = float(torch.finfo(apart[0].dtype).eps ** 0.5)
    return all(agree(a, b, close) for a, b in zip(apart, packed, strict=True))


def _packed(
    cut: CutModel,
    caches: Sequence[PooledCache],
    items: Sequence[tuple[int, torch.Tensor]],
    arguments: Mapping[str, Any],
) -> Sequence[torch.Tensor]:
    """One step of two sessions, each a position and what comes there, in one forward: all that each gives."""
    parts = [
        Packed(cache, position, piece.shape[1], logits=piece.shape[1])
        for cache, (position, piece) in zip(caches, items, strict=True)
    ]
    return forward_packed(cut, torch.cat([piece for _, piece in items], dim=1), parts, arguments)

"""One forward for a ragged batch: steps of several sessions, their tokens side by side in one row.

    ragged = RaggedStage(cut)
    outputs = ragged.forward(steps)     # as the stage's own forward gives for each step alone

Everything in a layer but attention works on each token alone. So the tokens of all sessions are one input [1, T, H],
each with its own position. Only attention is computed per session (stages/ragged_attention.py). transformers'
continuous batching does the same.
"""

import copy
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from splitlearn.kvcache.layers import StepLayer
from splitlearn.models.cut import CutModel, forward
from splitlearn.runtime import private_apis
from splitlearn.stages.base import StageInput
from splitlearn.stages.ragged_attention import NAME, RaggedBatch, with_batch
from splitlearn.stages.settings import SessionSettings
from splitlearn.stages.verify import reason_against


class RaggedStage:
    """A stage's layers with the attention of ragged batches. It shares the stage's weights; the stage's own `module`
    keeps its attention."""

    def __init__(self, cut: CutModel) -> None:
        module: Any = cut.module
        self._attention = private_apis.attention_of(module.config) or "eager"
        self._device = next(cut.module.parameters()).device
        self._own, self._cut = cut, replace(cut, module=_with_ragged_attention(cut.module, {}))

    def agrees(self, settings: SessionSettings) -> bool:
        """Whether one forward gives the same outputs as separate ones, in sessions with `settings`.

        The check fails for a family whose attention bypasses transformers' interface, or that does more with keys and
        values than keep them. A compiled stage is excluded: it would be compiled again for each mix of sessions.
        """
        return not self._own.compiled and reason_against(self._own, self.forward, settings) is None

    def forward(self, steps: Sequence[StageInput]) -> Sequence[Tensor]:
        """Compute one step of each session. Returns for each a hidden state [1, T, H], or logits [1, logits, V].

        All caches must belong to one pool, and hold the positions before their step; the new tokens are appended. All
        sessions must have the same arguments for the model's forward.
        """
        cut, device, tokens = self._cut, self._device, [step.x.shape[1] for step in steps]
        caches, positions = [step.session.cache for step in steps], [step.position for step in steps]
        counts = [step.logits or own for step, own in zip(steps, tokens, strict=True)] if cut.last else tokens
        at = torch.cat([torch.arange(begin, begin + own) for begin, own in zip(positions, tokens, strict=True)])
        starts = torch.tensor([cache.slot.start for cache in caches]).repeat_interleave(torch.tensor(tokens))
        batch = RaggedBatch.of(self._attention, caches, positions, tokens)
        found = forward(
            cut,
            torch.cat([step.x for step in steps], dim=1).to(device),
            at.to(device),
            _cache(batch, (starts + at).to(device)),
            logits_to_keep=_last_rows(tokens, counts).to(device) if cut.last else 0,
            arguments=steps[0].session.settings.forward_arguments,
            parts=[(step.rope_length, own) for step, own in zip(steps, tokens, strict=True)],
        )
        for cache, own in zip(caches, tokens, strict=True):
            cache.grow(own)
        return torch.split(found, counts, dim=1)


def _last_rows(tokens: Sequence[int], counts: Sequence[int]) -> Tensor:
    """The numbers of the last `counts` of the `tokens` of each session, in one row."""
    return torch.cat([torch.arange(end - own, end) for end, own in zip(accumulate(tokens), counts, strict=True)])


def _with_ragged_attention(module: nn.Module, made: dict[int, Any]) -> nn.Module:
    """A copy of `module` whose configurations name the attention of ragged batches.

    Modules that have a configuration, and those that contain them, are copied. Everything else is shared: weights,
    buffers, hooks, and every module without a configuration in it.
    """
    if id(module) not in made:
        own = module
        if any(hasattr(each, "config") for each in module.modules()):
            own = private_apis.with_children(module, lambda child: _with_ragged_attention(child, made))
            config: Any = getattr(module, "config", None)
            if config is not None:
                own.config = made.setdefault(id(config), _ragged_config(config))
        made[id(module)] = own
    return cast(nn.Module, made[id(module)])


def _ragged_config(config: Any) -> Any:
    named = copy.deepcopy(config)
    private_apis.set_attention(named, NAME)
    return named


def _cache(batch: RaggedBatch, places: Tensor) -> Cache:
    pool = batch.caches[0].pool
    whole = pool.views(0, pool.capacity)
    pairs = zip(whole[::2], whole[1::2], strict=True)
    return Cache(layers=[_RaggedLayer(batch, keys, values, places) for keys, values in pairs])


class _RaggedLayer(StepLayer):
    """Writes the new tokens of all sessions to the pool, with one call for keys and one for values."""

    def __init__(self, batch: RaggedBatch, keys: Tensor, values: Tensor, places: Tensor) -> None:
        super().__init__()
        self._batch, self._keys, self._values, self._places = batch, keys, values, places

    def update(self, key_states: Tensor, value_states: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """Write the new tokens. The attention function reads each session's keys itself, and needs only the batch."""
        self._keys.index_copy_(2, self._places, key_states)
        self._values.index_copy_(2, self._places, value_states)
        return with_batch(key_states, self._batch), value_states

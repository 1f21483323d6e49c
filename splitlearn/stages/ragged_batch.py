"""One forward for a ragged batch: steps of several sessions, their tokens side by side in one row.

    ragged = RaggedStage(cut)
    outputs = ragged.forward(steps)     # as the stage's own forward gives for each step alone

Everything in a layer but attention works on each token alone, so the tokens of all sessions are one input [1, T, H]
with their own positions. Attention is taken apart (stages/ragged_attention.py). transformers' continuous batching does
the same.
"""

import copy
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin

from splitlearn.models import rope
from splitlearn.models.cut import CutModel
from splitlearn.runtime import private_apis
from splitlearn.stages.base import StageInput
from splitlearn.stages.ragged_attention import NAME, RaggedBatch, with_batch
from splitlearn.stages.settings import SessionSettings
from splitlearn.stages.verify import reason_against


class RaggedStage:
    """A stage's layers with the attention of ragged batches. Weights are shared with the stage; `module` of the stage
    keeps its own attention."""

    def __init__(self, cut: CutModel) -> None:
        module: Any = cut.module
        self._attention = private_apis.attention_of(module.config) or "eager"
        self._device = next(cut.module.parameters()).device
        self._own, self._cut = cut, replace(cut, module=_attending(cut.module, {}))

    def agrees(self, settings: SessionSettings) -> bool:
        """Whether the layers give in one forward what they give apart, in sessions with `settings`.

        A family whose attention does not go through transformers' interface, or that does more with keys and values
        than keep them, shows it here. A compiled stage would be compiled anew for each mix of sessions.
        """
        return not self._own.compiled and reason_against(self._own, self.forward, settings) is None

    def forward(self, steps: Sequence[StageInput]) -> Sequence[Tensor]:
        """One step of each session: a hidden state [1, T, H], or logits [1, logits, V], for each.

        All caches must be of one pool; each holds the positions before its step, and its new tokens afterwards. All
        sessions have the same arguments for the model's forward.
        """
        cut, device, tokens = self._cut, self._device, [step.x.shape[1] for step in steps]
        caches, positions = [step.session.cache for step in steps], [step.position for step in steps]
        ends = list(map(sum, zip(positions, tokens, strict=True)))
        at = torch.cat([torch.arange(*part) for part in zip(positions, ends, strict=True)])
        starts = torch.tensor([cache.slot.start for cache in caches]).repeat_interleave(torch.tensor(tokens))
        batch = RaggedBatch.of(self._attention, caches, positions, tokens)
        call: dict[str, Any] = {"past_key_values": _cache(batch, (starts + at).to(device)), "use_cache": True}
        call["input_ids" if cut.first else "inputs_embeds"] = torch.cat([step.x for step in steps], dim=1).to(device)
        if "position_ids" in cut.accepts:
            call["position_ids"] = at.to(device).unsqueeze(0)
        with rope.computing([(step.rope_length, count) for step, count in zip(steps, tokens, strict=True)]):
            found = self._run(call | dict(steps[0].session.settings.forward_arguments), steps)
        for cache, count in zip(caches, tokens, strict=True):
            cache.grow(count)
        return found

    def _run(self, call: dict[str, Any], steps: Sequence[StageInput]) -> Sequence[Tensor]:
        tokens = [step.x.shape[1] for step in steps]
        if not self._cut.last:
            return torch.split(self._cut.module(**call).last_hidden_state, tokens, dim=1)
        counts = [step.logits or count for step, count in zip(steps, tokens, strict=True)]
        wanted = torch.cat(
            [torch.arange(end - count, end) for end, count in zip(accumulate(tokens), counts, strict=True)]
        ).to(self._device)
        if "logits_to_keep" in self._cut.accepts:
            logits = self._cut.module(**call, logits_to_keep=wanted).logits
        else:
            logits = self._cut.module(**call).logits[:, wanted]
        return torch.split(cast(Tensor, logits), counts, dim=1)


def _attending(module: nn.Module, made: dict[int, Any]) -> nn.Module:
    """`module` with configurations that name the attention of ragged batches.

    Modules that look things up in a configuration, and those around them, are copied. All else is shared: weights,
    buffers, hooks, and every module without a configuration in it.
    """
    if id(module) not in made:
        own = module
        if any(hasattr(each, "config") for each in module.modules()):
            own = private_apis.with_children(module, lambda child: _attending(child, made))
            config: Any = getattr(module, "config", None)
            if config is not None:
                own.config = made.setdefault(id(config), _naming(config))
        made[id(module)] = own
    return cast(nn.Module, made[id(module)])


def _naming(config: Any) -> Any:
    named = copy.deepcopy(config)
    private_apis.set_attention(named, NAME)
    return named


def _cache(batch: RaggedBatch, places: Tensor) -> Cache:
    pool = batch.caches[0].pool
    whole = pool.views(0, pool.capacity)
    pairs = zip(whole[::2], whole[1::2], strict=True)
    return Cache(layers=[_RaggedLayer(batch, keys, values, places) for keys, values in pairs])


class _RaggedLayer(CacheLayerMixin):  # type: ignore[misc]
    """Writes the new tokens of all sessions to their places in the pool with one call each for keys and values."""

    is_sliding = False

    def __init__(self, batch: RaggedBatch, keys: Tensor, values: Tensor, places: Tensor) -> None:
        super().__init__()
        self._batch, self._keys, self._values, self._places = batch, keys, values, places

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing is left to do."""

    def update(self, key_states: Tensor, value_states: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """The attention function looks up what each session has by itself; it needs only the batch."""
        self._keys.index_copy_(2, self._places, key_states)
        self._values.index_copy_(2, self._places, value_states)
        return with_batch(key_states, self._batch), value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Of no use to a row of several sessions: `RaggedBatch.masks` has the real ones."""
        return query_length, 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return -1

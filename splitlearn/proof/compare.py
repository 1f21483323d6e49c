"""Is a split of this architecture exactly the whole? Answered by running both on a tiny random copy of it."""

import contextlib
import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from splitlearn.errors import FamilyRefused
from splitlearn.families import structure_of
from splitlearn.plan import SplitPlan
from splitlearn.proof.tiny import VOCABULARY, layer_kinds, tiny_config, tiny_model
from splitlearn.split import CutModel, carve, forward

PREFILL, TOTAL = 9, 14
STEPS = ((0, PREFILL), (PREFILL, PREFILL + 1), (PREFILL + 1, TOTAL - 1), (TOTAL - 1, TOTAL))
"""A prompt, one token, three tokens at once, one token; the sliding window is shorter than the prompt."""
TOLERANCE = 1e-3
"""Between one pass and steps of the same model, which add in another order; relative to the largest logit."""


@dataclass(frozen=True)
class Result:
    """What the proof found for one family. `difference` is the largest of split minus full over all logits."""

    family: str
    architecture: str
    exact: bool
    difference: float | None
    reason: str
    notes: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ()
    """The kinds of layers that the configuration lists: see tiny.layer_kinds."""


def prove(config: Any) -> Result:
    """Run the proof for the architecture of a configuration, at a tiny size. Never raises for what a family does."""
    family, named = str(config.model_type), _class_of(config)
    try:
        model, whole = _whole(config)
        difference = _largest([_difference(model, whole, plan) for plan in _plans(model)])
        notes = _notes(model)
    except FamilyRefused as error:
        return Result(family, named, False, None, str(error).removeprefix(f"{family}: ").rstrip("."))
    except Exception as error:  # whatever a family's own code raises is the answer for that family
        return Result(family, named, False, None, _explained(config, error))
    reason = f"split and full differ by up to {difference:.1e}" if difference else ""
    return Result(family, named, not difference, difference, reason, notes, tuple(sorted(layer_kinds(config))))


def _class_of(config: Any) -> str:
    return getattr(AutoModelForCausalLM._model_mapping.get(type(config), None), "__name__", "")


def _explained(config: Any, error: Exception) -> str:
    """Why a tiny copy or its stages did not run, in words where transformers has a cache of another kind for it."""
    with contextlib.suppress(Exception):
        kinds = {type(layer) for layer in DynamicCache(config=config).layers}
        if others := sorted(kind.__name__ for kind in kinds - {DynamicLayer, DynamicSlidingWindowLayer}):
            return f"its layers keep more than a plain KV cache holds ({', '.join(others)})"
    line = (str(error).strip().splitlines() or [""])[0][:120]
    return f"a tiny copy does not run ({type(error).__name__}: {line})"


def _whole(config: Any) -> tuple[nn.Module, dict[bool, Tensor]]:
    """A tiny copy and its logits: with grouped KV heads if the family can, otherwise without."""
    if getattr(config, "is_encoder_decoder", False):
        raise FamilyRefused("the decoder of an encoder-decoder: not a decoder-only family")
    try:
        model = tiny_model(tiny_config(config, grouped=True))
        return model, _whole_logits(model)
    except Exception:  # one that wants as many KV heads as heads fails in its own way
        model = tiny_model(tiny_config(config, grouped=False))
        return model, _whole_logits(model)


def token_ids() -> Tensor:
    """The text that every proof runs: int64 [1, TOTAL]."""
    return (torch.arange(TOTAL) * 37 % (VOCABULARY - 3) + 2).unsqueeze(0)


@torch.no_grad()
def _own_logits(model: Any, ids: Tensor) -> Tensor:
    """The model called the plain way, [1, T, V]: it chooses positions and masks itself."""
    logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits


def _whole_logits(model: Any) -> dict[bool, Tensor]:
    """The whole model's logits step by step, with a cache (True) and without; checked against its plain call."""
    ids = token_ids()
    own = _own_logits(model, ids)
    if not own.isfinite().all():
        raise FamilyRefused("a tiny copy with random weights gives no finite logits")
    changed = ids.clone()
    changed[0, -1] += 1
    scale = own.abs().max().item()
    if (own - _own_logits(model, changed))[:, :-1].abs().max().item() > TOLERANCE * scale:
        raise FamilyRefused("it looks at later tokens: not a causal decoder as configured")
    stages = cut_whole(model)
    whole = {cached: run_steps(stages, cached) for cached in (True, False)}
    apart = _largest([(own - logits[:, -TOTAL:]).abs().max().item() for logits in whole.values()])
    if not apart <= TOLERANCE * scale:
        raise FamilyRefused(f"in steps over a plain KV cache it differs from one pass by up to {apart:.1e}")
    return whole


def _plans(model: nn.Module) -> Sequence[SplitPlan]:
    """The default, one that starts at layer 0, one that ends at the last layer, and a trunk of all layers."""
    n = structure_of(model).n_layers
    return [SplitPlan.of(None, None, n), SplitPlan(0, n // 2, n), SplitPlan(n // 2, n, n), SplitPlan(0, n, n)]


def _difference(model: nn.Module, whole: dict[bool, Tensor], plan: SplitPlan) -> float:
    stages = cut(model, plan)
    return _largest([(run_steps(stages, cached) - logits).abs().max().item() for cached, logits in whole.items()])


def _largest(values: list[float]) -> float:
    """The largest of them; not a number if any is not, where Python's max may pass over it."""
    return torch.tensor(values, dtype=torch.float64).max().item()


def cut_whole(model: nn.Module) -> list[CutModel]:
    """A copy of a whole model as its one stage."""
    return [carve(copy.deepcopy(model), 0, structure_of(model).n_layers, first=True, last=True)]


def cut(model: nn.Module, plan: SplitPlan) -> list[CutModel]:
    """Bottom, trunk and top of a copy of a whole model."""
    ranges = ((0, plan.start), (plan.start, plan.end), (plan.end, plan.n_layers))
    return [
        carve(copy.deepcopy(model), start, end, first=index == 0, last=index == 2)
        for index, (start, end) in enumerate(ranges)
    ]


@torch.no_grad()
def run_steps(stages: Sequence[CutModel], cached: bool) -> Tensor:
    """Logits of STEPS through a chain of stages, one after the other along dimension 1: [1, T, V].

    Without a cache each step is the whole prefix at position 0, and its logits are all there.
    """
    ids = token_ids()
    caches = [DynamicCache() if cached else None for _ in stages]
    logits = []
    for start, end in STEPS:
        x, position = (ids[:, start:end], start) if cached else (ids[:, :end], 0)
        for stage, cache in zip(stages, caches, strict=True):
            x = forward(stage, x, position, cache)
        logits.append(x)
    return torch.cat(logits, dim=1)


def _notes(model: Any) -> tuple[str, ...]:
    """What of the architecture the proof has covered."""
    config, structure = model.config.get_text_config(decoder=True), structure_of(model)
    kinds = getattr(config, "layer_types", None) or ["sliding"]
    heads, kv_heads = (getattr(config, name, None) for name in ("num_attention_heads", "num_key_value_heads"))
    found = {
        "tied head": bool(getattr(model, "all_tied_weights_keys", None)),
        "sliding window": bool(getattr(config, "sliding_window", None)) and any("sliding" in kind for kind in kinds),
        "grouped KV": bool(heads and kv_heads and kv_heads < heads),
        "learned positions": any(isinstance(model.get_submodule(path), nn.Embedding) for path in structure.before),
        "cannot roll back": not _rolls_back(model),
    }
    return tuple(note for note, present in found.items() if present)


@torch.no_grad()
def _rolls_back(model: nn.Module) -> bool:
    """Do three tokens give the same logits again after the cache was cut back by three?"""
    (stage,) = cut_whole(model)
    prompt, three, cache = token_ids()[:, :PREFILL], token_ids()[:, PREFILL : PREFILL + 3], DynamicCache()
    forward(stage, prompt, 0, cache)
    once = forward(stage, three, PREFILL, cache)
    cache.crop(-3)
    return torch.equal(once, forward(stage, three, PREFILL, cache))

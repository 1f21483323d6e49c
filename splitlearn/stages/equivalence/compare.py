"""Tests whether a split of an architecture gives exactly the logits of the whole model, and the whole those of
transformers' `generate()`.

It runs all three on a tiny random copy, past every boundary that the configuration names.
"""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from splitlearn.errors import FamilyRefused
from splitlearn.models.plan import SplitPlan
from splitlearn.models.structure import structure_of
from splitlearn.stages.equivalence.judge import (
    TOLERANCE,
    TOTAL,
    Text,
    check_whole,
    generated,
    other_token,
    plain_logits,
)
from splitlearn.stages.equivalence.kinds import kinds
from splitlearn.stages.equivalence.steps import LONG, SCRIPTS, SHORT, Script, cut, cut_whole, rolls_back, run_steps
from splitlearn.stages.equivalence.tiny import CONTEXT, boundaries, tiny_config, tiny_model
from splitlearn.stages.equivalence.together import allowed


@dataclass(frozen=True)
class Result:
    """The result of one family's test. `difference` is the largest of split minus full over all logits."""

    family: str
    architecture: str
    exact: bool
    difference: float | None
    reason: str
    notes: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ()
    """The kinds for which the result holds: see stages/equivalence/kinds.py."""
    whole: bool = False
    """Whether the whole model in steps gives what `generate()` gives, so that only a split of it may differ."""
    allows: tuple[str, ...] = ()
    """What else gives the same on either side of each boundary: see stages/equivalence/together.py."""


def prove(config: Any) -> Result:
    """Test the architecture of a configuration, at a tiny size. A family's errors become its result."""
    family, class_name = str(config.model_type), _class_of(config)
    try:
        model, texts, whole = _whole(config)
        difference = _largest([_difference(model, texts, whole, plan) for plan in _plans(model)])
        notes, allows = _notes(model, texts[LONG].ids), allowed(model, texts[SHORT], texts[LONG])
        found = tuple(sorted(kinds(config)))
    except FamilyRefused as error:
        return Result(family, class_name, False, None, str(error).removeprefix(f"{family}: ").rstrip("."))
    except Exception as error:  # any error of a family's own code is the result for that family
        return Result(family, class_name, False, None, _explained(config, error))
    reason = f"split and full differ by up to {difference:.1e}" if difference else ""
    return Result(family, class_name, not difference, difference, reason, notes, found, True, allows)


def _class_of(config: Any) -> str:
    return getattr(MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None), "__name__", "")


def _explained(config: Any, error: Exception) -> str:
    """Why a tiny copy or its stages did not run. Names the layers of the cache if they are not those of a KV cache."""
    if others := _other_layers(config):
        return f"its layers keep more than a plain KV cache holds ({', '.join(others)})"
    line = (str(error).strip().splitlines() or [""])[0][:120]
    return f"a tiny copy does not run ({type(error).__name__}: {line})"


def _other_layers(config: Any) -> list[str]:
    """The layer classes of transformers' cache for this configuration, other than those of a plain KV cache."""
    with contextlib.suppress(Exception):
        found = {type(layer) for layer in DynamicCache(config=config).layers}
        return sorted(kind.__name__ for kind in found - {DynamicLayer, DynamicSlidingWindowLayer})
    return []


Whole = tuple[nn.Module, dict[int, Text], dict[Script, Tensor]]
"""A tiny copy, the reference texts by the length of their prompts, and the whole model's logits in each script."""


def _whole(config: Any) -> Whole:
    """Try with grouped KV heads, and without if the family cannot have them."""
    if getattr(config, "is_encoder_decoder", False):
        raise FamilyRefused("the decoder of an encoder-decoder: not a decoder-only family")
    try:
        return _whole_of(config, grouped=True)
    except FamilyRefused:
        raise
    except Exception:  # families without grouped heads fail in different ways
        if _other_layers(config):
            raise
        return _whole_of(config, grouped=False)


def _whole_of(config: Any, grouped: bool) -> Whole:
    model, texts = _texts(config, grouped)
    return model, texts, {script: _judged(model, texts[script.prompt], script) for script in SCRIPTS}


def _texts(config: Any, grouped: bool) -> tuple[nn.Module, dict[int, Text]]:
    """A tiny copy and its texts. The texts go past its context length if `generate()` does. Otherwise they end with its
    table of positions, or two before that. Our own steps do not influence the choice."""
    *contexts, last = CONTEXT, TOTAL, TOTAL + 2
    for context in contexts:
        try:
            return _texts_of(tiny_config(config, grouped, context))
        except FamilyRefused:
            raise
        except Exception:  # families fail in different ways
            continue
    return _texts_of(tiny_config(config, grouped, last))


def _texts_of(small: Any) -> tuple[nn.Module, dict[int, Text]]:
    model = tiny_model(small)
    check_whole(model)
    return model, {prompt: generated(model, prompt) for prompt in (SHORT, LONG)}


def _judged(model: nn.Module, text: Text, script: Script) -> Tensor:
    """The whole model's logits in the steps of a script. Raises FamilyRefused if they differ from the reference."""
    found = run_steps(cut_whole(model), text.ids, script)
    expected = text.logits
    apart, scale = (found - expected).abs().amax(dim=1), expected.abs().max().item()
    if not apart.max().item() <= TOLERANCE * scale:
        at = int((~(apart <= TOLERANCE * scale)).nonzero()[0])
        steps = "in steps over a plain KV cache" if script.cached else "in steps without a cache"
        by = f"by up to {apart.max().item():.1e}, from token {at} on ({script.name})"
        raise FamilyRefused(f"{steps} it differs from generate() {by}{_also(model, text, at, scale)}")
    if script.cached and (other := other_token(text, found)) is not None:
        raise FamilyRefused(f"its token {other} is not that of generate() ({script.name})")
    return found


def _also(model: nn.Module, text: Text, at: int, scale: float) -> str:
    """An addition to the reason if `generate()` with its own cache differs from one forward, too."""
    own = plain_logits(model, text.ids[:, : at + 1])[0, at]
    return (
        "" if (own - text.logits[at]).abs().max().item() <= TOLERANCE * scale else ", which differs from one pass too"
    )


def _plans(model: nn.Module) -> Sequence[SplitPlan]:
    """The default plan, one that starts at layer 0, one that ends at the last layer, and a trunk of all layers."""
    n = structure_of(model).n_layers
    return [SplitPlan.of(None, None, n), SplitPlan(0, n // 2, n), SplitPlan(n // 2, n, n), SplitPlan(0, n, n)]


def _difference(model: nn.Module, texts: dict[int, Text], whole: dict[Script, Tensor], plan: SplitPlan) -> float:
    stages = cut(model, plan)
    return _largest(
        [
            (run_steps(stages, texts[script.prompt].ids, script) - logits).abs().max().item()
            for script, logits in whole.items()
        ]
    )


def _largest(values: list[float]) -> float:
    """The largest of `values`. NaN if any of them is NaN, which Python's max may miss."""
    return torch.tensor(values, dtype=torch.float64).max().item()


def _notes(model: Any, ids: Tensor) -> tuple[str, ...]:
    """The properties of the architecture that the test has covered."""
    config, structure = model.config.get_text_config(decoder=True), structure_of(model)
    heads, kv_heads = (getattr(config, name, None) for name in ("num_attention_heads", "num_key_value_heads"))
    found = {
        "tied head": bool(getattr(model, "all_tied_weights_keys", None)),
        "grouped KV": bool(heads and kv_heads and kv_heads < heads),
        "learned positions": any(isinstance(model.get_submodule(path), nn.Embedding) for path in structure.before),
        "cannot roll back": not rolls_back(model, ids),
    }
    return (*(note for note, present in found.items() if present), *boundaries(config))

"""Makes a tiny random copy of an architecture: the same class and kinds of layers, some ten thousand weights.

The copy keeps what decides how the architecture computes: tied head, grouped KV heads, rotary positions, kinds of
layers. It also keeps each boundary, a length from which on the model computes otherwise: sliding window, chunk of
attention, original context of scaled rotary positions. Its boundaries are shorter than the test's text. Sizes shrink.
Multipliers of 1 get another value, so that a missing or repeated multiplication shows.
"""

import contextlib
import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from splitlearn.errors import FamilyRefused

LAYERS = 6
MAX_PARAMETERS = 20_000_000
HEADS = 4
HEAD_SIZE = 16
HIDDEN = HEADS * HEAD_SIZE
VOCABULARY = 99
WINDOW, CHUNK, SCALE_FLOOR, ORIGINAL, CONTEXT = 5, 6, 4, 11, 16
"""The boundaries of a tiny copy, in tokens. A text for it is longer than each."""

# SIZES by the whole name, WORDS by the first word that is in the name. The sizes only have to fit each other. An
# attribute that is absent or None stays so, except for ALWAYS.
SIZES: dict[str, int] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "d_model": HIDDEN,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS,
    "head_dim": HEAD_SIZE,
    "max_position_embeddings": CONTEXT,
    "max_seq_len": CONTEXT,
    "n_ctx": CONTEXT,
    "original_max_position_embeddings": ORIGINAL,
    "local_attention": 2 * WINDOW,
    "attention_chunk_size": CHUNK,
    "floor_scale": SCALE_FLOOR,
    "log_scaling_n_floor": SCALE_FLOOR,
    "index_block_size": SCALE_FLOOR,
    "qk_head_dim": HEAD_SIZE,
    "qk_rope_head_dim": HEAD_SIZE // 2,
    "qk_nope_head_dim": HEAD_SIZE // 2,
    "v_head_dim": HEAD_SIZE,
    "rotary_dim": HEAD_SIZE // 2,
    "word_embed_proj_dim": HIDDEN // 2,
    "kv_channels": HEAD_SIZE,
    "n_group": 2,
    "topk_group": 1,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": VOCABULARY,
}
WORDS: dict[str, int] = {
    "window_size": WINDOW,
    "sliding_window": WINDOW,
    "per_tok": 2,
    "topk": 2,
    "top_k": 2,
    "moe_k": 2,
    "shared_experts": 1,
    "intermediate_size": 48,
    "ffn": 48,
    "experts": 4,
    "_rank": 16,
}
CONTEXTS = ("max_position_embeddings", "max_seq_len", "n_ctx")
ALWAYS = ("head_dim", "num_key_value_heads", "num_experts_per_tok", "num_local_experts")
UNIT_WORDS = ("multiplier", "scaling")


def tiny_config(config: Any, grouped: bool, context: int = CONTEXT) -> Any:
    """A shrunk copy of a configuration. `grouped`: two KV heads for the four heads, if the family has KV heads.

    `context` is its length in tokens; a model without a table of positions can go beyond it. Nested configurations
    (such as the text side of a multimodal model) are shrunk, too.
    """
    small = copy.deepcopy(config)
    for part in (small, *(getattr(small, name, None) for name in small.sub_configs)):
        if part is not None:
            _shrink(part, grouped)
            for name in CONTEXTS:
                if getattr(part, name, None):
                    setattr(part, name, context)
    return small


def tiny_model(config: Any, seed: int = 0) -> nn.Module:
    """A model with random float32 weights, in evaluation mode. Raises FamilyRefused if it would still be large."""
    with torch.device("meta"):
        parameters = sum(
            p.numel()
            for p in AutoModelForCausalLM.from_config(copy.deepcopy(config), trust_remote_code=False).parameters()
        )
    if parameters > MAX_PARAMETERS:
        raise FamilyRefused(
            f"{config.model_type}: a tiny copy would still have {parameters / 1e6:.0f} million weights."
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: nn.Module = AutoModelForCausalLM.from_config(config, trust_remote_code=False, dtype=torch.float32)
        for parameter in model.parameters():
            parameter.data.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def _shrink(config: Any, grouped: bool) -> None:
    _shrink_layers(config)
    for name, value in _attributes(config).items():
        if name in ALWAYS or (isinstance(value, int) and not isinstance(value, bool)):
            setattr(config, name, _size(name, value))
        elif value == 1.0 and any(word in name for word in UNIT_WORDS):
            setattr(config, name, 1.25)
    if grouped and "num_key_value_heads" in vars(config):
        config.num_key_value_heads = HEADS // 2
    if hasattr(config, "qk_rope_head_dim"):  # the rotary positions of these are sized by head_dim
        config.head_dim = SIZES["qk_rope_head_dim"]
    _shrink_rotary(config)


def _attributes(config: Any) -> dict[str, Any]:
    """Values by name; the common name if the family has its own, too. Attributes that differ by layer are left out."""
    found = {}
    for name in sorted({*config.attribute_map, *vars(config)} - set(config.attribute_map.values())):
        with contextlib.suppress(Exception):  # reading an attribute that differs by layer raises
            found[name] = getattr(config, name)
    return found


def _size(name: str, value: Any) -> Any:
    if name.endswith("token_id"):
        return value % VOCABULARY
    if value == 0:  # like None: the part does not exist
        return 0
    most = next((size for word, size in WORDS.items() if word in name), value)
    return SIZES.get(name, most if value is None else min(value, most))


def _shrink_layers(config: Any) -> None:
    """Reduce to LAYERS layers, or more if the configuration lists more kinds: each kind remains."""
    count, lists = getattr(config, "num_hidden_layers", None), per_layer(config)
    if not isinstance(count, int) or (count <= LAYERS and lists):
        return
    sampled = _sample(list(zip(*(map(str, value) for value in lists.values()), strict=True)) or [()] * LAYERS)
    for name, value in lists.items():
        setattr(config, name, [value[index] for index in sampled])
    config.num_hidden_layers = len(sampled)


def per_layer(config: Any) -> dict[str, Sequence[Any]]:
    """The lists of a configuration that have an entry for each layer, by name."""
    count = getattr(config, "num_hidden_layers", None)
    return {
        name: value
        for name, value in vars(config).items()
        if isinstance(value, (list, tuple)) and len(value) == count and ("layer" in name or "types" in name)
        if list(value) != list(range(len(value)))  # a list of layer numbers says nothing about kinds
    }


def _sample(kinds: list[tuple[str, ...]]) -> list[int]:
    """Indices of LAYERS layers, more if there are more kinds: the first of each kind, then the first others."""
    firsts = {kind: index for index, kind in reversed(list(enumerate(kinds)))}.values()
    others = [index for index in range(len(kinds)) if index not in firsts]
    return sorted([*firsts, *others[: max(0, LAYERS - len(firsts))]])


def _shrink_rotary(config: Any) -> None:
    """Fit the factors per frequency (longrope, multimodal sections) to the smaller head, and set lengths to the
    boundaries."""
    for rotary in dicts(getattr(config, "rope_parameters", None)):
        share = rotary.get("partial_rotary_factor", getattr(config, "partial_rotary_factor", None)) or 1.0
        frequencies = int(HEAD_SIZE * share) // 2
        for name, value in rotary.items():
            if name.endswith("_factor") and isinstance(value, (list, tuple)):
                rotary[name] = [value[at % len(value)] for at in range(frequencies)] if value else []
            elif name.endswith("max_position_embeddings"):
                rotary[name] = SIZES[name]


def dicts(value: Any) -> Iterator[dict[str, Any]]:
    """`value`, if it is a dict, and the dicts in it."""
    if isinstance(value, dict):
        yield value
        for inner in value.values():
            yield from dicts(inner)


def boundaries(config: Any) -> tuple[str, ...]:
    """The boundaries of a tiny configuration, in words of docs/families.md."""
    kinds = getattr(config, "layer_types", None) or ["sliding"]
    sliding = any(_attributes(config).get(name) for name in ("sliding_window", "window_size", "sliding_window_size"))
    found = {
        "sliding window": sliding and any("sliding" in kind or "local" in kind for kind in kinds),
        "chunked attention": any("chunked" in kind for kind in kinds),
    }
    rotary = {each.get("rope_type", "default") for each in dicts(getattr(config, "rope_parameters", None))}
    special = sorted(rotary - {"default"})
    return (*(name for name, there in found.items() if there), *(f"rope {kind}" for kind in special))

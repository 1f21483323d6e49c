"""Sizes of each part of a split model, computed without reading weights (the command `parts`).

Parameters are counted on the architecture, built on the meta device and cut as when it runs. Formulas predict what a
token adds to the KV cache and to the wire (`kv_bytes_per_token`, `hidden_bytes`).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from splitlearn.checkpoints.folder import ModelFiles, read_config
from splitlearn.models.cut import carve
from splitlearn.models.plan import SplitPlan


@dataclass(frozen=True)
class Part:
    """Sizes of one part: bytes of the weights, and of one more token in the KV cache and on the wire, both ways."""

    name: str
    layers: str
    n_layers: int
    parameters: int
    weight_bytes: int
    kv_bytes_per_token: int
    wire_bytes_per_token: int


def parts(files: ModelFiles, plan: SplitPlan, dtype: torch.dtype) -> tuple[Part, ...]:
    """The client's bottom and top, the whole client, the trunk, and the full model, all in `dtype`.

    A tied embedding counts in the bottom and in the top, but once in the client and in the full model. Raises
    FamilyRefused for an architecture that cannot be cut.
    """
    config: Any = read_config(files.folder)
    n, start, end = plan.n_layers, plan.start, plan.end
    bottom = _parameters(config, 0, start, first=True, last=False)
    trunk = _parameters(config, start, end, first=False, last=False)
    top = _parameters(config, end, n, first=False, last=True)
    full = _parameters(config, 0, n, first=True, last=True)
    hidden = hidden_bytes(config, dtype)

    def part(name: str, layers: str, n_layers: int, has: Mapping[str, int], wire: int) -> Part:
        count = sum(has.values())
        return Part(
            name, layers, n_layers, count, count * dtype.itemsize, kv_bytes_per_token(config, n_layers, dtype), wire
        )

    return (
        part("client bottom", _range(0, start), start, bottom, hidden),
        part("client top", _range(end, n), n - end, top, hidden),
        part("client", f"{_range(0, start)} {_range(end, n)}", n - end + start, {**bottom, **top}, 2 * hidden),
        part("trunk", _range(start, end), end - start, trunk, 2 * hidden),
        part("full", _range(0, n), n, full, 0),
    )


def kv_bytes_per_token(config: Any, n_layers: int, dtype: torch.dtype) -> int:
    """Bytes that one token takes in the KV cache of `n_layers` layers of a model with this configuration.

    2 (a key and a value) * kv_heads * head_dim * layers * bytes per element: Pope et al. 2022, "Efficiently Scaling
    Transformer Inference" (arXiv:2211.05102). kv_heads are those of grouped-query attention (Ainslie et al. 2023,
    arXiv:2305.13245). A sliding window bounds the number of tokens, not the bytes of one. Latent attention (DeepSeek's)
    keeps something else, which this does not predict.
    """
    text = config.get_text_config()
    heads = text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    return int(2 * _kv_heads(text, heads) * head_dim * n_layers * dtype.itemsize)


def hidden_bytes(config: Any, dtype: torch.dtype) -> int:
    """Bytes of one token's hidden state in `dtype`: hidden_size * bytes per element; it crosses the wire each way."""
    return int(config.get_text_config().hidden_size * dtype.itemsize)


def _kv_heads(text: Any, heads: int) -> int:
    """Heads of keys and values, under any of their names; all heads if the configuration names none."""
    if getattr(text, "multi_query", False) and not getattr(text, "new_decoder_architecture", False):
        return 1  # falcon and gpt_bigcode
    named = (getattr(text, name, None) for name in ("num_key_value_heads", "num_kv_heads"))
    return next((int(value) for value in named if value), heads)


def _parameters(config: Any, start: int, end: int, *, first: bool, last: bool) -> dict[str, int]:
    """Elements of each parameter of a stage, by its name in the whole model. Tied parameters share one name."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False, attn_implementation="eager")
    stage = carve(model, start, end, first=first, last=last)
    return {stage.full_name(name): value.numel() for name, value in stage.module.named_parameters()}


def _range(start: int, end: int) -> str:
    return f"[{start}, {end})"

"""What a token takes in the KV cache, by formula from a configuration alone: nothing is built for it.

planning/anatomy.py has the exact sizes of any architecture.
"""

from typing import Any

import torch


def kv_bytes_per_token(config: Any, n_layers: int, dtype: torch.dtype) -> int:
    """Bytes that one token takes in the KV cache of `n_layers` layers of a model with this configuration.

    2 (a key and a value) * kv_heads * head_dim * layers * bytes per element: Pope et al. 2022, "Efficiently Scaling
    Transformer Inference" (arXiv:2211.05102). kv_heads are those of grouped-query attention (Ainslie et al. 2023,
    arXiv:2305.13245). A sliding window bounds the number of tokens, not the bytes of one. Latent attention (DeepSeek's)
    keeps something else, which this does not predict.
    """
    heads, head_dim = kv_shape_by_formula(config)
    return int(2 * heads * head_dim * n_layers * dtype.itemsize)


def kv_shape_by_formula(config: Any) -> tuple[int, int]:
    """Heads of keys and values, and the size of one."""
    text = config.get_text_config()
    heads = text.num_attention_heads
    return _kv_heads(text, heads), getattr(text, "head_dim", None) or text.hidden_size // heads


def _kv_heads(text: Any, heads: int) -> int:
    """Heads of keys and values, under any of their names; all heads if the configuration names none."""
    if getattr(text, "multi_query", False) and not getattr(text, "new_decoder_architecture", False):
        return 1  # falcon and gpt_bigcode
    named = (getattr(text, name, None) for name in ("num_key_value_heads", "num_kv_heads"))
    return next((int(value) for value in named if value), heads)

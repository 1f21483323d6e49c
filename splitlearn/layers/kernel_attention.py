"""Attention of one token in the kernel that also serves sessions that are packed; all else as sdpa.

transformers lets a model run with a registered attention function: this one is chosen where sdpa would be.
"""

from typing import Any

import numpy as np
import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

from splitlearn.kvcache.layers import in_memory

NAME = "splitlearn_rows"


def _attend(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any, **arguments: Any
) -> tuple[torch.Tensor, None]:
    """query [1, heads, T, size] to [1, T, heads, size of values]."""
    if attention_mask is None and query.shape[2] == 1 and arguments.get("position_bias") is None:
        keys, values = in_memory(key), in_memory(value)
        if keys is not None and values is not None and keys[1] == values[1]:
            from splitlearn.kernels.decode_attention import attend  # loads a compiler, of which others have no need

            starts, lengths = np.array([keys[1]]), np.array([key.shape[2]])
            return attend(query, keys[0], values[0], starts, lengths, arguments.get("scaling")), None
    out: torch.Tensor = sdpa_attention_forward(module, query, key, value, attention_mask, **arguments)[0]
    return out, None


AttentionInterface.register(NAME, _attend)
AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])

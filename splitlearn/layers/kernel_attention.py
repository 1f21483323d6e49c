"""Attention of one token in the kernel that also serves sessions that are packed; all else as sdpa.

transformers lets a model run with a registered attention function: this one is chosen where sdpa would be. A compiled
stage calls the kernel as one operation of its graph, since torch.compile cannot look into it.
"""

from typing import Any

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

from splitlearn.kvcache.layers import in_memory

NAME, OP = "splitlearn_rows", "row_attention"
_library = torch.library.Library("splitlearn", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define(f"{OP}(Tensor query, Tensor key, Tensor value, float? scale) -> Tensor")  # type: ignore[no-untyped-call]


def _attend(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any, **arguments: Any
) -> tuple[torch.Tensor, None]:
    """query [1, heads, T, size] to [1, T, heads, size of values]."""
    if attention_mask is None and query.shape[2] == 1 and arguments.get("position_bias") is None:
        by_kernel = torch.ops.splitlearn.row_attention if torch.compiler.is_compiling() else _by_kernel
        found: torch.Tensor | None = by_kernel(query, key, value, arguments.get("scaling"))
        if found is not None:
            return found, None
    out: torch.Tensor = sdpa_attention_forward(module, query, key, value, attention_mask, **arguments)[0]
    return out, None


def _by_kernel(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None) -> torch.Tensor | None:
    """One token's attention; None where the kernel cannot read keys and values."""
    keys, values = in_memory(key), in_memory(value)
    if keys is None or values is None or keys[1] != values[1]:
        return None
    from splitlearn.kernels.decode_attention import attend  # loads a compiler, of which others have no need

    return attend(query, keys[0], values[0], np.array([keys[1]]), np.array([key.shape[2]]), scale)


def _in_graph(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None) -> torch.Tensor:
    """As `_by_kernel`; by sdpa where that cannot."""
    found = _by_kernel(query, key, value, scale)
    if found is not None:
        return found
    out = scaled_dot_product_attention(query, key, value, scale=scale, enable_gqa=True)
    return out.transpose(1, 2).contiguous()


def _shape_in_graph(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None) -> torch.Tensor:
    return query.new_empty(1, 1, query.shape[1], value.shape[3])


_library.impl(OP, _in_graph, "CPU")  # type: ignore[no-untyped-call]
torch.library.register_fake(f"splitlearn::{OP}", _shape_in_graph, lib=_library)
AttentionInterface.register(NAME, _attend)
AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])

"""Memory for keys and values: how much of it the pools of a process get."""

from collections.abc import Sequence

import torch

from splitlearn.errors import InputError
from splitlearn.kvcache.pool import KVPool, bytes_per_token
from splitlearn.runtime import cgroups
from splitlearn.stages.local import LocalStage

# The share of the memory that is free after loading, if no budget is configured.
KV_SHARE = 0.25
# Copies of a token's hidden state that a session holds at most: received, input of the step, output.
ROWS_HELD = 3


def pools(stages: Sequence[LocalStage], kv_bytes: int | None, least_tokens: int, setting: str) -> list[KVPool]:
    """A pool for each of `stages`, all with room for the same tokens, together within `kv_bytes`.

    Blocks have `least_tokens` or more. `setting` is the name of the budget. Raises InputError for one below a block.
    """
    if not stages:
        return []
    tokens = max(stage.block_tokens(least_tokens) for stage in stages)
    block = sum(bytes_per_token(stage.kv_shapes, stage.dtype) * tokens for stage in stages)
    if kv_bytes is None:
        rows = sum(ROWS_HELD * stage.hidden_size * stage.dtype.itemsize * tokens for stage in stages)
        n_blocks = max(1, int(KV_SHARE * free_bytes(stages[0].device)) // (block + rows))
    elif kv_bytes < block:
        raise InputError(setting, kv_bytes, f"at least {block}, the bytes of a block of {tokens} tokens")
    else:
        n_blocks = kv_bytes // block
    return [stage.pool(n_blocks, tokens) for stage in stages]


def free_bytes(device: torch.device) -> int:
    """Free memory of a GPU; for any other device, of the machine or its container."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return cgroups.available_memory()

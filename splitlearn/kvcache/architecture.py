"""Finds what a model's layers keep of a token, without its weights: builds the architecture on the meta device, and
runs one token through it.

    shapes = shapes_of_architecture(build(config))
"""

from typing import Any

import torch
from transformers import AutoModelForCausalLM

from splitlearn.kvcache.pool import KVShape, shapes_of
from splitlearn.models.cut import carve
from splitlearn.models.structure import structure_of

Shapes = list[tuple[KVShape, KVShape]]


def build(config: Any) -> Any:
    """The causal LM of a configuration, without memory for weights. It is in bfloat16, since the meta device has no
    float32 products of experts."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False, dtype=torch.bfloat16).eval()


def shapes_of_architecture(model: Any) -> Shapes:
    """The shapes of keys and values in each layer of a model made by `build`. Cuts the model in place.

    Two families read values in their forward, which the meta device does not have. For them a layer keeps 2 * kv_heads
    * head_dim numbers of a token (Pope et al. 2022, "Efficiently Scaling Transformer Inference", arXiv:2211.05102).
    Raises FamilyRefused for layers that keep something else than keys and values.
    """
    n_layers = structure_of(model).n_layers
    stage = carve(model, 0, n_layers, first=True, last=True)
    try:
        return shapes_of(stage, torch.zeros(1, 1, dtype=torch.long, device="meta"))
    except (NotImplementedError, RuntimeError) as error:
        if "meta tensor" not in str(error):
            raise
        text = model.config.get_text_config()
        heads = text.num_attention_heads
        size = getattr(text, "head_dim", None) or text.hidden_size // heads
        shape = KVShape(int(getattr(text, "num_key_value_heads", None) or heads), int(size))
        return [(shape, shape)] * n_layers


def kv_values(shapes: Shapes) -> tuple[int, ...]:
    """The count of numbers that one token adds to the KV cache of each layer."""
    return tuple(key.heads * key.size + value.heads * value.size for key, value in shapes)

"""What a model's layers keep of a token, found without its weights: the architecture is built on the meta device, and
one token goes through it.

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
    """The causal LM of a configuration, without memory for weights. In bfloat16, since products of experts have no
    float32 form on the meta device."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False, dtype=torch.bfloat16).eval()


def shapes_of_architecture(model: Any) -> Shapes:
    """Keys and values of each layer of a model that `build` made, which is cut in place.

    Two families look at values in their forward, which the meta device does not have; for them it is 2 * kv_heads *
    head_dim (Pope et al. 2022, "Efficiently Scaling Transformer Inference", arXiv:2211.05102). Raises FamilyRefused for
    layers that keep something else than keys and values.
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
    """Numbers that one token leaves in the KV cache of each layer."""
    return tuple(key.heads * key.size + value.heads * value.size for key, value in shapes)

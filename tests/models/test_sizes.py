"""The formula for KV bytes against a real cache."""

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from splitlearn.models.sizes import kv_bytes_per_token
from tests.conftest import TinyFactory

FAMILIES = ["gpt2", "llama", "qwen2", "qwen3", "mistral", "phi3", "gemma2", "gpt_neox", "opt", "bloom", "falcon"]


@pytest.mark.parametrize("family", FAMILIES)
def test_predicted_kv_bytes_are_those_of_a_real_cache(tiny_model: TinyFactory, family: str) -> None:
    files = tiny_model(family)
    config = AutoConfig.from_pretrained(files.folder)
    model: Any = AutoModelForCausalLM.from_pretrained(files.folder)
    cache = DynamicCache()
    with torch.no_grad():
        model(input_ids=torch.arange(7).unsqueeze(0), past_key_values=cache, use_cache=True)
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert kv_bytes_per_token(config, files.n_layers, torch.float32) * 7 == held

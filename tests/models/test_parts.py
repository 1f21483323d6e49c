"""What parts.py predicts against what is really there."""

from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from splitlearn.checkpoints.folder import ModelFiles
from splitlearn.models.plan import SplitPlan
from splitlearn.models.sizes import Part, kv_bytes_per_token, parts
from tests.conftest import TinyFactory

FAMILIES = ["gpt2", "llama", "qwen2", "qwen3", "mistral", "phi3", "gemma2", "gpt_neox", "opt", "bloom", "falcon"]


def by_name(files: ModelFiles, start: int = 2, end: int = 4) -> dict[str, Part]:
    plan = SplitPlan(start, end, files.n_layers)
    return {part.name: part for part in parts(files, plan, torch.float32)}


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


@pytest.mark.parametrize("family", FAMILIES)
def test_full_has_the_parameters_of_the_weights_file(tiny_model: TinyFactory, family: str) -> None:
    files = tiny_model(family)
    with safe_open(files.weights, "pt") as weights:
        stored = sum(weights.get_tensor(name).numel() for name in weights.keys())  # noqa: SIM118 - it is no mapping
    assert by_name(files)["full"].parameters == stored


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("start", "end"), [(0, 6), (2, 4), (0, 1), (5, 6)])
def test_client_and_trunk_together_are_the_full_model(
    tiny_model: TinyFactory, family: str, start: int, end: int
) -> None:
    part = by_name(tiny_model(family), start, end)
    assert part["client"].parameters + part["trunk"].parameters == part["full"].parameters
    assert part["client"].n_layers + part["trunk"].n_layers == part["full"].n_layers


def test_a_tied_embedding_counts_once_for_the_client(tiny_model: TinyFactory) -> None:
    files = tiny_model()
    part = by_name(files)
    embedding = files.facts.vocab_size * files.facts.hidden_size
    assert part["client bottom"].parameters + part["client top"].parameters == part["client"].parameters + embedding


def test_one_hidden_state_crosses_the_wire_each_way(tiny_model: TinyFactory) -> None:
    files = tiny_model()
    part = by_name(files)
    assert part["trunk"].wire_bytes_per_token == 2 * files.facts.hidden_size * 4
    assert part["full"].wire_bytes_per_token == 0


def test_half_the_bytes_in_half_the_precision(tiny_model: TinyFactory) -> None:
    files = tiny_model()
    plan = SplitPlan(2, 4, 6)
    for whole, half in zip(parts(files, plan, torch.float32), parts(files, plan, torch.bfloat16), strict=True):
        assert whole.weight_bytes == 2 * half.weight_bytes
        assert whole.kv_bytes_per_token == 2 * half.kv_bytes_per_token
        assert whole.wire_bytes_per_token == 2 * half.wire_bytes_per_token

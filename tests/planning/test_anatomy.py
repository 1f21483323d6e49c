"""What is said of a model against the real thing: tiny copies of every family that the equivalence test proves."""

import copy
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from splitlearn.checkpoints.folder import ModelFiles
from splitlearn.models.cut import carve
from splitlearn.models.plan import SplitPlan
from splitlearn.planning import anatomy as read_from
from splitlearn.planning.anatomy import Anatomy, Part, parts_of
from splitlearn.planning.anatomy_main import anatomy_of
from splitlearn.stages.equivalence.proven import proven
from splitlearn.stages.equivalence.tiny import tiny_config, tiny_model
from tests.conftest import TinyFactory

CONTEXT, TOKENS = 64, 7
OTHER_FLOPS = {"diffllama", "ernie4_5_moe", "gpt_oss", "llama4", "llama4_text", "modernbert-decoder"}
"""Families that multiply more or less than their matrices once for a token (docs/planning.md)."""


def tiny_copy(family: str) -> tuple[Any, Any]:
    """Its configuration and the model, with grouped KV heads where it runs with them."""
    for grouped in (True, False):
        config = tiny_config(AutoConfig.for_model(family), grouped, CONTEXT)
        try:
            model: Any = tiny_model(config)
            model.set_attn_implementation("eager")
            with torch.no_grad():
                model(input_ids=torch.zeros(1, 2, dtype=torch.long), use_cache=False)
        except Exception:
            continue
        return config, model
    raise AssertionError(f"no tiny copy of {family} runs")


def real_parameters(model: Any, plan: SplitPlan) -> dict[str, int]:
    """Of the parts as they are cut, in numbers that are there once in each."""

    def cut(start: int, end: int, *, first: bool = False, last: bool = False) -> dict[str, int]:
        stage = carve(copy.deepcopy(model), start, end, first=first, last=last)
        return {stage.full_name(name): value.numel() for name, value in stage.module.named_parameters()}

    bottom, top = cut(0, plan.start, first=True), cut(plan.end, plan.n_layers, last=True)
    found = {
        "client bottom": bottom,
        "client top": top,
        "client": {**bottom, **top},
        "trunk": cut(plan.start, plan.end),
        "full": cut(0, plan.n_layers, first=True, last=True),
    }
    return {name: sum(sizes.values()) for name, sizes in found.items()}


def parts(anatomy: Anatomy, start: int, end: int) -> dict[str, Part]:
    return {part.name: part for part in parts_of(anatomy, SplitPlan(start, end, anatomy.n_layers), TOKENS - 1)}


@pytest.mark.parametrize("family", sorted(proven()["families"]))
def test_parameters_kv_values_and_flops_are_those_of_the_real_model(family: str) -> None:
    config, model = tiny_copy(family)
    anatomy, cache = anatomy_of(config, family, "float32", CONTEXT), DynamicCache()
    n = anatomy.n_layers
    for start, end in ((2, n - 2), (0, n)):
        said = {name: part.parameters for name, part in parts(anatomy, start, end).items()}
        assert said == real_parameters(model, SplitPlan(start, end, n))
    ids, counted = torch.arange(TOKENS).unsqueeze(0), FlopCounterMode(display=False)
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # another one multiplies with every expert
    with torch.no_grad():
        model(input_ids=ids[:, :-1], past_key_values=cache)
        with counted:
            model(input_ids=ids[:, -1:], past_key_values=cache)
    held = [layer.keys.nbytes + layer.values.nbytes for layer in cache.layers]
    assert [4 * layer.kv_values * TOKENS for layer in anatomy.layers] == held
    if family not in OTHER_FLOPS:
        assert parts(anatomy, 2, n - 2)["full"].decode_flops == counted.get_total_flops()


def test_full_has_the_parameters_of_the_weights_file(tiny_model: TinyFactory) -> None:
    files = tiny_model()
    with safe_open(files.weights, "pt") as weights:
        stored = sum(weights.get_tensor(name).numel() for name in weights.keys())  # noqa: SIM118 - it is no mapping
    assert read_from.read(files, "float32").parameters == stored


def test_a_tied_embedding_counts_once_for_the_client(tiny_model: TinyFactory) -> None:
    files = tiny_model()
    part = parts(read_from.read(files, "float32"), 2, 4)
    embedding = files.facts.vocab_size * files.facts.hidden_size
    assert part["client bottom"].parameters + part["client top"].parameters == part["client"].parameters + embedding


def test_one_hidden_state_crosses_the_wire_each_way(tiny_model: TinyFactory) -> None:
    files = tiny_model()
    part = parts(read_from.read(files, "float32"), 2, 4)
    assert part["trunk"].wire_bytes_per_token == 2 * files.facts.hidden_size * 4
    assert part["full"].wire_bytes_per_token == 0


def test_half_the_bytes_in_half_the_precision(tiny_model: TinyFactory) -> None:
    files = tiny_model()
    whole, half = (parts(read_from.read(files, dtype), 2, 4).values() for dtype in ("float32", "bfloat16"))
    for one, other in zip(whole, half, strict=True):
        assert one.weight_bytes == 2 * other.weight_bytes
        assert one.kv_bytes == 2 * other.kv_bytes
        assert one.wire_bytes_per_token == 2 * other.wire_bytes_per_token


KINDS = {
    "gpt2": ("MHA", "learned", False, "LayerNorm"),
    "mistral": ("GQA", "rotary", True, "RMSNorm"),
    "falcon": ("MQA", "rotary", False, "LayerNorm"),
    "deepseek_v3": ("MLA", "rotary", True, "RMSNorm"),
    "bloom": ("MHA", "ALiBi", False, "LayerNorm"),
}


@pytest.mark.parametrize("family", KINDS)
def test_attention_positions_mlp_and_norm_have_their_names(family: str) -> None:
    found = anatomy_of(AutoConfig.for_model(family), family, "float32", None)
    layer = found.layers[0]
    assert (layer.attention, found.positions, layer.mlp.gated, layer.norm) == KINDS[family]


def test_windows_experts_and_scaled_positions_are_read() -> None:
    gemma = anatomy_of(AutoConfig.for_model("gemma2"), "gemma", "float32", None)
    assert {layer.window for layer in gemma.layers} == {AutoConfig.for_model("gemma2").sliding_window, None}
    mixtral = anatomy_of(AutoConfig.for_model("mixtral"), "mixtral", "float32", None).layers[0]
    assert (mixtral.mlp.width, mixtral.mlp.experts, mixtral.mlp.active) == (14336, 8, 2)
    (rope,) = anatomy_of(AutoConfig.for_model("gpt_oss"), "gpt_oss", "float32", None).rope
    assert (rope.type, rope.factor, rope.original_context) == ("yarn", 32.0, 4096)


def test_a_prompt_of_one_token_costs_what_one_token_costs(tiny_model: TinyFactory) -> None:
    found = read_from.read(tiny_model(), "float32")
    plan = SplitPlan(2, 4, found.n_layers)
    for first, prompt in zip(parts_of(found, plan, 0), parts_of(found, plan, 1), strict=True):
        assert first.decode_flops == prompt.prefill_flops


@pytest.mark.weights
def test_the_default_model_is_counted_to_the_last_byte(default_model: ModelFiles) -> None:
    found = read_from.read(default_model, "float32")
    model: Any = AutoModelForCausalLM.from_pretrained(default_model.folder, trust_remote_code=False)
    assert found.parameters == sum(parameter.numel() for parameter in model.parameters())
    cache = DynamicCache()
    with torch.no_grad():
        model(input_ids=torch.arange(TOKENS).unsqueeze(0), past_key_values=cache)
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert parts(found, 2, 28)["full"].kv_bytes_per_token * TOKENS == held

"""Split plans, what each stage of a cut model holds, and loading the stages from a file of the whole model."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from splitlearn.errors import InputError
from splitlearn.models.cut import CutModel, carve, forward
from splitlearn.models.plan import SplitPlan
from splitlearn.stages.equivalence.judge import TOTAL, prompt_ids
from splitlearn.stages.equivalence.steps import SCRIPTS, cut, cut_whole, run_steps
from splitlearn.stages.equivalence.tiny import tiny_config, tiny_model

PLAN = SplitPlan(2, 4, 6)


def small(family: str, **changes: Any) -> Any:
    config = tiny_config(AutoConfig.for_model(family), grouped=True, context=TOTAL + 2)
    for name, value in changes.items():
        setattr(config, name, value)
    return config


@pytest.mark.parametrize(
    ("n_layers", "start", "end"),
    [(30, 2, 28), (12, 2, 10), (5, 2, 3), (4, 1, 3), (3, 1, 2), (2, 0, 2), (1, 0, 1)],
)
def test_the_default_plan_leaves_two_layers_at_each_end_where_the_trunk_keeps_one(
    n_layers: int, start: int, end: int
) -> None:
    assert SplitPlan.of(None, None, n_layers) == SplitPlan(start, end, n_layers)


def test_a_plan_with_one_end_given_has_the_default_at_the_other() -> None:
    assert SplitPlan.of(5, None, 12) == SplitPlan(5, 10, 12)
    assert SplitPlan.of(None, 7, 12) == SplitPlan(2, 7, 12)
    assert SplitPlan.of(11, None, 12) == SplitPlan(11, 12, 12)
    assert SplitPlan.of(None, 1, 12) == SplitPlan(0, 1, 12)


@pytest.mark.parametrize(
    ("start", "end", "field"),
    [(-1, 4, "split.start"), (6, 6, "split.start"), (6, None, "split.start"), (2, 2, "split.end"), (2, 7, "split.end"),
     (3, 1, "split.end"), (None, 0, "split.end"), (None, 7, "split.end")],
)  # fmt: skip
def test_a_plan_outside_the_model_is_an_error_that_names_the_field(
    start: int | None, end: int | None, field: str
) -> None:
    with pytest.raises(InputError) as caught:
        SplitPlan.of(start, end, 6)
    assert caught.value.field == field


def test_a_cut_outside_the_model_or_a_middle_stage_without_layers_is_refused() -> None:
    for start, end in ((0, 7), (-1, 2), (4, 3), (3, 3)):
        with pytest.raises(InputError):
            carve(tiny_model(small("llama")), start, end, first=False, last=False)


def test_the_callers_configuration_is_left_as_it_is() -> None:
    model: Any = tiny_model(small("gemma2"))
    config = model.config
    carve(model, 2, 4, first=False, last=False)
    assert (config.num_hidden_layers, len(config.layer_types)) == (6, 6)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "opt", "bloom"])
def test_every_weight_is_in_one_stage_and_only_a_tied_head_in_two(family: str) -> None:
    model = tiny_model(small(family, tie_word_embeddings=True))
    stages = cut(model, PLAN)
    names = [stage.full_name(name) for stage in stages for name, _ in stage.module.named_parameters()]
    assert sorted(set(names)) == sorted(name for name, _ in model.named_parameters())
    twice = {name for name in names if names.count(name) > 1}
    assert twice == {stages[0].full_name(name) for name, _ in stages[0].module.named_parameters() if _is_table(name)}


def _is_table(name: str) -> bool:
    return name in ("wte.weight", "embed_tokens.weight", "word_embeddings.weight")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "opt", "bloom"])
def test_stages_loaded_from_the_whole_models_file_give_its_logits(family: str, tied: bool, tmp_path: Path) -> None:
    config = small(family, tie_word_embeddings=tied)
    model: Any = tiny_model(config)
    file = tmp_path / "model.safetensors"
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_file({name: tensor for name, tensor in state.items() if not (tied and name == "lm_head.weight")}, file)
    stages = [
        load(config, file, start, end, first=start == 0, last=end == 6) for start, end in ((0, 2), (2, 4), (4, 6))
    ]
    for script in SCRIPTS:
        ids = prompt_ids(TOTAL)
        assert torch.equal(run_steps(stages, ids, script), run_steps(cut_whole(model), ids, script))


def load(config: Any, file: Path, start: int, end: int, first: bool, last: bool) -> CutModel:
    """A stage with the file's own tensors, and nothing left on the meta device."""
    with init_empty_weights(include_buffers=False):
        empty = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.float32)
    stage = carve(empty.eval(), start, end, first=first, last=last)
    whole = load_file(file)
    wanted = {name: whole[stage.full_name(name)].clone() for name in stage.module.state_dict()}
    stage.module.load_state_dict(wanted, strict=True, assign=True)
    assert not [name for name, tensor in stage.module.named_parameters() if tensor.is_meta]
    assert not [name for name, tensor in stage.module.named_buffers() if tensor.is_meta]
    return stage


def test_a_client_with_no_layers_below_has_the_embeddings_and_one_with_none_above_the_norm_and_head() -> None:
    model = tiny_model(small("llama", tie_word_embeddings=False))
    bottom, trunk, top = cut(model, SplitPlan(0, 6, 6))
    assert [name for name, _ in bottom.module.named_parameters()] == ["embed_tokens.weight"]
    assert {name for name, _ in top.module.named_parameters()} == {"model.norm.weight", "lm_head.weight"}
    assert all(name.startswith("layers.") for name, _ in trunk.module.named_parameters())


def test_only_the_logits_asked_for_are_given() -> None:
    (stage,) = cut_whole(tiny_model(small("llama")))
    with torch.no_grad():
        every = forward(stage, prompt_ids(TOTAL), 0, DynamicCache())
        last = forward(stage, prompt_ids(TOTAL), 0, DynamicCache(), logits_to_keep=1)
    assert last.shape == (1, 1, every.shape[-1])
    torch.testing.assert_close(last, every[:, -1:])


def test_a_rolled_back_cache_gives_the_same_logits_again() -> None:
    stages = cut(tiny_model(small("gemma2")), PLAN)
    caches = [DynamicCache() for _ in stages]
    prompt, more = prompt_ids(TOTAL)[:, :9], prompt_ids(TOTAL)[:, 9:12]

    def step(x: torch.Tensor, position: int) -> torch.Tensor:
        for stage, cache in zip(stages, caches, strict=True):
            x = forward(stage, x, position, cache)
        return x

    with torch.no_grad():
        step(prompt, 0)
        once = step(more, 9)
        for cache in caches:
            cache.crop(-3)
        assert torch.equal(step(more, 9), once)


@given(st.none() | st.integers(-2, 9), st.none() | st.integers(-2, 9), st.integers(1, 8))
def test_a_plan_of_any_numbers_is_whole_or_refused_by_the_field(start: int | None, end: int | None, n: int) -> None:
    fits = (start is None or 0 <= start < n) and (end is None or 0 < end <= n)
    fits = fits and (start is None or end is None or start < end)
    try:
        plan = SplitPlan.of(start, end, n)
    except InputError as error:
        assert not fits
        assert error.field in ("split.start", "split.end")
        return
    assert fits
    assert 0 <= plan.start < plan.end <= n == plan.n_layers
    assert start in (None, plan.start) and end in (None, plan.end)

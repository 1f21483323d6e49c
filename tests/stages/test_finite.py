"""A stage that computes what is no number says in which layer it began, and what helps."""

import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from splitlearn.checkpoints.folder import ModelFiles
from splitlearn.errors import NotFinite
from splitlearn.stages import loading
from splitlearn.stages.base import StageInput
from splitlearn.stages.local import LocalStage
from splitlearn.stages.nonfinite import first_not_finite
from splitlearn.stages.session import LocalSession
from splitlearn.stages.verify import agree
from tests.conftest import TinyFactory
from tests.support.trunk import PLAN
from tests.support.words import load_of, session_of

CACHED = frozenset({"use_cache", "inference_mode"})


@pytest.fixture(params=["llama", "gpt2", "gemma2"])
def stage(request: pytest.FixtureRequest, tiny_model: TinyFactory) -> LocalStage:
    """The trunk's stage, layers 2 and 3 of 6, of a model of each kind."""
    placement = loading.Placement(torch.device("cpu"), torch.float32)
    return loading.load(tiny_model(request.param), loading.trunk_specs(PLAN), load_of(frozenset()), placement).stages[0]


def poison(stage: LocalStage, index: int, value: float) -> None:
    """Put `value` into the last weight matrix of the stage's layer `index`."""
    layers = next(module for module in stage.cut.module.modules() if isinstance(module, nn.ModuleList))
    matrix = [parameter for parameter in layers[index].parameters() if parameter.dim() == 2][-1]
    with torch.inference_mode():
        matrix.data = torch.full_like(matrix, value)


def run(stage: LocalStage, session: LocalSession, position: int, tokens: int) -> Callable[[], torch.Tensor]:
    x = torch.randn(1, tokens, 48, generator=torch.Generator().manual_seed(position))
    return lambda: stage.compute([StageInput(session, position, x)])[0].x


def hooks_of(stage: LocalStage) -> int:
    return sum(len(module._forward_hooks) for module in stage.cut.module.modules())


@pytest.mark.parametrize("value", [math.nan, math.inf], ids=str)
@pytest.mark.parametrize("index", [0, 1])
def test_the_first_layer_whose_numbers_are_not_finite_is_named(stage: LocalStage, index: int, value: float) -> None:
    session = stage.open(session_of(CACHED), 64)
    assert run(stage, session, 0, 5)().isfinite().all()
    poison(stage, index, value)
    step = run(stage, session, 5, 1)
    assert not step().isfinite().all()
    found = first_not_finite(stage.cut, step)
    assert found is not None and found[0] == f"layer {PLAN.start + index}"


def test_nothing_is_named_where_all_is_finite_and_nothing_is_left_behind(stage: LocalStage) -> None:
    session = stage.open(session_of(CACHED), 64)
    step = run(stage, session, 0, 5)
    before, hooks = step(), hooks_of(stage)
    assert first_not_finite(stage.cut, step) is None
    assert hooks_of(stage) == hooks
    assert torch.equal(step(), before)


HALF = loading.Placement(torch.device("cpu"), torch.float16)


def whole(files: ModelFiles, placement: loading.Placement = HALF, flags: frozenset[str] = frozenset()) -> LocalStage:
    return loading.load(files, loading.full_specs(6), load_of(flags), placement).stages[0]


def said(stage: LocalStage, tokens: int = 5) -> str:
    """What the stage's step ends with."""
    session = stage.open(session_of(CACHED), 64)
    with pytest.raises(NotFinite) as found:
        stage.step([StageInput(session, 0, torch.arange(tokens)[None])])
    return str(found.value)


def scale(stage: LocalStage, path: str, factor: float) -> None:
    module: Any = stage.cut.module.get_submodule(path)
    with torch.inference_mode():
        module.weight = nn.Parameter(module.weight * factor, requires_grad=False)


@pytest.mark.parametrize(
    ("path", "where"),
    [
        ("model.layers.0.mlp.down_proj", "layer 0"),
        ("model.layers.3.mlp.down_proj", "layer 3"),
        ("model.layers.5.self_attn.o_proj", "layer 5"),
        ("lm_head", "the LM head"),
    ],
)
def test_what_overflows_float16_is_named_with_what_helps(tiny_model: TinyFactory, path: str, where: str) -> None:
    stage = whole(tiny_model("llama"))
    scale(stage, path, 60_000.0)
    if where != "the LM head":
        scale(stage, path.replace("down", "up").replace("o_proj", "v_proj"), 60_000.0)
    else:
        scale(stage, "model.norm", 60_000.0 / 10)
    told = said(stage)
    assert f"first in {where}" in told and "set model.dtype to bfloat16 or float32" in told


@pytest.mark.parametrize(
    ("path", "where"),
    [
        ("model.embed_tokens", "the embeddings"),
        ("model.layers.2.mlp.up_proj", "layer 2"),
        ("model.norm", "the final norm"),
    ],
)
def test_weights_that_are_no_numbers_are_named(tiny_model: TinyFactory, path: str, where: str) -> None:
    stage = whole(tiny_model("llama"), loading.Placement(torch.device("cpu"), torch.float32))
    scale(stage, path, math.nan)
    told = said(stage)
    assert f"first in {where}. Its weights hold numbers that are not finite: {path}.weight" in told
    assert "neither model.dtype bfloat16 nor float32 helps" in told


def test_masked_tokens_are_no_fault_and_a_row_of_nothing_else_is(tiny_model: TinyFactory) -> None:
    stage = whole(tiny_model("llama"))
    head = stage.cut.module.get_output_embeddings()  # type: ignore[operator]
    masked = [7, 9]

    def mask(module: nn.Module, inputs: object, output: torch.Tensor) -> torch.Tensor:
        return output.index_fill(-1, torch.tensor(masked), -math.inf)

    head.register_forward_hook(mask)
    session = stage.open(session_of(CACHED), 64)
    out = stage.step([StageInput(session, 0, torch.arange(5)[None], logits=3)])[0].x
    assert out.shape[1] == 3 and bool(out[..., masked].isinf().all())
    masked[:] = range(out.shape[2])
    assert "-inf at position 4" in said(stage)


def test_a_step_after_a_good_one_and_one_of_many_tokens_alike_end_with_an_error(tiny_model: TinyFactory) -> None:
    stage = whole(tiny_model("llama"))
    session = stage.open(session_of(CACHED), 64)
    stage.step([StageInput(session, 0, torch.arange(5)[None])])
    scale(stage, "model.layers.4.mlp.down_proj", math.inf)
    with pytest.raises(NotFinite, match=r"at position 5, first in layer 4\. Its weights .*layers\.4\.mlp\.down_proj"):
        stage.step([StageInput(session, 5, torch.tensor([[3]]))])


def test_layers_that_give_no_numbers_share_no_forward_and_raise_nothing_when_tried(stage: LocalStage) -> None:
    poison(stage, 0, math.nan)
    assert stage.packs(session_of(CACHED)) is False


@pytest.mark.parametrize("value", [math.nan, math.inf], ids=str)
def test_nothing_agrees_with_what_is_not_finite(value: float) -> None:
    x = torch.tensor([1.0, value])
    assert agree(x, x, 1e-3) is False
    assert agree(torch.ones(2), x, 1e-3) is False
    assert agree(torch.ones(2), torch.ones(2) + 1e-4, 1e-3) is True


@pytest.mark.parametrize("value", [math.nan, 1e6])
def test_weights_that_blocks_cannot_hold_are_refused_by_name(
    tiny_model: TinyFactory, tmp_path: Path, value: float
) -> None:
    files = tiny_model("llama")
    tensors = load_file(files.weights)
    name = "model.layers.3.mlp.down_proj.weight"
    tensors[name][2, 3] = value
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(files.folder / "config.json", tmp_path)
    other = replace(files, folder=tmp_path)
    with pytest.raises(NotFinite, match=rf"{name}: Blocks of 4 bits .*weight_dtype.*model.dtype"):
        whole(other, loading.Placement(torch.device("cpu"), torch.float32), frozenset({"weight_dtype=int4"}))

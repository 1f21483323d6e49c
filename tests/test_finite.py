"""A trunk that computes what is no number says in which layer it began."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import nn

from splitlearn import loading
from splitlearn.finite import first_not_finite
from splitlearn.local_stage import LocalSession, LocalStage
from splitlearn.stages import StageInput
from tests.conftest import TinyFactory
from tests.trunk import PLAN
from tests.words import load_of, session_of

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
    return lambda: stage.step([StageInput(session, position, x)])[0].x


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
    assert first_not_finite(stage.cut, step) == PLAN.start + index


def test_nothing_is_named_where_all_is_finite_and_nothing_is_left_behind(stage: LocalStage) -> None:
    session = stage.open(session_of(CACHED), 64)
    step = run(stage, session, 0, 5)
    before, hooks = step(), hooks_of(stage)
    assert first_not_finite(stage.cut, step) is None
    assert hooks_of(stage) == hooks
    assert torch.equal(step(), before)

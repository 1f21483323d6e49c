"""Sampling: parameters that make no sense are refused, both top-k ways agree, the filters keep what they should."""

import math

import pytest
import torch

from splitlearn.errors import InputError, NotFinite
from splitlearn.sampling import SamplingParams, _top_p, random_source, sample, top_k_by_selection, top_k_by_sort


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("temperature", bad) for bad in (-1.0, 1e-40, math.nan, math.inf, True)),
        *(("top_k", bad) for bad in (-1, 1.5)),
        *(("top_p", bad) for bad in (0.0, 1.01, math.nan)),
        *(("repetition_penalty", bad) for bad in (0.0, -1.0, math.nan)),
        *(("seed", bad) for bad in (-1, 2**63)),
    ],
)
def test_a_parameter_out_of_range_is_refused_by_name(field: str, value: float) -> None:
    with pytest.raises(InputError) as refused:
        SamplingParams(**{field: value})  # type: ignore[arg-type]
    assert refused.value.field == field


@pytest.mark.parametrize("k", [1, 2, 50, 999])
def test_both_ways_of_top_k_are_bit_equal(k: int) -> None:
    scores = torch.randn(1000, generator=torch.Generator().manual_seed(k))
    assert torch.equal(top_k_by_sort(scores, k), top_k_by_selection(scores, k))


def test_both_ways_of_top_k_keep_every_score_that_ties_with_the_last() -> None:
    scores = torch.tensor([1.0, 3.0, 2.0, 2.0, 2.0, 0.0])
    kept = top_k_by_sort(scores, 2)
    assert torch.equal(kept, top_k_by_selection(scores, 2))
    assert kept.isfinite().tolist() == [False, True, True, True, True, False]


def test_greedy_takes_the_largest_logit() -> None:
    logits = torch.tensor([0.1, 5.0, -2.0])
    assert sample(logits, SamplingParams(), [], random_source(SamplingParams()), top_k_by_sort) == 1


def test_a_repetition_penalty_lowers_what_was_said() -> None:
    params = SamplingParams(repetition_penalty=2.0)
    logits = torch.tensor([3.0, 4.0, -1.0])
    assert sample(logits, params, [1], random_source(params), top_k_by_sort) == 0
    negative = torch.tensor([-3.0, -2.0, -9.0])
    assert sample(negative, params, [1], random_source(params), top_k_by_sort) == 0


def test_the_same_seed_draws_the_same_tokens() -> None:
    params = SamplingParams(temperature=0.8, top_k=50, top_p=0.9, seed=7)
    logits = torch.randn(400, generator=torch.Generator().manual_seed(1))
    drawn = [_draw(logits, params, 20) for _ in range(2)]
    assert drawn[0] == drawn[1]
    assert _draw(logits, SamplingParams(temperature=0.8, top_k=50, top_p=0.9, seed=8), 20) != drawn[0]


def test_top_p_keeps_the_fewest_tokens_that_reach_it() -> None:
    params = SamplingParams(temperature=1.0, top_p=0.6, seed=1)
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    assert set(_draw(logits, params, 200)) == {0, 1}


@pytest.mark.parametrize("spread", [0.01, 1.0, 5.0])  # of 1,000 tokens top-p keeps most, some, few
@pytest.mark.parametrize("top_p", [1e-6, 0.5, 0.9, 0.9999])
def test_top_p_keeps_what_sorting_all_would(spread: float, top_p: float) -> None:
    scores = spread * torch.randn(1000, generator=torch.Generator().manual_seed(3))
    scores[::7] = -torch.inf  # as a top-k leaves them
    ordered, order = scores.softmax(-1).double().sort(descending=True)
    wanted = order[: 1 + int((ordered.cumsum(-1) < top_p).sum())]
    kept = _top_p(scores, top_p)
    assert set(kept.isfinite().nonzero().flatten().tolist()) == set(wanted.tolist())
    assert torch.equal(kept[wanted], scores[wanted])


def _draw(logits: torch.Tensor, params: SamplingParams, count: int) -> list[int]:
    rng = random_source(params)
    return [sample(logits, params, [], rng, top_k_by_selection) for _ in range(count)]


@pytest.mark.parametrize("params", [SamplingParams(), SamplingParams(temperature=1.0, top_k=2, top_p=0.9)], ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_no_token_is_chosen_from_what_is_no_number(params: SamplingParams, value: float) -> None:
    for logits in (torch.tensor([0.0, value, 1.0]), torch.full((3,), -math.inf)):
        with pytest.raises(NotFinite, match=r"largest logit is .*bfloat16 or float32"):
            sample(logits, params, [], random_source(params), top_k_by_selection)


@pytest.mark.parametrize("params", [SamplingParams(), SamplingParams(temperature=1.0, top_k=2, top_p=0.9)], ids=str)
def test_masked_tokens_are_not_chosen(params: SamplingParams) -> None:
    logits = torch.tensor([-math.inf, 1.0, -math.inf, -math.inf])
    assert sample(logits, params, [], random_source(params), top_k_by_selection) == 1


def test_a_penalty_does_not_overflow_float16() -> None:
    params = SamplingParams(repetition_penalty=0.01)
    logits = torch.tensor([3000.0, 2000.0, 10.0], dtype=torch.float16)
    assert sample(logits, params, [1], random_source(params), top_k_by_selection) == 1

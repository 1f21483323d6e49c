"""Sampling: parameters that make no sense are refused, both top-k ways agree, the filters keep what they should."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from splitlearn.errors import InputError, NotFinite
from splitlearn.generation.sampler import _top_p, random_source, sample, top_k_by_selection, top_k_by_sort
from splitlearn.sampling import SamplingParams


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("temperature", bad) for bad in (-1.0, 1e-40, math.nan, math.inf, True)),
        *(("top_k", bad) for bad in (-1, 1.5)),
        *(("top_p", bad) for bad in (0.0, 1.01, math.nan)),
        *(("repetition_penalty", bad) for bad in (0.0, -1.0, math.nan)),
        *(("frequency_penalty", bad) for bad in (-2.1, math.nan)),
        *(("presence_penalty", bad) for bad in (2.1, True)),
        *(("logit_bias", ((bad, 0.0),)) for bad in (-1, 1.5)),
        *(("logit_bias", ((0, bad),)) for bad in (-101.0, math.inf)),
        *(("seed", bad) for bad in (-1, 2**63)),
    ],
)
def test_a_parameter_out_of_range_is_refused_by_name(field: str, value: object) -> None:
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


SCORES = st.lists(st.floats(-30, 30, width=32), min_size=1, max_size=40)


def _slow_top_k(scores: list[float], k: int) -> list[bool]:
    """Which scores are at least the k-th largest."""
    threshold = sorted(scores, reverse=True)[k - 1]
    return [score >= threshold for score in scores]


@given(SCORES, st.data())
def test_both_ways_of_top_k_keep_what_a_slow_reference_keeps(scores: list[float], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(scores)))
    for top_k in (top_k_by_sort, top_k_by_selection):
        assert top_k(torch.tensor(scores), k).isfinite().tolist() == _slow_top_k(scores, k)


@given(SCORES, st.floats(0.01, 0.99))
def test_a_token_that_top_p_leaves_out_is_never_drawn(scores: list[float], top_p: float) -> None:
    order = sorted(range(len(scores)), key=lambda at: -scores[at])
    weights = torch.tensor(scores, dtype=torch.float64).softmax(-1).tolist()
    kept, reached = set[int](), 0.0
    for at in order:
        kept.add(at)
        reached += weights[at]
        if reached >= top_p + 1e-5:  # float32's rounding may keep one more
            break
    ties = {at for at in range(len(scores)) if any(scores[at] == scores[other] for other in kept)}
    params = SamplingParams(temperature=1.0, top_p=top_p, seed=3)
    assert set(_draw(torch.tensor(scores), params, 20)) <= kept | ties


@given(SCORES, st.lists(st.integers(0, 39), max_size=6), st.floats(0.5, 2))
def test_a_penalty_divides_what_is_above_zero_and_multiplies_what_is_below(
    scores: list[float], previous: list[int], penalty: float
) -> None:
    seen = {token for token in previous if token < len(scores)}
    expected = [
        (score / penalty if score >= 0 else score * penalty) if at in seen else score for at, score in enumerate(scores)
    ]
    params = SamplingParams(repetition_penalty=penalty)
    chosen = sample(torch.tensor(scores), params, sorted(seen), random_source(params), top_k_by_sort)
    assert expected[chosen] == pytest.approx(max(expected), rel=1e-5, abs=1e-30)


@given(
    scores=st.lists(st.integers(-50, 50), min_size=3, max_size=3),
    ids=st.lists(st.integers(0, 2), max_size=8),
    prompt=st.integers(0, 8),
    frequency=st.integers(-4, 4),
    presence=st.integers(-4, 4),
    bias=st.integers(-100, 100),
)
def test_penalties_and_bias_move_logits_as_a_slow_reference_moves_them(
    scores: list[int], ids: list[int], prompt: int, frequency: int, presence: int, bias: int
) -> None:
    params = SamplingParams(
        frequency_penalty=frequency / 2, presence_penalty=presence / 2, logit_bias=((1, float(bias)),)
    )
    answer = ids[prompt:]
    moved = [
        score - answer.count(token) * frequency / 2 - (token in answer) * presence / 2 + (bias if token == 1 else 0)
        for token, score in enumerate(scores)
    ]
    chosen = sample(torch.tensor(scores).float(), params, ids, random_source(params), top_k_by_sort, prompt)
    assert moved[chosen] == max(moved)  # all are exact in float32


def test_a_bias_of_what_is_no_token_is_refused() -> None:
    params = SamplingParams(logit_bias=((3, 1.0),))
    with pytest.raises(InputError, match="token ids below 3"):
        sample(torch.zeros(3), params, [], random_source(params), top_k_by_sort)

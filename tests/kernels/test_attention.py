"""One token of each of many sessions is attended as torch's sdpa would, from that session's own keys alone."""

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from torch.nn.functional import scaled_dot_product_attention

from splitlearn.kernels.decode_attention import attend
from splitlearn.kvcache.pool import KVPool, KVShape, Slot

BLOCK = 8


@dataclass(frozen=True)
class Case:
    """Sessions with keys and values in a pool of one layer, NaN elsewhere; their query is [1, heads, T, size]."""

    pool: KVPool
    runs: list[Slot]
    query: torch.Tensor

    def attended(self, scale: float | None = None) -> torch.Tensor:
        keys, values = self.pool.arrays
        starts, lengths = (np.array(each) for each in zip(*((run.start, run.tokens) for run in self.runs), strict=True))
        return attend(self.query, keys, values, starts, lengths, scale)

    def expected(self, scale: float | None = None) -> torch.Tensor:
        """Of torch's own attention in float32, for each session alone."""
        rows = []
        for index, run in enumerate(self.runs):
            keys, values = (view.float() for view in self.pool.views(run.start, run.tokens))
            query = self.query[:, :, index : index + 1].float()
            rows.append(scaled_dot_product_attention(query, keys, values, scale=scale, enable_gqa=True))
        return torch.cat(rows, dim=2).transpose(1, 2)


def case(
    lengths: list[int], groups: int = 3, shared: int = 3, sizes: tuple[int, int] = (64, 64), dtype: str = "float32"
) -> Case:
    """Sessions of these lengths, the second half of them before the first half in the pool, with gaps between."""
    kind = getattr(torch, dtype)
    shapes = [(KVShape(groups, sizes[0]), KVShape(groups, sizes[1]))]
    pool = KVPool(shapes, sum(-(-length // BLOCK) + 1 for length in lengths), BLOCK, kind, torch.device("cpu"))
    for view in pool.views(0, pool.capacity):
        view.fill_(math.nan)
    runs, random = {}, torch.Generator().manual_seed(sum(lengths))
    order = list(range(len(lengths)))
    for index in order[len(order) // 2 :] + order[: len(order) // 2]:
        reserved = pool.reserve(lengths[index] + 1)
        assert reserved is not None
        runs[index] = Slot(reserved.start, lengths[index])
        for view in pool.views(reserved.start, lengths[index]):
            view.normal_(generator=random)
    query = torch.randn(1, groups * shared, len(lengths), sizes[0], generator=random)
    return Case(pool, [runs[index] for index in order], query.to(kind))


SIZES = some.sampled_from([16, 20, 32, 64, 80, 96, 128])


@settings(deadline=None, max_examples=60)
@given(
    lengths=some.lists(some.integers(1, 300), min_size=1, max_size=12),
    groups=some.integers(1, 4),
    shared=some.integers(1, 8),
    sizes=some.tuples(SIZES, SIZES),
    scale=some.sampled_from([None, 0.05, 0.3]),
)
def test_each_session_gets_what_sdpa_gives_it_alone_whatever_lies_beside_its_keys(
    lengths: list[int], groups: int, shared: int, sizes: tuple[int, int], scale: float | None
) -> None:
    made = case(lengths, groups, shared, sizes)
    torch.testing.assert_close(made.attended(scale), made.expected(scale), rtol=1e-5, atol=1e-5)


def test_bfloat16_is_read_exactly_and_rounded_once() -> None:
    made = case([1, 7, 200, 33], dtype="bfloat16")
    assert made.attended().dtype == torch.bfloat16
    torch.testing.assert_close(made.attended().float(), made.expected(), rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["query", "keys", "values"])
def test_what_is_no_number_reaches_its_own_session_and_no_other(where: str, value: float) -> None:
    made = case([40, 41, 42, 43])
    clean, run = made.attended(), made.runs[2]
    if where == "query":
        made.query[:, :, 2, 5] = value
    else:
        made.pool.views(run.start, run.tokens)[where == "values"][:, :, 17, 5] = value
    spoiled, expected = made.attended(), made.expected()
    assert not spoiled[:, 2].isfinite().all()
    assert torch.equal(spoiled[:, 2].isnan().any(-1), expected[:, 2].isnan().any(-1))
    others = [0, 1, 3]
    assert torch.equal(spoiled[:, others], clean[:, others])


def test_scores_far_apart_leave_the_largest_alone() -> None:
    made = case([50])
    made.query.mul_(1e4)
    torch.testing.assert_close(made.attended(), made.expected(), rtol=1e-5, atol=1e-5)

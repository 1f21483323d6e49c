"""One token attends as sdpa would, from every kind of cache; whatever the kernel cannot do is left to sdpa."""

from collections.abc import Callable

import pytest
import torch
from transformers.cache_utils import Cache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from splitlearn.arms.compare import KINDS
from splitlearn.flags.selection import FlagSet
from splitlearn.kernels import decode_attention
from splitlearn.kvcache.layers import dynamic, reserved
from splitlearn.kvcache.pool import KVPool, KVShape
from splitlearn.lab.logit_fidelity import FixedInput
from splitlearn.lab.logits import logits
from splitlearn.layers import kernel_attention
from splitlearn.layers.kernel_attention import _attend
from splitlearn.models.plan import SplitPlan
from splitlearn.stages import loading
from tests.conftest import TinyFactory
from tests.stages.test_proof import TEN
from tests.support.words import load_of

APPLIED = frozenset({"low_cpu_mem_usage", "use_cache", "cache", "output_attentions", "inference_mode"})
HEADS, GROUPS, SIZE = 6, 2, 8


class _Layer:
    is_causal = True
    num_key_value_groups = HEADS // GROUPS
    training = False


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The keys that each call of the kernel was given."""
    seen, attend = list[int](), decode_attention.attend

    def counted(*arguments: object) -> torch.Tensor:
        seen.append(int(arguments[4][0]))  # type: ignore[index]
        return attend(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(decode_attention, "attend", counted)
    return seen


def _kept(cache: Cache, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    made = [cache.update(*torch.randn(2, 1, GROUPS, count, SIZE), layer_idx=1) for count in (tokens - 1, 1)]
    return made[-1]  # type: ignore[no-any-return]


def _pooled(layers: int, max_length: int) -> Cache:
    shape = KVShape(GROUPS, SIZE)
    pool = KVPool([(shape, shape)] * layers, 20, 8, torch.float32, torch.device("cpu"))
    before, run = pool.reserve(24), pool.reserve(max_length)
    assert before is not None and run is not None and run.start == 24
    return pool.cache(run)


@pytest.mark.parametrize("make", [dynamic, reserved, _pooled])
@pytest.mark.parametrize("scaling", [None, 0.3])
def test_one_token_attends_as_by_sdpa(
    make: Callable[[int, int], Cache], scaling: float | None, calls: list[int]
) -> None:
    keys, values = _kept(make(2, 40), 33)
    query = torch.randn(1, HEADS, 1, SIZE)
    expected = sdpa_attention_forward(_Layer(), query, keys, values, None, scaling=scaling)[0]
    found, _ = _attend(_Layer(), query, keys, values, None, scaling=scaling)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert calls == [33]


def test_what_the_kernel_cannot_do_is_left_to_sdpa(calls: list[int]) -> None:
    keys, values = torch.randn(2, 1, GROUPS, 12, SIZE)
    row, rows = torch.randn(1, HEADS, 1, SIZE), torch.randn(1, HEADS, 3, SIZE)
    mask = torch.zeros(1, 1, 1, 12)
    other = keys.transpose(1, 2).contiguous().transpose(1, 2)
    for query, key, masked in ((rows, keys, None), (row, keys, mask), (row, other, None)):
        expected = sdpa_attention_forward(_Layer(), query, key, values, masked)[0]
        assert torch.equal(_attend(_Layer(), query, key, values, masked)[0], expected)
    assert calls == []


@pytest.mark.parametrize("family", TEN)
def test_families_split_to_the_bit_and_are_near_what_they_were(tiny_model: TinyFactory, family: str) -> None:
    files = tiny_model(family, n_layers=3)
    plan, ids, flags = SplitPlan(1, 2, 3), tuple(range(3, 12)), APPLIED | {"row_attention"}
    by_kernel = {
        kind: logits(FixedInput(files, plan, kind, FlagSet(flags, flags, flags), ids, 5, threads=1)) for kind in KINDS
    }
    by_sdpa = logits(FixedInput(files, plan, "full", FlagSet(APPLIED, APPLIED, APPLIED), ids, 5, threads=1))
    assert torch.equal(by_kernel["full"], by_kernel["split"])
    torch.testing.assert_close(by_kernel["full"], by_sdpa, rtol=1e-4, atol=1e-4)


def test_a_models_own_eager_attention_is_left(tiny_model: TinyFactory) -> None:
    placement = loading.Placement(torch.device("cpu"), torch.float32)
    for family, chosen in (("llama", kernel_attention.NAME), ("gemma2", "eager")):
        stage = loading.load(
            tiny_model(family, n_layers=2), loading.full_specs(2), load_of(APPLIED | {"row_attention"}), placement
        )
        assert {config._attn_implementation for config in stage.stages[0].cut.configs} == {chosen}

"""Weights in blocks: what they stand for, the products with them, and a model whose layers have them."""

from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, dequantize, quantize
from hypothesis import given, settings
from hypothesis import strategies as some
from torch.nn.functional import linear

from splitlearn.arms.compare import KINDS
from splitlearn.checkpoints.folder import ModelFiles
from splitlearn.flags.selection import FlagSet
from splitlearn.kernels.block_format import BITS, GROUP, LANES, block_bytes, from_blocks, to_blocks
from splitlearn.kernels.block_matmul import multiply
from splitlearn.kernels.block_values import to_bfloat16
from splitlearn.lab.logit_fidelity import FixedInput
from splitlearn.lab.logits import logits
from splitlearn.layers.block_linear import MANY, MANY_ROWS, BlockLinear, in_one_memory
from splitlearn.models.plan import SplitPlan
from splitlearn.runtime.torch_threads import computing_on
from splitlearn.stages import loading
from tests.conftest import TinyFactory
from tests.stages.test_proof import TEN
from tests.support.words import load_of

FEW_BITS = (4, 8)
APPLIED = frozenset({"low_cpu_mem_usage", "use_cache", "cache"})
PLACEMENT = loading.Placement(torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("bits", FEW_BITS)
@settings(deadline=None, max_examples=30)
@given(
    n=some.integers(1, 40),
    k=some.integers(1, 80),
    seed=some.integers(0, 1000),
    size=some.sampled_from([1e-3, 1.0, 50.0]),
)
def test_a_value_is_off_by_half_a_step_at_most(bits: int, n: int, k: int, seed: int, size: float) -> None:
    weight = size * torch.randn(n, k, generator=torch.Generator().manual_seed(seed))
    blocks = to_blocks(weight, bits)
    assert blocks.shape == (-(-n // LANES), -(-k // GROUP), block_bytes(bits))
    found = from_blocks(blocks, n, k)
    for at in range(0, k, GROUP):
        group, error = weight[:, at : at + GROUP], (found - weight)[:, at : at + GROUP].abs().amax(1)
        # Zeros fill up the last group. Scale and offset are rounded to float16: by one part in 2048, or by 2**-25.
        low, high = group.amin(1), group.amax(1)
        if at + GROUP > k:
            low, high = low.clamp(max=0), high.clamp(min=0)
        step = (high - low) / (2**bits - 1)
        rounded = (low.abs().maximum(high.abs()) + high - low) / 2048 + 2**bits * 2**-25
        assert (error <= step / 2 + rounded).all()


def test_of_32_bits_blocks_stand_for_what_they_were_made_of() -> None:
    weight = torch.randn(37, 41)
    assert torch.equal(from_blocks(to_blocks(weight, 32), 37, 41), weight)


@pytest.mark.parametrize("bits", BITS)
def test_what_blocks_stand_for_is_kept_as_it_is(bits: int) -> None:
    kept = from_blocks(to_blocks(torch.randn(48, 96), bits), 48, 96)
    assert torch.equal(from_blocks(to_blocks(kept, bits), 48, 96), kept)


@pytest.mark.parametrize(("form", "bits"), [("Q4_0", 4), ("Q4_1", 4), ("Q8_0", 8)])
def test_weights_of_a_gguf_file_with_as_many_bits_keep_their_values(form: str, bits: int) -> None:
    kind = GGMLQuantizationType[form]
    weight = torch.from_numpy(dequantize(quantize(torch.randn(80, 256).numpy(), kind), kind))
    weight[5, 32:64] = 0
    assert torch.equal(from_blocks(to_blocks(weight, bits), 80, 256), weight)


def test_weights_of_super_blocks_keep_their_values_but_for_a_float16s_rounding() -> None:
    random = np.random.default_rng(1)
    stored = random.integers(0, 256, (64, 3, 144), np.uint8)  # blocks of Q4_K: two float16, 12 bytes of scales, halves
    stored[:, :, :4] = np.array([0.01, 0.02], np.float16).view(np.uint8)
    weight = torch.from_numpy(dequantize(stored.reshape(64, -1), GGMLQuantizationType.Q4_K))
    found = from_blocks(to_blocks(weight, 4), *weight.shape)
    groups = weight.view(64, -1, GROUP)
    steps = (groups.amax(-1) - groups.amin(-1)) / 15
    off = (found - weight).view(64, -1, GROUP).abs().amax(-1)
    assert (off <= 0.05 * steps + groups.abs().amax(-1) / 2048).all()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 7, 8, 9, 15, 33, 700])
def test_the_products_are_those_of_the_matrix_that_the_blocks_stand_for(bits: int, rows: int) -> None:
    weight, x = torch.randn(80, 96), torch.randn(rows, 96)
    blocks, out = to_blocks(weight, bits), np.full((rows, 80), np.nan, np.float32)
    multiply(blocks.view(-1).numpy(), bits, x.numpy(), out, 0, 80)
    torch.testing.assert_close(torch.from_numpy(out), linear(x, from_blocks(blocks, 80, 96)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_of_any_size_gives_the_products_of_its_weight(bits: int, biased: bool, dtype: torch.dtype) -> None:
    weight, bias = torch.randn(37, 41), torch.randn(37).to(dtype) if biased else None
    layer = in_one_memory(bits, [(37, 41)])([weight[:16], weight[16:32], weight[32:]], bias)
    x = torch.randn(1, 5, 41).to(dtype)
    expected = linear(x.float(), layer.weight, None if bias is None else bias.float())
    assert layer(x).dtype is dtype
    near = 1e-4 if dtype is torch.float32 else 0.05
    torch.testing.assert_close(layer(x).float(), expected, rtol=near, atol=near)
    assert (layer.out_features, layer.in_features) == (37, 41)
    torch.testing.assert_close(layer.weight, weight, rtol=0, atol=0.5)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("threads", [1, 2, 3, 16])
def test_threads_share_the_product_of_many_rows(bits: int, threads: int) -> None:
    layer, x = _layer(torch.randn(80, 64), bits=bits), torch.randn(-(-MANY // (80 * 64)), 64)
    with computing_on(threads):
        found = layer(x)
    torch.testing.assert_close(found, linear(x, layer.weight), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bits", FEW_BITS)
def test_the_values_of_blocks_in_bfloat16_are_those_that_torch_rounds(bits: int) -> None:
    blocks, out = to_blocks(torch.randn(48, 96), bits), torch.zeros(48, 96, dtype=torch.uint16)
    to_bfloat16(blocks.view(-1).numpy(), bits, out.numpy(), 16, 48)
    assert torch.equal(out.view(torch.bfloat16)[16:], from_blocks(blocks, 48, 96).bfloat16()[16:])
    assert not out[:16].view(torch.int16).any()


@pytest.mark.parametrize(("bits", "shape"), [(4, (80, 70)), (8, (80, 70)), (32, (80, 70)), (4, (528, 8200))])
def test_only_long_prompts_in_few_bits_are_less_precise_where_that_is_allowed(
    bits: int, shape: tuple[int, int], medium: None
) -> None:
    layer, x = _layer(torch.randn(shape), bits=bits), torch.randn(MANY_ROWS, shape[1])
    exact = linear(x, layer.weight)
    most = float(exact.abs().max())
    torch.testing.assert_close(layer(x[1:]), exact[1:], rtol=0, atol=1e-4 * most)
    torch.testing.assert_close(layer(x), exact, rtol=0, atol=(1e-4 if bits == 32 else 0.02) * most)


@pytest.fixture
def medium() -> Iterator[None]:
    """Inside, torch may multiply float32 in bfloat16."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision(before)


def _layer(weight: torch.Tensor, bias: torch.Tensor | None = None, bits: int = 4) -> BlockLinear:
    rows, width = weight.shape
    return in_one_memory(bits, [(rows, width)])([weight], bias)


@pytest.mark.parametrize("bits", BITS)
def test_layers_lie_one_after_the_other_and_keep_to_their_own(bits: int) -> None:
    weights = [torch.randn(n, k) for n, k in ((37, 41), (16, 64), (80, 32))]
    make = in_one_memory(bits, [(37, 41), (16, 64), (80, 32)])
    layers = [make([weight], None) for weight in weights]
    starts = [layer.array.ctypes.data for layer in layers]
    assert np.diff(starts).tolist() == [len(layer.array) for layer in layers[:-1]]
    for layer, weight in zip(layers, weights, strict=True):
        assert torch.equal(layer.weight, from_blocks(to_blocks(weight, bits), *weight.shape))


def test_a_layer_compiles_without_a_break() -> None:
    layer = _layer(torch.randn(12, 8), torch.randn(12))
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    with torch.inference_mode():
        for rows in (1, 5):
            x = torch.randn(1, rows, 8)
            assert torch.equal(compiled(x), layer(x))


@pytest.mark.parametrize("family", TEN)
def test_families_with_few_bits_split_to_the_bit_and_are_near_what_they_were(
    tiny_model: TinyFactory, family: str
) -> None:
    files = tiny_model(family, n_layers=3)
    plan, ids, flags = SplitPlan(1, 2, 3), tuple(range(3, 12)), APPLIED | {"weight_dtype=int8"}
    few = {
        kind: logits(FixedInput(files, plan, kind, FlagSet(flags, flags, flags), ids, 5, threads=1)) for kind in KINDS
    }
    plain = logits(FixedInput(files, plan, "full", FlagSet(APPLIED, APPLIED, APPLIED), ids, 5, threads=1))
    assert torch.equal(few["full"], few["split"])
    assert not torch.equal(few["full"], plain)
    assert torch.allclose(few["full"], plain, atol=0.1 * float(plain.abs().max()))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_every_linear_layer_has_few_bits_and_the_head_eight(tiny_model: TinyFactory, family: str) -> None:
    files = tiny_model(family, n_layers=3)
    stage = loading.load(
        files, loading.full_specs(3), load_of(APPLIED | {"weight_dtype", "weight_prepack"}), PLACEMENT
    ).stages[0]
    linears = 3 * {"llama": 7, "gpt2": 4}[family]
    layers = list(stage.cut.module.modules())
    assert Counter(layer.bits for layer in layers if isinstance(layer, BlockLinear)) == {4: linears, 8: 1}
    assert not any(type(layer) in loading.LINEAR for layer in layers)
    assert stage.cut.module.get_output_embeddings().bits == 8  # type: ignore[operator]


def test_the_blocks_of_the_default_models_own_file_are_kept_as_they_are(default_model: ModelFiles) -> None:
    stage = loading.load(default_model, [loading.StageSpec("trunk", 3, 5)], load_of(APPLIED), PLACEMENT).stages[0]
    layers = [module for module in stage.cut.module.modules() if isinstance(module, torch.nn.Linear)]
    assert len(layers) == 14
    for layer in layers:
        assert torch.equal(from_blocks(to_blocks(layer.weight, 4), *layer.weight.shape), layer.weight)

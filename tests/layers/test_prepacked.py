"""Packed weights give the products of the plain ones, within rounding, and are never in memory twice."""

import pytest
import torch
from torch.nn.functional import linear

from splitlearn.arms.compare import KINDS
from splitlearn.checkpoints.folder import ModelFiles
from splitlearn.flags.selection import FlagSet
from splitlearn.lab.logit_fidelity import FixedInput
from splitlearn.lab.logits import logits
from splitlearn.layers.onednn_linear import PrepackedLinear
from splitlearn.models.plan import SplitPlan
from splitlearn.stages import loading
from tests.conftest import TinyFactory
from tests.stages.test_proof import TEN
from tests.support.words import load_of

APPLIED = frozenset({"low_cpu_mem_usage", "use_cache", "weight_prepack"})
PLACEMENT = loading.Placement(torch.device("cpu"), torch.float32)


def _near(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.allclose(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rows", [1, 2, 7, 64])
@pytest.mark.parametrize("pieces", [1, 3])
@pytest.mark.parametrize("biased", [False, True])
def test_a_packed_layer_gives_the_products_of_the_plain_one(rows: int, pieces: int, biased: bool) -> None:
    weight, bias = torch.randn(50, 24), torch.randn(50) if biased else None
    layer = PrepackedLinear(weight.tensor_split(pieces), bias)
    x = torch.randn(1, rows, 24)
    assert _near(layer(x), linear(x, weight, bias))
    assert (layer.in_features, layer.out_features) == (24, 50)
    assert torch.equal(layer.weight, weight)


def test_a_packed_layer_compiles_without_a_break() -> None:
    layer = PrepackedLinear(torch.randn(12, 8).tensor_split(2), torch.randn(12))
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    with torch.inference_mode():
        for rows in (1, 5):
            x = torch.randn(1, rows, 8)
            assert _near(compiled(x), layer(x))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_every_linear_layer_of_a_stage_is_packed_and_the_embedding_is_left(
    tiny_model: TinyFactory, family: str
) -> None:
    files = tiny_model(family, n_layers=3)
    loaded = loading.load(files, loading.client_specs(SplitPlan(1, 2, 3)), load_of(APPLIED), PLACEMENT)
    assert loaded.head is not None
    for stage in loaded.stages:
        layers = {type(layer) for layer in stage.cut.module.modules()}
        assert PrepackedLinear in layers and not layers & set(loading.LINEAR)
    assert isinstance(loaded.head.cut.module.get_output_embeddings(), PrepackedLinear)  # type: ignore[operator]
    bottom = loaded.stages[0].cut.module
    embedding = next(module for module in bottom.modules() if isinstance(module, torch.nn.Embedding))
    assert embedding.weight.layout is torch.strided


@pytest.mark.parametrize("family", TEN)
def test_packed_families_split_to_the_bit_and_differ_from_plain_ones_by_rounding(
    tiny_model: TinyFactory, family: str
) -> None:
    files = tiny_model(family, n_layers=3)
    plan, ids = SplitPlan(1, 2, 3), tuple(range(3, 12))
    plain, packed = (
        {kind: logits(FixedInput(files, plan, kind, FlagSet(flags, flags, flags), ids, 5, threads=1)) for kind in KINDS}
        for flags in (APPLIED - {"weight_prepack"}, APPLIED | {"cache"})
    )
    assert torch.equal(packed["full"], packed["split"])
    assert _near(packed["full"], plain["full"])


def test_a_weight_is_read_in_pieces_that_are_the_whole(
    tiny_model: TinyFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = tiny_model("llama", n_layers=3)
    whole = _head(files)
    monkeypatch.setattr(loading, "PIECE_BYTES", 1000)
    pieces = _head(files)
    assert pieces.parts(1 / 4) is not None and whole.parts(1 / 4) is None, "one piece cannot be parted"
    assert torch.equal(pieces.weight, whole.weight)


def _head(files: ModelFiles) -> PrepackedLinear:
    head = loading.load(files, loading.client_specs(SplitPlan(1, 2, 3)), load_of(APPLIED), PLACEMENT).head
    assert head is not None
    layer = head.cut.module.get_output_embeddings()  # type: ignore[operator]
    assert isinstance(layer, PrepackedLinear)
    return layer

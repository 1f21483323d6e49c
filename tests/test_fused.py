"""A token that goes through a layer in one call comes out as from the layer's own forward; other layers are left."""

from typing import Any

import pytest
import torch
from transformers.cache_utils import Cache

from splitlearn import caches, layer_kernel, loading
from splitlearn.fused import _Fused, _of, _same, fuse
from splitlearn.kv import KVPool, KVShape
from splitlearn.quantized import QuantizedLinear
from splitlearn.split import CutModel, forward, layers_of
from splitlearn.store import ModelFiles
from tests.conftest import TinyFactory

PLACEMENT = loading.Placement(torch.device("cpu"), torch.float32)
FLAGS = frozenset({"low_cpu_mem_usage", "use_cache", "cache", "output_attentions", "weight_dtype"})
LAYERS, POOL_START = 2, 16


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many keys there were before each call of the kernel."""
    seen, step = list[int](), layer_kernel.step

    def counted(*arguments: Any) -> None:
        seen.append(arguments[-2])
        step(*arguments)

    monkeypatch.setattr(layer_kernel, "step", counted)
    return seen


def _stage(files: ModelFiles, flags: frozenset[str] = FLAGS) -> CutModel:
    return loading.load(files, [loading.StageSpec("trunk", 3, 3 + LAYERS)], flags, PLACEMENT).stages[0].cut


def _pooled(layers: int, max_length: int) -> Cache:
    shape = KVShape(3, 64)
    pool = KVPool([(shape, shape)] * layers, 8, 8, torch.float32, torch.device("cpu"))
    pool.reserve(POOL_START)
    run = pool.reserve(max_length)
    assert run is not None and run.start == POOL_START
    return pool.cache(run)


def _run(cut: CutModel, cache: Cache, x: torch.Tensor) -> torch.Tensor:
    """Five positions at once, then one by one; back by two, and once more."""
    with torch.inference_mode():
        outs = [forward(cut, x[:, :5], 0, cache)]
        outs += [forward(cut, x[:, at : at + 1], at, cache) for at in range(5, 9)]
        cache.crop(-2)
        outs += [forward(cut, x[:, at : at + 1], at, cache) for at in range(7, 12)]
    return torch.cat(outs, dim=1)


@pytest.mark.parametrize("kind", ["reserved", "pooled"])
@pytest.mark.parametrize("choice", ["weight_dtype=int4", "weight_dtype=int8"])
def test_a_token_comes_out_as_from_the_layers_own_forward(
    default_model: ModelFiles, kind: str, choice: str, calls: list[int]
) -> None:
    cut = _stage(default_model, FLAGS - {"weight_dtype"} | {choice})
    make = _pooled if kind == "pooled" else caches.reserved
    x = torch.randn(1, 12, 576, generator=torch.Generator().manual_seed(1))
    one, other = make(LAYERS, 16), make(LAYERS, 16)
    calls.clear()
    found = _run(cut, one, x)
    assert calls == [at for at in (5, 6, 7, 8, 7, 8, 9, 10, 11) for _ in range(LAYERS)]
    layer: Any
    for layer in layers_of(cut):
        layer.forward = layer.forward._own
    torch.testing.assert_close(found, _run(cut, other, x), rtol=1e-4, atol=1e-4)
    for ours, theirs in zip(one.layers, other.layers, strict=True):
        assert ours.length == theirs.length == 12
        torch.testing.assert_close(ours.keys[:, :, :12], theirs.keys[:, :, :12], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(ours.values[:, :, :12], theirs.values[:, :, :12], rtol=1e-4, atol=1e-4)


def test_what_does_not_go_in_one_call_goes_the_layers_own_way(default_model: ModelFiles, calls: list[int]) -> None:
    cut = _stage(default_model)
    calls.clear()
    x = torch.randn(1, 12, 576)
    with torch.inference_mode():
        for cache in (caches.dynamic(LAYERS, 16), caches.static(LAYERS, 16)):
            for at in range(3):
                forward(cut, x[:, at : at + 1], at, cache)
        forward(cut, x, 0, caches.reserved(LAYERS, 16))
        forward(cut, x[:, :1], 0, None)
    assert calls == []


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "qwen3", "phi3"])
def test_layers_with_other_parts_are_left(tiny_model: TinyFactory, family: str) -> None:
    files = tiny_model(family, n_layers=2)
    cut = loading.load(files, loading.full_specs(2), FLAGS, PLACEMENT).stages[0].cut
    assert not [layer for layer in layers_of(cut) if isinstance(layer.forward, _Fused)]


def test_layers_that_are_to_give_their_attentions_are_left(default_model: ModelFiles) -> None:
    cut = _stage(default_model, FLAGS - {"output_attentions"})
    assert not [layer for layer in layers_of(cut) if isinstance(layer.forward, _Fused)]


def test_a_layer_that_only_looks_like_llamas_is_left(default_model: ModelFiles) -> None:
    cut = _stage(default_model)
    layer: Any = layers_of(cut)[0]
    own = layer.forward._own
    layer.forward = own
    fused = _of(layer)
    assert fused is not None and _same(layer, fused, LAYERS)
    layer.forward = lambda x, **named: own(x, **named) * 1.01
    fuse(cut)
    assert not isinstance(layer.forward, _Fused)


def test_a_linear_layer_that_had_to_be_filled_up_is_not_taken() -> None:
    assert QuantizedLinear([torch.randn(32, 64)], None, 4).whole
    assert not QuantizedLinear([torch.randn(31, 64)], None, 4).whole
    assert not QuantizedLinear([torch.randn(32, 63)], None, 4).whole

"""Tokens that go through a stage in one call come out as from the stage's own forward; other stages are left."""

from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from transformers.cache_utils import Cache
from transformers.models.ministral3.modeling_ministral3 import Ministral3Attention
from transformers.models.phimoe.modeling_phimoe import PhimoeRotaryEmbedding

from splitlearn.checkpoints.folder import ModelFiles
from splitlearn.kvcache.layers import reserved
from splitlearn.kvcache.pool import KVPool, KVShape
from splitlearn.layers.block_linear import in_one_memory
from splitlearn.models.cut import CutModel, body_of, forward, layers_of
from splitlearn.stages import fused_decode, loading
from splitlearn.stages.base import StageInput, StageOutput
from splitlearn.stages.local import LocalStage
from tests.conftest import TinyFactory
from tests.support.words import eager_of, load_of, session_of

PLACEMENT = loading.Placement(torch.device("cpu"), torch.float32)
FLAGS = frozenset({"low_cpu_mem_usage", "use_cache", "cache", "output_attentions", "weight_dtype"})
CHOICES = ("weight_dtype=int4", "weight_dtype=int8", "weight_prepack=blocks")
POOL_START, WIDTH, VOCABULARY = 16, 576, 49152
TRUNK, BOTTOM, TOP = (
    loading.StageSpec("trunk", 3, 5),
    loading.StageSpec("bottom", 0, 2, first=True),
    loading.StageSpec("top", 29, 30, last=True),
)


def _stage(files: ModelFiles, spec: loading.StageSpec = TRUNK, flags: frozenset[str] = FLAGS) -> LocalStage:
    return loading.load(files, [spec], load_of(flags), PLACEMENT).stages[0]


def _fused(stage: LocalStage) -> fused_decode.FusedEngine:
    assert isinstance(stage.faster, fused_decode.FusedEngine)
    return stage.faster


def _pooled(layers: int, max_length: int) -> Cache:
    shape = KVShape(3, 64)
    pool = KVPool([(shape, shape)] * layers, 8, 8, torch.float32, torch.device("cpu"))
    pool.reserve(POOL_START)
    run = pool.reserve(max_length)
    assert run is not None and run.start == POOL_START
    return pool.cache(run)


def _run(stage: LocalStage, cache: Cache, x: torch.Tensor, *, fused: bool) -> torch.Tensor:
    """Five positions at once, then one by one; back by two, and once more. All in one call each, or none."""
    assert _fused(stage)
    stage = stage if fused else replace(stage, faster=None)
    session, ats = stage.session(cache, session_of(FLAGS), 12), (5, 6, 7, 8, 7, 8, 9, 10, 11)
    items = [StageInput(session, at, x[:, at : at + 1]) for at in ats]
    return torch.cat([stage.step([item])[0].x for item in (StageInput(session, 0, x[:, :5], 5), *items)], dim=1)


@pytest.mark.parametrize("kind", ["reserved", "pooled"])
@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("spec", [TRUNK, BOTTOM, TOP], ids=lambda spec: spec.label)
def test_a_token_comes_out_as_from_the_stages_own_forward(
    default_model: ModelFiles, kind: str, choice: str, spec: loading.StageSpec
) -> None:
    stage, layers = _stage(default_model, spec, FLAGS - {"weight_dtype"} | {choice}), spec.end - spec.start
    make, random = _pooled if kind == "pooled" else reserved, torch.Generator().manual_seed(1)
    x = (
        torch.randint(VOCABULARY, (1, 12), generator=random)
        if spec.first
        else torch.randn(1, 12, WIDTH, generator=random)
    )
    one, other = make(layers, 16), make(layers, 16)
    found, expected = _run(stage, one, x, fused=True), _run(stage, other, x, fused=False)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    for ours, theirs in zip(one.layers, other.layers, strict=True):
        assert ours.length == theirs.length == 12
        torch.testing.assert_close(ours.keys[:, :, :12], theirs.keys[:, :, :12], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(ours.values[:, :, :12], theirs.values[:, :, :12], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("spec", [TRUNK, BOTTOM, TOP], ids=lambda spec: spec.label)
def test_tokens_of_several_sessions_come_out_as_from_the_stages_own_forward(
    default_model: ModelFiles, spec: loading.StageSpec
) -> None:
    stage, random = _stage(default_model, spec), torch.Generator().manual_seed(1)
    x = torch.randint(VOCABULARY, (3, 9), generator=random) if spec.first else torch.randn(3, 9, WIDTH)
    ends = ((3, 5, 1), (4, 6, 2), (5, 9, 3))  # a prompt each, a token each, a chunk of a prompt beside two tokens

    def decoded(each: LocalStage) -> torch.Tensor:
        sessions, outs = each.open_together(session_of(FLAGS | {"output_hidden_states"}), 16, 3), list[StageOutput]()
        for begins, until in zip([(0, 0, 0), *ends], ends, strict=False):
            new = [row[None, begin:end] for row, begin, end in zip(x, begins, until, strict=True)]
            outs += each.step(list(map(StageInput, sessions, begins, new)))
        return torch.cat([out.x for out in outs], dim=1)

    engine = type(_fused(stage))
    with patch.object(engine, "together", autospec=True, side_effect=engine.together) as fused:
        found = decoded(stage)
    assert fused.call_count == 3
    torch.testing.assert_close(found, decoded(replace(stage, faster=None)), rtol=1e-4, atol=1e-4)


def test_positions_further_on_are_turned_as_the_model_turns_them(default_model: ModelFiles) -> None:
    stage, far = _stage(default_model), fused_decode.TURNS + 3
    one, other = reserved(2, far + 1), reserved(2, far + 1)
    x = torch.randn(1, far + 1, WIDTH)
    with torch.inference_mode():
        for cache in (one, other):
            forward(stage.cut, x[:, :far], 0, cache)
        found = _fused(stage).token(StageInput(stage.session(one, session_of(FLAGS), far + 1), far, x[:, far:]))
        expected = forward(stage.cut, x[:, far:], far, other)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("cache", ["cache=dynamic", "cache=static", "cache=reserved", None])
@pytest.mark.parametrize("arguments", [{}, {"output_hidden_states": True}])
def test_a_session_is_computed_by_the_fused_engine_if_its_cache_is_reserved_and_nothing_more_is_asked(
    default_model: ModelFiles, cache: str | None, arguments: dict[str, bool]
) -> None:
    stage = _stage(default_model)
    settings = replace(
        session_of(FLAGS - {"cache"} | {cache} if cache else FLAGS - {"use_cache"}), forward_arguments=arguments
    )
    token = stage.open(settings, 16).token
    assert (token == _fused(stage).token) == (cache == "cache=reserved" and not arguments)


def test_a_first_token_and_several_at_once_come_out_of_a_fused_session_as_of_any_other(
    default_model: ModelFiles,
) -> None:
    stage, x, settings = _stage(default_model), torch.randn(1, 6, WIDTH), session_of(FLAGS | {"output_hidden_states"})
    plain = replace(stage, faster=None)
    found, expected = (each.open(settings, 16) for each in (stage, plain))
    assert (found.token, expected.token) == (_fused(stage).token, plain.eager.compute)
    for begin, end in ((0, 1), (1, 4), (4, 5), (5, 6)):
        outs = [
            each.step([StageInput(session, begin, x[:, begin:end])])[0].x
            for each, session in ((stage, found), (plain, expected))
        ]
        torch.testing.assert_close(*outs, rtol=1e-4, atol=1e-4)


def test_a_session_goes_on_behind_kept_blocks_as_behind_its_own(default_model: ModelFiles) -> None:
    stage, settings = _stage(default_model), session_of(FLAGS)
    first, second = (stage.open(settings, 64) for _ in range(2))
    x = torch.randn(1, 33, WIDTH, generator=torch.Generator().manual_seed(1))
    stage.step([StageInput(first, 0, x[:, :32])])
    second.write_blocks(first.keep_blocks([b"", b""], 0))
    own, kept = (stage.step([StageInput(session, 32, x[:, 32:])])[0].x for session in (first, second))
    assert stage.faster is not None
    assert torch.equal(own, kept)


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "qwen3", "phi3", "mistral"])
def test_stages_with_other_parts_are_left(tiny_model: TinyFactory, family: str) -> None:
    files = tiny_model(family, n_layers=2)
    assert loading.load(files, loading.full_specs(2), load_of(FLAGS), PLACEMENT).stages[0].faster is None


@pytest.mark.parametrize("changed", [{"output_attentions"}, set(), {"weight_dtype"}])
def test_stages_that_are_to_do_something_else_are_left(default_model: ModelFiles, changed: set[str]) -> None:
    flags = FLAGS - changed if changed else FLAGS | {"torch_compile"}
    assert _stage(default_model, TRUNK, flags).faster is None


def test_a_stage_that_only_looks_like_llamas_is_left(default_model: ModelFiles) -> None:
    eager = eager_of(_stage(default_model))
    assert fused_decode.of(eager) is not None
    layer: Any = layers_of(eager.cut)[0]
    own = layer.forward
    layer.forward = lambda x, **named: own(x, **named) * 1.01
    assert fused_decode.of(eager) is None


def _grows(cut: CutModel) -> None:
    body_of(cut).rotary_emb.rope_type = "dynamic"


def _slides(cut: CutModel) -> None:
    body_of(cut).config.sliding_window = 4


def _scales_queries_further_on(cut: CutModel) -> None:
    config = body_of(cut).config
    beyond = {"llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 16384}
    config.rope_parameters = config.rope_parameters | beyond
    for layer in layers_of(cut):
        layer.self_attn.__class__ = Ministral3Attention


def _turns_otherwise_further_on(cut: CutModel) -> None:
    body_of(cut).rotary_emb.__class__ = PhimoeRotaryEmbedding


def _has_a_layer_of_another_size(cut: CutModel) -> None:
    layer: Any = layers_of(cut)[1]
    layer.mlp.up_proj = in_one_memory(4, [(32, WIDTH)])([torch.randn(32, WIDTH)], None)


@pytest.mark.parametrize(
    "change", [_grows, _slides, _scales_queries_further_on, _turns_otherwise_further_on, _has_a_layer_of_another_size]
)
def test_what_a_few_tokens_would_not_show_is_looked_for(default_model: ModelFiles, change: Any) -> None:
    eager = eager_of(_stage(default_model))
    change(eager.cut)
    assert fused_decode.of(eager) is None


def test_a_linear_layer_that_had_to_be_filled_up_is_not_taken() -> None:
    shapes = [(32, 64), (31, 64), (32, 63)]
    make = in_one_memory(4, shapes)
    assert [make([torch.randn(*shape)], None).whole for shape in shapes] == [True, False, False]

"""A compiled stage gives what it gave, and layers that are alike are compiled once.

What is proven here is what gets traced and how often, so nothing is turned into machine code: the traced graph runs
as it is. Where only traces are counted, it is not prepared for code either, which takes most of the time.
tests/flags/test_fidelity.py runs code that inductor made.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM

from splitlearn.checkpoints.folder import ModelFiles
from splitlearn.kernels import decode_attention
from splitlearn.kvcache.layers import reserved
from splitlearn.models.cut import eagerly, example, forward, layers_of
from splitlearn.stages import compile, loading
from splitlearn.stages.base import StageInput
from splitlearn.stages.local import LocalStage
from tests.conftest import TinyFactory
from tests.support.words import eager_of, load_of, session_of

FLAGS = frozenset({"low_cpu_mem_usage", "inference_mode", "use_cache", "output_attentions", "output_hidden_states"})
PLACEMENT = loading.Placement(torch.device("cpu"), torch.float32)
TRUNK, FULL = loading.StageSpec("trunk", 1, 6), loading.StageSpec("full", 0, 6, first=True, last=True)
ENDS = (5, 6, 7, 9, 10, 11, 12)


@pytest.fixture(autouse=True)
def _traced_afresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each test traces from nothing."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def _prepared(_traced_afresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """`aot_eager` does all that inductor does before it writes code: it turns what a graph changes in place, such as a
    KV cache, into inputs and outputs."""
    compile_eagerly: Any = torch.compile
    monkeypatch.setattr(torch, "compile", partial(compile_eagerly.func, backend="aot_eager"))


def _stage(files: ModelFiles, spec: loading.StageSpec, flags: frozenset[str] = FLAGS) -> LocalStage:
    return loading.load(files, [spec], load_of(flags), PLACEMENT).stages[0]


def _by_layers(files: ModelFiles, spec: loading.StageSpec, flags: frozenset[str] = FLAGS) -> LocalStage:
    stage = _stage(files, spec, flags)
    return replace(stage, eager=replace(eager_of(stage), cut=compile.compile_by_layers(stage.cut)))


def _outputs(stage: LocalStage, flags: frozenset[str]) -> list[torch.Tensor]:
    session, x, at, outs = stage.open(session_of(flags), 16), example(stage.cut, 12), 0, []
    for end in ENDS:
        outs.append(stage.step([StageInput(session, at, x[:, at:end], end - at)])[0].x)
        at = end
    return outs


@pytest.mark.usefixtures("_prepared")
@pytest.mark.parametrize(
    ("family", "spec", "cache"),
    [
        ("llama", FULL, "cache=reserved"),
        ("llama", TRUNK, "cache=static"),
        ("gpt2", FULL, "cache=static"),
        ("gemma2", TRUNK, "cache=dynamic"),
    ],
)
def test_a_stage_compiled_by_layers_gives_what_it_gave(
    tiny_model: TinyFactory, family: str, spec: loading.StageSpec, cache: str
) -> None:
    flags = FLAGS | {cache}
    compiled = _by_layers(tiny_model(family), spec, flags)
    assert compiled.cut.compiled == "by layers"
    expected = _outputs(_stage(tiny_model(family), spec, flags), flags)
    for found, own in zip(_outputs(compiled, flags), expected, strict=True):
        torch.testing.assert_close(found, own, rtol=1e-4, atol=1e-4 * float(own.abs().max()))


@pytest.mark.usefixtures("_prepared")
def test_a_compiled_stage_attends_by_the_kernel_and_its_tokens_are_those_of_generate(
    tiny_model: TinyFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, attend = list[int](), decode_attention.attend
    monkeypatch.setattr(decode_attention, "attend", lambda *given: calls.append(1) or attend(*given))  # type: ignore[func-returns-value]
    files, spec = tiny_model("llama", n_layers=1), loading.StageSpec("full", 0, 1, first=True, last=True)
    stage = _stage(files, spec, FLAGS | {"row_attention"})
    stage = replace(stage, eager=replace(eager_of(stage), cut=compile.compile_whole(stage.cut)))
    session, ids, at = stage.open(session_of(FLAGS | {"cache=reserved"}), 16), torch.tensor([[5, 9, 2, 7]]), 0
    counters.clear()
    while ids.shape[1] < 12:
        (output,) = stage.step([StageInput(session, at, ids[:, at:])])
        at, ids = ids.shape[1], torch.cat([ids, output.x[:, -1].argmax(-1, keepdim=True)], dim=1)
    model = AutoModelForCausalLM.from_pretrained(files.folder)
    expected = model.generate(ids[:, :4], max_new_tokens=8, min_new_tokens=8, do_sample=False)
    assert torch.equal(ids, expected)
    assert len(calls) == 7, "one for each token after the prompt"
    assert not counters["graph_break"]


def test_six_layers_are_compiled_as_often_as_two(tiny_model: TinyFactory) -> None:
    graphs = []
    for end in (2, 6):
        torch._dynamo.reset()
        counters.clear()
        spec = loading.StageSpec("bottom", 0, end, first=True)
        _outputs(_by_layers(tiny_model(), spec), FLAGS)
        graphs.append(counters["stats"]["unique_graphs"])
    assert 0 < graphs[0] == graphs[1]


def test_nothing_is_compiled_again_as_the_context_grows(tiny_model: TinyFactory) -> None:
    stage = _by_layers(tiny_model(), FULL, FLAGS | {"cache"})
    flags = FLAGS | {"cache"}
    _outputs(stage, flags)
    session, x = stage.open(session_of(flags), 400), torch.arange(1, 101).unsqueeze(0)
    stage.step([StageInput(session, 0, x)])
    counters.clear()
    for at in range(100, 360):
        stage.step([StageInput(session, at, x[:, :1])])
    assert counters["stats"]["unique_graphs"] == 0


def test_layers_that_compute_with_their_number_are_compiled_in_a_row(tiny_model: TinyFactory) -> None:
    cut = _stage(tiny_model(), TRUNK).cut
    layers: list[Any] = list(layers_of(cut))
    for layer in layers:
        layer.register_forward_hook(lambda module, given, out: out * (1 + module.self_attn.layer_idx))
    before = [layer.self_attn.layer_idx for layer in layers]
    seen = list[int]()
    layers[1].register_forward_pre_hook(
        lambda module, given, named: seen.append(len(named["past_key_values"].layers)), with_kwargs=True
    )
    compiled = compile.compile_by_layers(cut)
    assert compiled.compiled == "whole"
    assert [layer.self_attn.layer_idx for layer in layers] == before
    with eagerly(compiled), torch.inference_mode():
        forward(compiled, example(cut, 2), 0, reserved(len(layers), 4))
    assert seen[-1] == len(layers), "each layer is given the whole cache again"


def test_a_compiled_stage_can_run_as_it_was(tiny_model: TinyFactory) -> None:
    stage = _by_layers(tiny_model(), TRUNK)
    counters.clear()
    with eagerly(stage.cut):
        _outputs(stage, FLAGS)
    assert counters["stats"]["unique_graphs"] == 0

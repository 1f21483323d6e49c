"""A token that is replayed comes out as from the stage's own forward, wherever its session lies. The captures are of
tests/support/recorder.py; those of CUDA are tried where there is a GPU."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from splitlearn.checkpoints.folder import ModelFiles
from splitlearn.kvcache.pool import KVPool, Slot
from splitlearn.stages import cuda_graph, loading, local
from splitlearn.stages.base import StageInput
from splitlearn.stages.engine import TokenEngine
from splitlearn.stages.local import LocalStage
from splitlearn.stages.session import LocalSession
from tests.conftest import TinyFactory
from tests.support.recorder import record
from tests.support.words import eager_of, load_of, session_of

NOTHING_MORE = ("output_attentions", "output_hidden_states")
FLAGS = frozenset({"low_cpu_mem_usage", "inference_mode", "use_cache", "cache", *NOTHING_MORE})
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
WHERE = [pytest.param("cpu", id="recorder"), pytest.param("cuda", id="CUDA", marks=GPU)]
SPECS = (
    loading.StageSpec("full", 0, 6, first=True, last=True),
    loading.StageSpec("bottom", 0, 2, first=True),
    loading.StageSpec("trunk", 2, 5),
    loading.StageSpec("top", 5, 6, last=True),
)
FAMILIES = ("llama", "gpt2", "qwen2", "qwen3", "mistral", "phi3", "gemma2", "gpt_neox")
PROMPT, LENGTH, WIDTH, VOCABULARY = 5, 24, 48, 300
PARTS = ((0, PROMPT), *((at, at + 1) for at in range(PROMPT, LENGTH)))


def _stage(files: ModelFiles, spec: loading.StageSpec, where: str) -> LocalStage:
    return loading.load(files, [spec], load_of(FLAGS), loading.Placement(torch.device(where), torch.float32)).stages[0]


def _of(stage: LocalStage, where: str) -> TokenEngine | None:
    return cuda_graph.of(eager_of(stage), record if where == "cpu" else None)


def _replayed(stage: LocalStage, where: str) -> LocalStage:
    engine = _of(stage, where)
    assert engine is not None
    return replace(stage, faster=engine)


def _compile_s(stage: LocalStage) -> float:
    """Seconds of capturing so far."""
    assert stage.faster is not None
    return stage.faster.compile_s


def _given(stage: LocalStage, seed: int = 1) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    if stage.cut.first:
        return torch.randint(VOCABULARY, (1, LENGTH), generator=random)
    return torch.randn(1, LENGTH, WIDTH, generator=random)


def _steps(stage: LocalStage, session: LocalSession, x: torch.Tensor, ends: Sequence[int]) -> torch.Tensor:
    """The outputs of steps that end at `ends`; a negative one goes back to that position before the next."""
    outs, at = [], 0
    for end in ends:
        if end < 0:
            at = -end
            continue
        outs.append(stage.step([StageInput(session, at, x[:, at:end], end - at)])[0].x.cpu())
        at = end
    return torch.cat(outs, dim=1)


def _close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.label)
@pytest.mark.parametrize("family", FAMILIES)
def test_replayed_tokens_come_out_as_from_the_stages_own_forward(
    tiny_model: TinyFactory, family: str, spec: loading.StageSpec, where: str
) -> None:
    stage = _stage(tiny_model(family), spec, where)
    x, ends = _given(stage), (PROMPT, 6, 7, 8, 9, -7, 8, 11, 12, *range(13, LENGTH + 1))
    replayed = _replayed(stage, where)
    tried = _compile_s(replayed)
    found = _steps(replayed, replayed.open(session_of(FLAGS), LENGTH), x, ends)
    _close(found, _steps(stage, stage.open(session_of(FLAGS), LENGTH), x, ends))
    assert _compile_s(replayed) > tried


@pytest.mark.parametrize("where", WHERE)
def test_graphs_are_captured_once_for_a_place_and_a_window(
    tiny_model: TinyFactory, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_graph, "MIN_WINDOW", 8)
    stage = _stage(tiny_model(), SPECS[0], where)
    replayed = _replayed(stage, where)
    tried, spent = _compile_s(replayed), []
    for seed in range(3):
        session, x = replayed.open(session_of(FLAGS), LENGTH), _given(stage, seed)
        found = _steps(replayed, session, x, (PROMPT, *range(PROMPT + 1, LENGTH + 1)))
        session.close()
        _close(found, _steps(stage, stage.open(session_of(FLAGS), LENGTH), x, (PROMPT, *range(PROMPT + 1, LENGTH + 1))))
        spent.append(_compile_s(replayed))
    assert tried < spent[0] == spent[1] == spent[2]


@pytest.mark.parametrize("where", WHERE)
def test_sessions_beside_each_other_do_not_see_each_other(tiny_model: TinyFactory, where: str) -> None:
    stage = _stage(tiny_model(), SPECS[2], where)
    replayed = _replayed(stage, where)
    pool = KVPool(stage.kv_shapes, 4, LENGTH, torch.float32, stage.device)
    for view in pool.views(0, pool.capacity):
        view.fill_(torch.nan)  # what a session left that came to grief
    settings = stage.open(session_of(FLAGS), LENGTH).settings
    sessions = [replayed.session(pool.cache(Slot(at * LENGTH, LENGTH)), settings, LENGTH) for at in (2, 0, 1)]
    given = [_given(stage, seed) for seed in range(3)]
    found: list[list[torch.Tensor]] = [[], [], []]
    for begin, end in PARTS:
        for outs, session, x in zip(found, sessions, given, strict=True):
            outs.append(replayed.step([StageInput(session, begin, x[:, begin:end])])[0].x.cpu())
    for outs, x in zip(found, given, strict=True):
        expected = _steps(stage, stage.open(session_of(FLAGS), LENGTH), x, (PROMPT, *range(PROMPT + 1, LENGTH + 1)))
        _close(torch.cat(outs, dim=1), expected)


def test_a_session_lies_where_an_earlier_one_did_and_not_where_one_is(tiny_model: TinyFactory) -> None:
    stage = _replayed(_stage(tiny_model(), SPECS[0], "cpu"), "cpu")
    first = stage.open(session_of(FLAGS), 10)
    at = _place(first)
    beside = stage.open(session_of(FLAGS), 10)
    assert _place(beside) != at
    first.close()
    beside.close()
    long = stage.open(session_of(FLAGS), 700)
    at = _place(long)
    long.close()
    first, beside = stage.open(session_of(FLAGS), 20), stage.open(session_of(FLAGS), 10)
    assert _place(first) == at != _place(beside)


def test_samples_lie_where_earlier_ones_did(tiny_model: TinyFactory) -> None:
    stage = _replayed(_stage(tiny_model(), SPECS[0], "cpu"), "cpu")
    places = []
    for _ in range(2):
        sessions = stage.open_together(session_of(FLAGS), 20, 3)
        places.append([_place(session) for session in sessions])
        for session in sessions:
            session.close()
    assert places[0] == places[1] and len(set(places[0])) == 3


@pytest.mark.parametrize(
    ("packs", "most", "replays"),
    [
        pytest.param(False, 0, True, id="where layers share no forward, as compiled ones"),
        pytest.param(True, 3, True, id="one after the other"),
        pytest.param(True, 2, False, id="in one forward"),
    ],
)
def test_samples_do_not_see_each_other(
    tiny_model: TinyFactory, monkeypatch: pytest.MonkeyPatch, packs: bool, most: int, replays: bool
) -> None:
    monkeypatch.setattr(LocalStage, "packs", lambda self, applied: packs)
    monkeypatch.setattr(local, "MAX_REPLAYS", most)
    stage = _stage(tiny_model(), SPECS[0], "cpu")
    replayed = _replayed(stage, "cpu")
    tried = _compile_s(replayed)
    sessions, given = replayed.open_together(session_of(FLAGS), LENGTH, 3), [_given(stage, seed) for seed in range(3)]
    found: list[list[torch.Tensor]] = [[], [], []]
    for begin, end in PARTS:
        steps = [StageInput(each, begin, x[:, begin:end]) for each, x in zip(sessions, given, strict=True)]
        for outs, output in zip(found, replayed.step(steps), strict=True):
            outs.append(output.x)
    for outs, x in zip(found, given, strict=True):
        session = stage.open(session_of(FLAGS), LENGTH)
        own = [stage.step([StageInput(session, begin, x[:, begin:end])])[0].x for begin, end in PARTS]
        _close(torch.cat(outs, dim=1), torch.cat(own, dim=1))
    assert (_compile_s(replayed) > tried) == replays


def _place(session: LocalSession) -> int:
    assert session.cache is not None
    place: int = session.cache.layers[0].keys.data_ptr()
    return place


@pytest.mark.parametrize("where", WHERE)
def test_a_stage_that_asks_for_a_value_is_left_as_it_is(
    tiny_model: TinyFactory, where: str, caplog: pytest.LogCaptureFixture
) -> None:
    stage = _stage(tiny_model(), SPECS[2], where)
    layer = next(iter(stage.cut.module.layers))  # type: ignore[arg-type]
    layer.register_forward_hook(lambda module, given, out: out if float(out.sum()) < 0 else out)
    assert _of(stage, where) is None
    assert "[2, 5) are not captured" in caplog.text
    assert _of(_stage(tiny_model(), SPECS[2], where), where) is not None, "the next one is"


def test_a_stage_whose_steps_depend_on_what_python_knows_is_left_as_it_is(tiny_model: TinyFactory) -> None:
    stage, calls = _stage(tiny_model(), SPECS[2], "cpu"), iter(range(1000))
    layer = next(iter(stage.cut.module.layers))  # type: ignore[arg-type]
    layer.register_forward_hook(lambda module, given, out: out * next(calls))
    assert _of(stage, "cpu") is None


def test_a_stage_without_layers_is_left_as_it_is(tiny_model: TinyFactory) -> None:
    stage = _stage(tiny_model(), loading.StageSpec("bottom", 0, 0, first=True), "cpu")
    assert _of(stage, "cpu") is None

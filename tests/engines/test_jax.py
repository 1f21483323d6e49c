"""JAX computes a stage as torch does: each kind of step, whole and cut anywhere, beside torch on the other side.

Torch is the judge: the full model's eager stage, whose steps are transformers' own forward.
"""

import sys
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from splitlearn.checkpoints.folder import ModelFiles
from splitlearn.client.remote_stage import RemoteStage
from splitlearn.engines.padding import pieces
from splitlearn.engines.reasons import JAX_FAMILIES
from splitlearn.events import GenerationRequest, TokenEvent
from splitlearn.generation.chain import Link
from splitlearn.generation.generator import Generator
from splitlearn.generation.tokenizer import Tokens
from splitlearn.models.plan import SplitPlan
from splitlearn.runtime import private_apis
from splitlearn.sampling import SamplingParams
from splitlearn.stages import loading
from splitlearn.stages.base import Session, Stage, StageInput
from tests.conftest import TinyFactory
from tests.support.children import output_of
from tests.support.trunk import PLAN, serve_here, served
from tests.support.words import generation_of, load_of, session_of

CPU = loading.Placement(torch.device("cpu"), torch.float32)
CACHED = frozenset({"use_cache", "inference_mode"})
UNCACHED = frozenset({"inference_mode"})
TORCH, JAX = CACHED, CACHED | {"engine=jax"}
OURS, ONNX = ("jax", "jaxlib", "torchax"), ("onnx", "onnxruntime", "onnxscript", "onnx_ir")
# A prompt, tokens, three at once, a way back, more than the windows of tiny models, and tokens there: (position, end).
STEPS = ((0, 4), (4, 5), (5, 6), (6, 9), (3, 6), (6, 10), (10, 14), (14, 18), (18, 19), (19, 20))
LENGTH = 24
CUTS = (SplitPlan(1, 2, 3), SplitPlan(1, 3, 3), SplitPlan(0, 2, 3))
FAMILIES = [
    family if family == "llama" else pytest.param(family, marks=pytest.mark.engines) for family in sorted(JAX_FAMILIES)
]
NEAR = 1e-4
COMPILED = "/jax/core/compile/backend_compile_duration"


def _chain(files: ModelFiles, specs: Sequence[loading.StageSpec], words: frozenset[str]) -> Sequence[Stage]:
    return loading.load(files, specs, load_of(words), CPU).chain


def _step(
    chain: Sequence[Stage], sessions: Sequence[Session], ids: torch.Tensor, position: int, logits: int = 0
) -> torch.Tensor:
    """The logits [1, logits, V] of a step through a chain whose stages are all here."""
    x = ids
    for stage, session in zip(chain, sessions, strict=True):
        x = stage.step([StageInput(session, position, x, logits=logits)])[0].x
    return x.clone()


def _open(chain: Sequence[Stage], words: frozenset[str], length: int = LENGTH) -> list[Session]:
    return [stage.open(session_of(words), length) for stage in chain]


def _ids(tokens: int) -> torch.Tensor:
    return torch.randint(10, 390, (1, tokens), generator=torch.Generator().manual_seed(3))


def _answers(chain: Sequence[Stage], words: frozenset[str]) -> list[torch.Tensor]:
    """The logits of all STEPS, then of a token in a fork and of that token in its parent."""
    ids, sessions = _ids(LENGTH), _open(chain, words)
    found = [_step(chain, sessions, ids[:, start:end], start) for start, end in STEPS]
    forks = _open(chain, words)
    for fork, parent in zip(forks, sessions, strict=True):
        fork.fork(parent, 18)
    return found + [_step(chain, each, ids[:, 22:23], 18) for each in (forks, sessions)]


@pytest.mark.parametrize("family", FAMILIES)
def test_each_step_has_the_logits_of_torch_whole_and_cut_at_three_points(family: str, tiny_model: TinyFactory) -> None:
    files = tiny_model(family, n_layers=3)
    wanted = _answers(_chain(files, loading.full_specs(3), TORCH), TORCH)
    for plan in (None, *CUTS):
        specs = loading.full_specs(3) if plan is None else [*loading.client_specs(plan), *loading.trunk_specs(plan)]
        specs.sort(key=lambda spec: (spec.last, spec.start, spec.end))
        found = _answers(_chain(files, specs, JAX), JAX)
        for own, other in zip(found, wanted, strict=True):
            assert own.shape == other.shape
            assert (own - other).abs().max().item() <= NEAR, plan


def test_a_session_without_a_cache_computes_the_whole_prefix(tiny_model: TinyFactory) -> None:
    files, ids = tiny_model("llama", n_layers=3), _ids(7)
    chains = [(_chain(files, loading.full_specs(3), words), words) for words in (TORCH, UNCACHED | {"engine=jax"})]
    own, other = (_step(chain, _open(chain, words), ids, 0, logits=1) for chain, words in chains)
    assert own.shape == other.shape
    assert (own - other).abs().max().item() <= NEAR


def test_nothing_is_compiled_within_two_thousand_tokens(tiny_model: TinyFactory) -> None:
    import jax

    compiled = list[str]()

    def count(event: str, seconds: float, **_: object) -> None:
        if event == COMPILED:
            compiled.append(event)

    chain = _chain(tiny_model("llama", n_layers=1), loading.full_specs(1), JAX)
    sessions, ids = _open(chain, JAX, 2100), _ids(2100)
    jax.monitoring.register_event_duration_secs_listener(count)
    try:
        _step(chain, sessions, ids[:, :5], 0, logits=1)
        _step(chain, sessions, ids[:, 5:6], 5, logits=1)
        warm = len(compiled)
        assert warm >= 2, "the listener hears what is compiled"
        for position in range(6, 2006):
            _step(chain, sessions, ids[:, position : position + 1], position, logits=1)
        assert len(compiled) == warm
        for tokens in (6, 7, 8):  # prompts of one power of two
            _step(chain, sessions, ids[:, :tokens], 0, logits=1)
        assert len(compiled) == warm
    finally:
        jax.monitoring.unregister_event_duration_listener(count)


@given(st.integers(0, 200), st.integers(1, 200), st.integers(0, 9), st.data())
def test_padding_stays_within_the_memory_and_every_row_is_computed_once(
    position: int, rows: int, more: int, data: st.DataObject
) -> None:
    capacity = max(64, 1 << (position + rows - 1).bit_length())
    wanted = data.draw(st.integers(1, rows))
    parts = list(pieces(position, rows, capacity, wanted))
    assert [row for part in parts for row in range(part.at, part.at + part.rows)] == list(range(rows))
    assert sum(part.wanted for part in parts) == wanted
    for part in parts:
        assert part.padded.bit_count() == 1
        assert part.rows <= part.padded <= capacity - position - part.at
        assert part.wanted == 0 or part.at + part.rows > rows - wanted


def _tokens(files: ModelFiles, at_client: frozenset[str], at_trunk: frozenset[str]) -> list[int]:
    """The ids of an answer of the split model, whose trunk is behind a socket."""
    bottom, *rest = loading.load(files, loading.client_specs(PLAN), load_of(at_client), CPU).chain
    with serve_here(files, f"trunk:{','.join(at_trunk)}") as here:
        trunk = RemoteStage([here.address], served(files), timeout_s=30)
        links = [
            Link(bottom, session_of(at_client)),
            Link(trunk, session_of(at_trunk)),
            *(Link(stage, session_of(at_client)) for stage in rest),
        ]
        tokens = Tokens.load(files.folder, use_fast=True)
        generator = Generator(links, tokens, None, generation_of(CACHED))
        sampling = SamplingParams(repetition_penalty=1.5)  # without, a tiny random model repeats itself
        request = GenerationRequest("The sky is", max_new_tokens=12, ignore_eos=True, sampling=sampling)
        found = [
            token for event in generator.stream(request) if isinstance(event, TokenEvent) for token in event.token_ids
        ]
        trunk.close()
        return found


def test_torch_and_jax_on_either_side_of_a_socket_give_the_same_tokens(files: ModelFiles) -> None:
    wanted = _tokens(files, TORCH, TORCH)
    assert len(set(wanted)) > 2, "a model that repeats itself shows little"
    assert _tokens(files, JAX, TORCH) == wanted
    assert _tokens(files, TORCH, JAX) == wanted


def test_what_forks_imports_no_engine_but_torch_and_a_choice_of_another_engine_no_jax() -> None:
    code = f"""
import sys
import splitlearn.arms.preload
import splitlearn.arms.worker_main
import server.build
print([name for name in {(*ONNX, *OURS)} if name in sys.modules])
from splitlearn.flags.registry import settings
settings(frozenset({{"use_cache", "engine=onnxruntime"}}))
print([name for name in {OURS} if name in sys.modules])
"""
    assert output_of([sys.executable, "-c", code]).split() == ["[]", "[]"]


def test_what_jax_registers_with_torch_hinders_no_other_stage_of_the_process() -> None:
    private_apis.import_torchax()
    twice = torch.compile(lambda x: x * 2, backend="eager", fullgraph=True)
    with torch.random.fork_rng():
        assert twice(torch.ones(3)).tolist() == [2.0] * 3

"""ONNX Runtime computes what torch does, in the sessions of a local stage and at a trunk server."""

import pytest
import torch

import splitlearn
from splitlearn.checkpoints.folder import ModelFiles
from splitlearn.engines.reasons import ONNX_FAMILIES
from splitlearn.events import TokenEvent
from splitlearn.models.plan import SplitPlan
from splitlearn.stages import loading
from splitlearn.stages.base import StageInput
from tests.conftest import TinyFactory
from tests.engines.onnx_chains import CPU, IDS, ONNX, TORCH, chain, logits
from tests.support.trunk import serve_here
from tests.support.words import load_of, session_of

LARGEST = 1e-4
CUTS = (SplitPlan(1, 3, 4), SplitPlan(2, 3, 4), SplitPlan(1, 2, 4))
CUT = SplitPlan(1, 2, 2)
AT_FIRST = ("gemma2", "llama")
FAMILIES = [
    name if name in AT_FIRST else pytest.param(name, marks=pytest.mark.engines) for name in sorted(ONNX_FAMILIES)
]


@pytest.fixture(scope="module")
def small(tiny_model: TinyFactory) -> ModelFiles:
    return tiny_model("llama", n_layers=2)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_step_has_the_logits_of_torch_full_and_split(tiny_model: TinyFactory, family: str) -> None:
    quick = family in AT_FIRST
    files = tiny_model(family, n_layers=2 if quick else 4)
    expected = logits(chain(files, None, TORCH), TORCH)
    for plan in (None, CUT) if quick else (None, *CUTS):
        found = logits(chain(files, plan, ONNX), ONNX)
        assert max(float((a - b).abs().max()) for a, b in zip(expected, found, strict=True)) <= LARGEST, plan


def test_without_a_cache_each_step_computes_the_whole_prefix(small: ModelFiles) -> None:
    without = ONNX - {"use_cache"}
    (stage,), (other,) = chain(small, None, without), chain(small, None, TORCH)
    x = IDS[:, :9]
    (found,) = stage.step([StageInput(stage.open(session_of(without), 9), 0, x)])
    (expected,) = other.step([StageInput(other.open(session_of(TORCH), 9), 0, x)])
    assert found.x.shape == expected.x.shape and float((found.x - expected.x).abs().max()) <= LARGEST


def test_a_fork_and_kept_blocks_go_on_as_the_session_that_they_come_from(small: ModelFiles) -> None:
    (stage,) = loading.load(small, loading.trunk_specs(CUT), load_of(ONNX), CPU).stages
    own, fork, later = stage.open_together(session_of(ONNX), 40, 3)
    hidden = torch.randn(1, 33, small.facts.hidden_size, generator=torch.Generator().manual_seed(0))
    stage.step([StageInput(own, 0, hidden[:, :32])])
    fork.fork(own, 32)
    later.write_blocks(own.keep_blocks([b"", b""], 0))
    first, *others = (stage.step([StageInput(each, 32, hidden[:, 32:])])[0].x for each in (own, fork, later))
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize(("client", "trunk"), [("engine", "none"), ("none", "engine"), ("engine", "engine")])
def test_client_and_trunk_may_have_different_engines(small: ModelFiles, client: str, trunk: str) -> None:
    def tokens(stages: splitlearn.Stages) -> list[int]:
        events = splitlearn.generate(stages, "The sky is", 12, chat=False, ignore_eos=True)
        return [token for event in events if isinstance(event, TokenEvent) for token in event.token_ids]

    words = {"none": "use_cache", "engine": "use_cache,engine=onnxruntime"}
    expected = tokens(splitlearn.load_full(str(small.folder), flags="use_cache", device="cpu", threads=1))
    with serve_here(small, f"trunk:{words[trunk]}", {}, (CUT.start, CUT.end)) as here:
        flags = f"client:{words[client]} trunk:{words[trunk]}"
        with splitlearn.load_split(
            str(small.folder), CUT.start, CUT.end, trunk=here.address, flags=flags, device="cpu", threads=1
        ) as stages:
            assert len(expected) == 12 and tokens(stages) == expected


@pytest.mark.parametrize(("choice", "lost"), [("int8", 0.05), ("int4", 0.5)])
def test_weights_in_fewer_bits_lose_no_more_than_torchs(small: ModelFiles, choice: str, lost: float) -> None:
    words = ONNX | {f"weight_dtype={choice}"}
    expected, found = (torch.cat(logits(chain(small, None, own), own), dim=1) for own in (TORCH, words))
    assert 0 < float((found - expected).std()) <= lost * float(expected.std())

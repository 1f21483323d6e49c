"""Decode loops of one process share the forwards of its stages, and each gives the answer that it gives alone."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from itertools import islice
from typing import Any

import pytest
import torch

from splitlearn.checkpoints.folder import ModelFiles
from splitlearn.errors import InputError, TrunkFull
from splitlearn.events import GenerationRequest, TokenEvent
from splitlearn.generation.chain import Link
from splitlearn.generation.generator import Generator
from splitlearn.generation.tokenizer import Tokens
from splitlearn.sampling import SamplingParams
from splitlearn.scheduling.batching import BatchedStage, Batching
from splitlearn.scheduling.contract import Client
from splitlearn.stages import loading
from splitlearn.stages.base import Stage, StageInput, StageOutput
from splitlearn.stages.head import Head
from splitlearn.stages.local import LocalStage
from tests.conftest import TinyFactory
from tests.support.trunk import PLAN, eventually
from tests.support.words import generation_of, load_of, session_of

FLAGS = frozenset({"use_cache", "inference_mode", "cache=reserved"})
AT_ONCE = 8
WORDS = ("The", "sky", "is", "blue", "because", "air", "scatters", "short", "waves", "of", "light", "more")
SPECS = {
    "full": loading.full_specs(PLAN.n_layers),
    "split": [*loading.client_specs(PLAN)[:1], *loading.trunk_specs(PLAN), *loading.client_specs(PLAN)[1:]],
}
Compute = Callable[[Any, Sequence[StageInput]], list[StageOutput]]
STAYS = Client(60.0, "", lambda gone: True)


def chain(files: ModelFiles, kind: str) -> tuple[LocalStage | Head, ...]:
    """The local stages of a model, whole or in four parts."""
    placement = loading.Placement(torch.device("cpu"), torch.float32)
    loaded = loading.load(files, SPECS[kind], load_of(()), placement)
    return loaded.stages if loaded.head is None else (*loaded.stages, loaded.head)


def asked(count: int) -> list[tuple[GenerationRequest, int]]:
    """Requests of mixed lengths, some with several samples. Each has the events after which its client goes."""
    found = []
    for number in range(count):
        prompt = " ".join(WORDS[(number + at) % len(WORDS)] for at in range(1 + 7 * number % 40))
        samples, tokens = 1 + number % 3 // 2, 3 + 5 * number % 17
        sampling = SamplingParams(temperature=0.8 * (samples > 1), seed=number, repetition_penalty=1.5)
        request = GenerationRequest(prompt, tokens, ignore_eos=True, sampling=sampling, samples=samples)
        found.append((request, samples * tokens if number % 4 else 2))
    return found


def answer(
    stages: Sequence[Stage], flags: frozenset[str], tokens: Tokens, request: GenerationRequest, stays: int
) -> list[int]:
    """The ids that a client sees before it goes."""
    generator = Generator([Link(stage, session_of(flags)) for stage in stages], tokens, None, generation_of(flags))
    with closing(generator.stream(request)) as events:
        seen = islice((event for event in events if isinstance(event, TokenEvent)), stays)
        return [token for event in seen for token in event.token_ids]


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many sessions each step of a stage or head had."""
    seen: list[int] = []
    for kind in (LocalStage, Head):
        monkeypatch.setattr(kind, "compute", _counting(kind.compute, seen))
    yield seen


def _counting(real: Compute, seen: list[int]) -> Compute:
    def compute(self: Any, batch: Sequence[StageInput]) -> list[StageOutput]:
        seen.append(len(batch))
        return real(self, batch)

    return compute


def together(batching: Batching, each: Sequence[tuple[frozenset[str], GenerationRequest, int]], tokens: Tokens) -> Any:
    """The answers of clients that come at once."""
    with ThreadPoolExecutor(AT_ONCE) as threads:
        return list(threads.map(lambda one: answer(batching.stages(STAYS), one[0], tokens, one[1], one[2]), each))


def check_free(batching: Batching) -> None:
    """Nobody has memory any more."""
    assert all(engine.admission.sessions == engine.admission.pool.blocks_used == 0 for _, engine in batching.engines)


@pytest.mark.parametrize(
    ("family", "kind"), [("llama", "full"), ("gpt2", "full"), ("llama", "split"), ("gemma2", "split")]
)
def test_every_answer_beside_others_is_the_answer_alone(
    family: str, kind: str, tiny_model: TinyFactory, sizes: list[int]
) -> None:
    files = tiny_model(family)
    tokens, own = Tokens.load(files.folder, use_fast=True), chain(files, kind)
    alone = [answer(own, FLAGS, tokens, *each) for each in asked(12)]
    batching = Batching.of(own, session_of(FLAGS), None, "kv_bytes")
    sizes.clear()
    assert together(batching, [(FLAGS, *each) for each in asked(12)], tokens) == alone
    assert max(sizes) > 2, "the sessions did not meet"
    check_free(batching)


@pytest.mark.parametrize("packs", [True, False])
def test_sessions_that_cannot_share_a_forward_take_turns(
    packs: bool, files: ModelFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not packs:
        monkeypatch.setattr(LocalStage, "packs", lambda self, settings: False)
    tokens, own = Tokens.load(files.folder, use_fast=True), chain(files, "split")
    kinds = [FLAGS, frozenset({"inference_mode"}), frozenset({"use_cache"}), frozenset({"use_cache", "cache=static"})]
    each = [(kind, request, stays) for kind, (request, stays) in zip(kinds * 2, asked(8), strict=True)]
    batching = Batching.of(own, session_of(FLAGS), None, "kv_bytes")
    assert together(batching, each, tokens) == [
        answer(own, kind, tokens, request, stays) for kind, request, stays in each
    ]
    check_free(batching)


def test_who_waits_for_room_leaves_when_the_client_goes(files: ModelFiles) -> None:
    whole = chain(files, "full")
    assert isinstance(whole[0], LocalStage)
    batching = Batching.of(whole, session_of(FLAGS), 1 << 18, "api.kv_bytes")
    ((_, engine),) = batching.engines
    room, gone = engine.admission.pool.capacity, list[Callable[[], None]]()
    stage = BatchedStage(whole[0], engine, STAYS)

    def noted(leave: Callable[[], None]) -> bool:
        gone.append(leave)
        return True

    waits = replace(stage, client=Client(60.0, "", noted))
    with pytest.raises(InputError, match="api.kv_bytes has room for no more"):
        stage.open(session_of(FLAGS), room + 1)
    session = stage.open(session_of(FLAGS), room)
    with ThreadPoolExecutor(1) as thread:
        waiting = thread.submit(waits.open_together, session_of(FLAGS), 1, 2)
        assert eventually(lambda: gone)
        gone[0]()
        with pytest.raises(TrunkFull, match="gone"):
            waiting.result()
    session.close()
    check_free(batching)

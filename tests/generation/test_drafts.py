"""Draft tokens: what is proposed, how many pay, and that the answer is the one without them."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import pytest
import torch

from splitlearn.arms.compare import KINDS
from splitlearn.arms.spec import Kind
from splitlearn.checkpoints.folder import ModelFiles
from splitlearn.events import GenerationRequest, TokenEvent
from splitlearn.flags.registry import Place
from splitlearn.flags.selection import why_not
from splitlearn.generation.chain import Link
from splitlearn.generation.generator import Generator
from splitlearn.generation.speculation import COUNTS, PromptLookup, Proposer, Speculation
from splitlearn.generation.tokenizer import Tokens
from splitlearn.metrics import RunMetrics
from splitlearn.models.plan import SplitPlan
from splitlearn.models.structure import no_truncation
from splitlearn.sampling import SamplingParams
from splitlearn.stages import loading
from tests.conftest import TinyFactory
from tests.support.words import generation_of, load_of, session_of

PROMPT = "one two three four five six seven one two three four five six seven one two three"
TOKENS = 40


def test_the_latest_continuation_of_the_longest_end_is_proposed() -> None:
    lookup = PromptLookup()
    assert lookup.propose([1, 2, 3, 4]) == ((), 0)
    assert lookup.propose([1, 2, 3, 4, 1, 2]) == ([3, 4, 1, 2], 2)
    assert lookup.propose([1, 2, 3, 4, 1, 2, 9, 1, 2]) == ([9, 1, 2], 2)
    assert lookup.propose([1, 2, 3, 4, 1, 2, 9, 1, 2, 3, 1, 2, 3]) == ([1, 2, 3], 3)


def test_a_single_token_that_recurs_is_not_enough() -> None:
    assert PromptLookup().propose([5, 1, 6, 1]) == ((), 0)


class _Always:
    """Proposes the same sixteen tokens."""

    costs = False

    def propose(self, sequence: Sequence[int]) -> tuple[Sequence[int], int]:
        return list(range(16)), 1


def _settled(right: float, seconds: dict[int, float], steps: int = 200) -> list[int]:
    """How many drafts each step had, when drafts are right so often and a step with so many takes so long."""
    speculation, rng, used = Speculation([_Always()]), torch.Generator().manual_seed(0), []
    for _ in range(steps):
        fed = len(speculation.drafts([0], 16))
        hits = 0
        while hits < max(fed, 1) and torch.rand(1, generator=rng).item() < right:
            hits += 1
        new = list(range(hits)) + [0 if fed == 0 and hits else 99] if fed else [0 if hits else 99]
        speculation.came(new, fed, seconds[fed])
        used.append(fed)
    return used


def test_drafts_that_are_right_grow_to_the_most() -> None:
    assert set(_settled(1.0, dict.fromkeys(COUNTS, 0.05))[-50:]) == {16}


def test_drafts_that_are_wrong_fall_to_none_where_they_cost_time() -> None:
    used = _settled(0.02, {count: 0.02 + 0.002 * count for count in COUNTS})
    assert sum(map(bool, used[-100:])) <= 5


def test_drafts_that_cost_more_than_they_bring_are_not_used() -> None:
    used = _settled(0.5, {count: 0.02 * (1 + count) for count in COUNTS})
    assert sum(map(bool, used[-100:])) == 0


def test_no_more_drafts_than_there_is_room_for() -> None:
    speculation = Speculation([_Always()])
    speculation.came([0], 0, 0.05)
    assert [len(speculation.drafts([0], most)) for most in (0, 1, 3, 7, 100)] == [0, 1, 2, 4, 16]


@pytest.fixture(scope="module")
def files(tiny_model: TinyFactory) -> ModelFiles:
    return tiny_model("llama", n_layers=5)


class _Told:
    """Knows the answer to `prompt` tokens, but has one token in `wrong_every` wrong."""

    costs = False

    def __init__(self, prompt: int, answer: Sequence[int], wrong_every: int) -> None:
        self._prompt = prompt
        self._answer = [token ^ (at % wrong_every == 0) for at, token in enumerate(answer, 1)]

    def propose(self, sequence: Sequence[int]) -> tuple[Sequence[int], int]:
        return self._answer[len(sequence) - self._prompt :][:16], 1


def _run(
    files: ModelFiles,
    kind: Kind,
    applied: frozenset[str],
    request: GenerationRequest,
    proposer: Callable[[], Proposer] | None = None,
) -> RunMetrics:
    plan = SplitPlan.of(None, None, files.n_layers)
    placement = loading.Placement(torch.device("cpu"), torch.float32)
    bottom, *rest = loading.client_specs(plan)
    split = [bottom, loading.trunk_specs(plan)[0], *rest]
    specs = loading.full_specs(files.n_layers) if kind == "full" else split
    links = [
        Link(loading.load(files, [spec], load_of(applied), placement).chain[0], session_of(applied)) for spec in specs
    ]
    tokens, own = Tokens.load(files.folder, use_fast=True), generation_of(applied)
    own = replace(own, proposers=(proposer,)) if proposer else own
    generator = Generator(links, tokens, files.facts.context_length, own)
    events = list(generator.stream(request))
    sizes = [len(event.token_ids) for event in events if isinstance(event, TokenEvent)]
    metrics = RunMetrics.from_events(events)
    assert metrics is not None and sum(sizes) == metrics.n_tokens and metrics.drafts_accepted == sum(sizes) - len(sizes)
    return metrics


CACHES = {
    "dynamic": {"use_cache"},
    "reserved": {"use_cache", "cache"},
    "static": {"use_cache", "cache=static"},
    "no": set(),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(),
        SamplingParams(repetition_penalty=1.05),
        SamplingParams(temperature=0.8, top_k=50, seed=7),
    ],
    ids=str,
)
def test_an_answer_with_drafts_has_the_tokens_of_one_without(
    files: ModelFiles, kind: Kind, cache: str, sampling: SamplingParams
) -> None:
    request = GenerationRequest(PROMPT, TOKENS, ignore_eos=True, sampling=sampling)
    plain = frozenset({"inference_mode", *CACHES[cache]})
    alone = _run(files, kind, plain, request)
    assert alone.drafts == 0
    for wrong_every in (3, 7, 1000):
        told = partial(_Told, alone.prompt_tokens, alone.token_ids, wrong_every)
        drafted = _run(files, kind, plain, request, told)
        assert drafted.token_ids == alone.token_ids
        assert drafted.text == alone.text
    assert 0 < drafted.drafts_accepted < TOKENS


@pytest.mark.parametrize("kind", KINDS)
def test_drafts_come_true_where_an_answer_repeats_itself(files: ModelFiles, kind: Kind) -> None:
    again = SamplingParams(repetition_penalty=0.2)  # what was said is likely to be said again
    request = GenerationRequest(PROMPT, TOKENS, ignore_eos=True, sampling=again)
    cached = frozenset({"inference_mode", "use_cache"})
    found, alone = (_run(files, kind, flags, request) for flags in (cached | {"prompt_lookup"}, cached))
    assert found.token_ids == alone.token_ids
    assert 0 < found.drafts_accepted <= found.drafts
    assert len(found.itl_s) == found.n_tokens - 1
    assert sum(found.itl_s) == pytest.approx(found.e2el_s - found.ttft_s)
    assert found.ledger["draft"] > 0 and "draft" not in alone.ledger


def test_an_answer_with_drafts_ends_at_the_same_stop_string(files: ModelFiles) -> None:
    flags = frozenset({"inference_mode", "use_cache"})
    whole = _run(files, "full", flags, GenerationRequest(PROMPT, TOKENS, ignore_eos=True)).text
    request = GenerationRequest(PROMPT, TOKENS, ignore_eos=True, stop=(whole[len(whole) // 2 :][:3],))
    alone = _run(files, "full", flags, request)
    drafted = _run(files, "full", flags, request, partial(_Told, alone.prompt_tokens, alone.token_ids, 1000))
    assert drafted.drafts_accepted > 0
    assert (drafted.token_ids, drafted.text, drafted.finish_reason) == (alone.token_ids, alone.text, "stop")


def test_a_model_that_cannot_go_back_says_so() -> None:
    from transformers import Lfm2Config, LlamaConfig

    assert no_truncation(LlamaConfig()) is None
    reason = no_truncation(Lfm2Config(num_hidden_layers=2, layer_types=["conv", "full_attention"]))
    assert reason is not None and "conv" in reason
    assert why_not("prompt_lookup", "client", Place("cpu", no_truncation=reason)) == reason

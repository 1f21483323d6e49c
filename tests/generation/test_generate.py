"""The decode loop: why it ends, what its ledger says, what it refuses, and that it frees what it opened."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from splitlearn.checkpoints.folder import ModelFiles
from splitlearn.errors import InputError
from splitlearn.events import Event, GenerationRequest, TokenEvent
from splitlearn.generation.chain import Link
from splitlearn.generation.generator import Generator
from splitlearn.generation.tokenizer import Tokens
from splitlearn.metrics import RunMetrics
from splitlearn.models.plan import SplitPlan
from splitlearn.sampling import SamplingParams
from splitlearn.stages import loading
from splitlearn.stages.base import Stage, StageInput, StageOutput
from splitlearn.stages.head import Head
from splitlearn.stages.local import LocalStage
from splitlearn.stages.session import LocalSession
from splitlearn.stages.settings import SessionSettings
from tests.conftest import TinyFactory
from tests.support.words import generation_of, load_of, session_of

APPLIED = frozenset({"use_cache", "inference_mode", "low_cpu_mem_usage", "output_attentions", "output_hidden_states"})
PROMPT = "The sky is blue because air scatters"


@dataclass
class _Watched:
    """A stage that remembers the sessions that it opened."""

    stage: LocalStage
    opened: list[LocalSession] = field(default_factory=list)

    def open(self, settings: SessionSettings, max_length: int) -> LocalSession:
        self.opened.append(self.stage.open(settings, max_length))
        return self.opened[-1]

    def step(self, batch: Sequence[StageInput]) -> list[StageOutput]:
        return self.stage.step(batch)


@pytest.fixture(scope="module")
def files(tiny_model: TinyFactory) -> ModelFiles:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def stages(files: ModelFiles) -> list[Stage]:
    plan = SplitPlan.of(None, None, files.n_layers)
    placement = loading.Placement(torch.device("cpu"), torch.float32)
    bottom, *rest = loading.load(files, loading.client_specs(plan), load_of(APPLIED), placement).chain
    return [bottom, *loading.load(files, loading.trunk_specs(plan), load_of(APPLIED), placement).stages, *rest]


def _generator(files: ModelFiles, stages: Sequence[Stage], context: int | None = None) -> Generator:
    tokens = Tokens.load(files.folder, use_fast=True)
    limit = files.facts.context_length if context is None else context
    return Generator([Link(stage, session_of(APPLIED)) for stage in stages], tokens, limit, generation_of(APPLIED))


def _run(files: ModelFiles, stages: Sequence[Stage], request: GenerationRequest) -> RunMetrics:
    metrics = RunMetrics.from_events(_generator(files, stages).stream(request))
    assert metrics is not None
    return metrics


def test_each_steps_ledger_sums_to_the_time_since_the_step_before(files: ModelFiles, stages: list[Stage]) -> None:
    request = GenerationRequest(PROMPT, max_new_tokens=8, ignore_eos=True)
    steps = [event for event in _generator(files, stages).stream(request) if isinstance(event, TokenEvent)]
    times = [0.0, *(step.time_s for step in steps)]
    for step, before, after in zip(steps, times, times[1:], strict=False):
        assert sum(step.ledger.values()) == pytest.approx(after - before, abs=1e-9)
        assert step.ledger["unattributed"] >= 0
    assert {"bottom", "trunk", "top", "sample", "emit"} <= set(steps[-1].ledger)


def test_a_generation_ends_at_its_limit_and_counts_token_ids(files: ModelFiles, stages: list[Stage]) -> None:
    metrics = _run(files, stages, GenerationRequest(PROMPT, max_new_tokens=5, ignore_eos=True))
    assert (metrics.n_tokens, metrics.finish_reason) == (5, "length")
    assert metrics.prompt_tokens == len(Tokens.load(files.folder, use_fast=True).encode(PROMPT, chat=True))


def test_a_generation_ends_at_the_end_token_unless_that_is_ignored(files: ModelFiles, stages: list[Stage]) -> None:
    generator = _generator(files, stages)
    free = _run(files, stages, GenerationRequest(PROMPT, max_new_tokens=6, ignore_eos=True))
    ending = frozenset({free.token_ids[2]})
    generator.tokens.eos_ids = ending
    ended = RunMetrics.from_events(generator.stream(GenerationRequest(PROMPT, max_new_tokens=6)))
    ignored = RunMetrics.from_events(generator.stream(GenerationRequest(PROMPT, max_new_tokens=6, ignore_eos=True)))
    assert ended is not None
    assert ignored is not None
    assert ended.finish_reason == "eos"
    assert ended.token_ids == free.token_ids[: free.token_ids.index(free.token_ids[2]) + 1]
    assert ignored.token_ids == free.token_ids


def test_a_stop_string_ends_the_text_before_it(files: ModelFiles, stages: list[Stage]) -> None:
    free = _run(files, stages, GenerationRequest(PROMPT, max_new_tokens=12, ignore_eos=True))
    stop = free.text[4:7]
    stopped = _run(files, stages, GenerationRequest(PROMPT, max_new_tokens=12, ignore_eos=True, stop=(stop,)))
    assert stopped.finish_reason == "stop"
    assert stopped.text == free.text[: free.text.index(stop)]


def test_the_same_seed_gives_the_same_tokens_whole_and_split(files: ModelFiles, stages: list[Stage]) -> None:
    sampling = SamplingParams(temperature=0.8, top_k=50, top_p=0.9, repetition_penalty=1.1, seed=7)
    request = GenerationRequest(PROMPT, max_new_tokens=16, ignore_eos=True, sampling=sampling)
    placement = loading.Placement(torch.device("cpu"), torch.float32)
    whole = loading.load(files, loading.full_specs(files.n_layers), load_of(APPLIED), placement).stages
    assert _run(files, whole, request).token_ids == _run(files, stages, request).token_ids


def test_what_does_not_fit_into_the_context_is_refused(files: ModelFiles, stages: list[Stage]) -> None:
    generator = _generator(files, stages, context=40)
    with pytest.raises(InputError, match="prompt.*at most 39"):
        next(generator.stream(GenerationRequest("word " * 200)))
    with pytest.raises(InputError, match="max_new_tokens.*of the context's 40"):
        next(generator.stream(GenerationRequest("word", max_new_tokens=1000)))


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": " \n"}, "prompt"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"max_new_tokens": -1}, "max_new_tokens"),
        ({"max_new_tokens": "x"}, "max_new_tokens"),
        ({"max_new_tokens": 1.5}, "max_new_tokens"),
        ({"stop": ("",)}, "stop"),
    ],
)
def test_a_request_that_makes_no_sense_is_refused_by_name(arguments: dict[str, object], field: str) -> None:
    with pytest.raises(InputError) as refused:
        GenerationRequest(**{"prompt": PROMPT, **arguments})  # type: ignore[arg-type]
    assert refused.value.field == field


def test_an_answer_that_may_be_cut_to_the_context_fills_it(files: ModelFiles, stages: list[Stage]) -> None:
    request = GenerationRequest(PROMPT, max_new_tokens=10**6, chat=False, ignore_eos=True, fit_context=True)
    length = len(Tokens.load(files.folder, use_fast=True).encode(PROMPT, chat=False))
    metrics = RunMetrics.from_events(_generator(files, stages, context=length + 5).stream(request))
    assert metrics is not None
    assert (metrics.n_tokens, metrics.finish_reason) == (5, "length")


def test_log_probabilities_are_those_of_the_models_own_logits(files: ModelFiles, stages: list[Stage]) -> None:
    sampling = SamplingParams(temperature=1.5, top_k=40, seed=3, frequency_penalty=0.5)
    request = GenerationRequest(PROMPT, 6, chat=False, ignore_eos=True, sampling=sampling, top_logprobs=3)
    events = list(_generator(files, stages).stream(request))
    steps = [event for event in events if isinstance(event, TokenEvent)]
    ids = [token for step in steps for token in step.token_ids]
    whole = AutoModelForCausalLM.from_pretrained(files.folder, dtype=torch.float32)
    prompt = Tokens.load(files.folder, use_fast=True).encode(PROMPT, chat=False)
    with torch.inference_mode():
        logits = whole(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    listed = [each for step in steps for each in step.logprobs]
    assert [chosen.token_id for chosen, *_ in listed] == ids
    for row, (chosen, *likeliest) in zip(logits, listed, strict=True):
        assert [each.token_id for each in likeliest] == row.topk(3).indices.tolist()
        assert [each.logprob for each in (chosen, *likeliest)] == pytest.approx(
            [float(row[each.token_id]) for each in (chosen, *likeliest)], abs=1e-4
        )


def test_closing_the_iterator_closes_every_session(files: ModelFiles, stages: list[Stage]) -> None:
    watched = [_Watched(stage) for stage in stages if isinstance(stage, LocalStage)]
    events = _generator(files, [*watched, stages[-1]]).stream(
        GenerationRequest(PROMPT, max_new_tokens=50, ignore_eos=True)
    )
    seen: list[Event] = [next(events), next(events)]
    assert len(seen) == 2
    assert all(stage.opened[0].cache is not None for stage in watched)
    events.close()
    assert all(stage.opened[0].cache is None for stage in watched)


def test_a_position_beyond_the_cache_or_past_the_end_is_refused(stages: list[Stage]) -> None:
    session = stages[0].open(session_of(APPLIED), max_length=4)
    ids = torch.tensor([[1, 2, 3]])
    with pytest.raises(InputError, match="position"):
        stages[0].step([StageInput(session, 1, ids)])
    stages[0].step([StageInput(session, 0, ids)])
    with pytest.raises(InputError, match="at most 4 tokens"):
        stages[0].step([StageInput(session, 3, ids)])


@pytest.mark.parametrize("kind", ["dynamic", "reserved", "static"])
def test_rolling_back_gives_what_a_fresh_session_gives(stages: list[Stage], kind: str) -> None:
    bottom, applied = stages[0], APPLIED | {f"cache={kind}"}
    session, fresh = bottom.open(session_of(applied), 16), bottom.open(session_of(applied), 16)
    for kept in (session, fresh):
        bottom.step([StageInput(kept, 0, torch.tensor([[1, 2]]))])
    bottom.step([StageInput(session, 2, torch.tensor([[3, 4, 5]]))])
    new = torch.tensor([[9, 8]])
    rolled = bottom.step([StageInput(session, 2, new)])[0].x
    assert torch.equal(rolled, bottom.step([StageInput(fresh, 2, new)])[0].x)


def test_the_head_gets_the_last_position_of_a_prompt_as_a_row_of_its_own(
    files: ModelFiles, stages: list[Stage]
) -> None:
    head, size = stages[-1], files.facts.hidden_size
    assert isinstance(head, Head)
    seen: list[tuple[int, ...]] = []
    module: Any = head.cut.module
    hook = module.get_output_embeddings().register_forward_hook(
        lambda head, given, output: seen.append(given[0].stride())
    )
    try:
        head.step([StageInput(head.open(session_of(APPLIED), 9), 0, torch.zeros(1, 9, size))])
    finally:
        hook.remove()
    assert seen == [(size, size, 1)]

"""Several samples of a prompt: each is the answer that its seed gives alone, and they share forwards and trips."""

from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from typing import Any

import grpc
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families

from splitlearn.checkpoints.folder import ModelFiles
from splitlearn.client.remote_stage import RemoteSession, RemoteStage
from splitlearn.errors import InputError, TrunkFull
from splitlearn.events import Done, Event, GenerationRequest, TokenEvent
from splitlearn.generation.chain import Link
from splitlearn.generation.generator import Generator
from splitlearn.generation.tokenizer import Tokens
from splitlearn.metrics import RunMetrics, first_difference, of_samples, tps_of_all
from splitlearn.models.plan import SplitPlan
from splitlearn.sampling import SEEDS, SamplingParams
from splitlearn.stages import loading
from splitlearn.stages.base import Stage
from splitlearn.stages.local import LocalStage
from tests.conftest import TinyFactory
from tests.e2e.test_ten_families import running
from tests.support.proxy import proxy
from tests.support.trunk import PLAN, Raw, TrunkHere, eventually, hidden, opening, serve_here, served, step
from tests.support.words import generation_of, load_of, session_of

RESERVED = frozenset({"use_cache", "inference_mode", "cache"})
DYNAMIC = RESERVED - {"cache"}
WITH_SDPA = frozenset({"output_attentions"})
AT_TRUNK = frozenset({"use_cache"})
SAMPLES = 4
SAMPLING = SamplingParams(temperature=0.9, top_k=50, top_p=0.95, seed=SEEDS - 2)
REQUEST = GenerationRequest("The sky is blue because", max_new_tokens=12, ignore_eos=True, sampling=SAMPLING)


@pytest.fixture(scope="module")
def files(tiny_model: TinyFactory) -> ModelFiles:
    return tiny_model("llama")


@pytest.fixture
def here(files: ModelFiles) -> Iterator[TrunkHere]:
    with serve_here(files) as running_here:
        yield running_here


@pytest.fixture
def whole(files: ModelFiles) -> LocalStage:
    stage = loaded(files, loading.full_specs(files.n_layers))[0]
    assert isinstance(stage, LocalStage)
    return stage


def loaded(files: ModelFiles, specs: Sequence[loading.StageSpec]) -> tuple[Stage, ...]:
    placement = loading.Placement(torch.device("cpu"), torch.float32)
    return loading.load(files, specs, load_of(RESERVED | WITH_SDPA), placement).chain


@contextmanager
def split(files: ModelFiles, address: str, timeout_s: float = 20) -> Iterator[list[Link]]:
    bottom, *rest = loaded(files, loading.client_specs(PLAN))
    with closing(RemoteStage([address], served(files), timeout_s)) as trunk:
        own = [Link(stage, session_of(RESERVED)) for stage in rest]
        yield [Link(bottom, session_of(RESERVED)), Link(trunk, session_of(AT_TRUNK)), *own]


def generator(files: ModelFiles, links: Sequence[Link], applied: frozenset[str] = RESERVED) -> Generator:
    return Generator(links, Tokens.load(files.folder, use_fast=True), None, generation_of(applied))


def together(made: Generator, request: GenerationRequest = REQUEST) -> tuple[RunMetrics, ...]:
    return of_samples(made.stream(replace(request, samples=SAMPLES)), SAMPLES)


def alone(made: Generator, request: GenerationRequest = REQUEST) -> list[RunMetrics]:
    """The same samples, one after the other."""
    seeds = [(request.sampling.seed + number) % SEEDS for number in range(SAMPLES)]
    runs = [replace(request, sampling=replace(request.sampling, seed=seed)) for seed in seeds]
    return [run for each in runs for run in of_samples(made.stream(each), 1)]


def check_same(found: Sequence[RunMetrics], wanted: Sequence[RunMetrics]) -> None:
    assert [each.token_ids for each in found] == [each.token_ids for each in wanted]
    assert [(each.text, each.finish_reason) for each in found] == [(each.text, each.finish_reason) for each in wanted]
    assert len({each.token_ids for each in found}) == SAMPLES, "samples that are the same show little"


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3", "gemma2", "bloom"])
@pytest.mark.parametrize("applied", [RESERVED, DYNAMIC, frozenset[str]()], ids=["reserved", "dynamic", "no cache"])
def test_each_sample_is_what_its_seed_gives_alone_whole_and_split(
    family: str, applied: frozenset[str], tiny_model: TinyFactory
) -> None:
    files = tiny_model(family)
    with running(files) as model:
        full = generator(files, [Link(model.full, session_of(applied))])
        wanted = alone(full)
        check_same(together(full), wanted)
        check_same(together(generator(files, model.split(applied, applied & AT_TRUNK))), wanted)


@pytest.mark.parametrize(("start", "end"), [(0, 4), (2, 6), (0, 6)])
def test_a_client_without_layers_at_an_end_has_samples_too(start: int, end: int, files: ModelFiles) -> None:
    plan = SplitPlan.of(start, end, files.n_layers)
    bottom, *rest = loaded(files, loading.client_specs(plan))
    stages = (bottom, *loaded(files, loading.trunk_specs(plan)), *rest)
    made = generator(files, [Link(stage, session_of(RESERVED)) for stage in stages])
    check_same(together(made), alone(made))


@pytest.mark.parametrize("flag", ["prompt_lookup", "prefill_overlap"])
def test_drafts_and_prompts_in_pieces_go_with_samples(flag: str, files: ModelFiles, here: TrunkHere) -> None:
    request = replace(REQUEST, prompt="one two three four " * 40)
    with split(files, here.address) as links:
        wanted = alone(generator(files, links), request)
        check_same(together(generator(files, links, RESERVED | {flag}), request), wanted)


def test_samples_share_each_forward_of_a_stage_that_reserves_its_cache(files: ModelFiles, whole: LocalStage) -> None:
    seen: list[int] = []
    assert whole.packs(session_of(RESERVED))
    whole.cut.module.register_forward_pre_hook(lambda module, given: seen.append(1))
    together(generator(files, [Link(whole, session_of(RESERVED))]))
    assert len(seen) == REQUEST.max_new_tokens


def test_samples_share_the_prompt_and_forwards_of_the_trunk_and_leave_nothing_there(
    files: ModelFiles, here: TrunkHere
) -> None:
    with split(files, here.address) as links:
        found = together(generator(files, links))
        shared = {
            sample.name: sample.value
            for family in text_string_to_metric_families(here.runtime.metrics.text())
            for sample in family.samples
            if "forward_sessions" in sample.name and not sample.labels
        }
        (steps,), (forwards,) = (
            [value for name, value in shared.items() if name.endswith(end)] for end in ("_sum", "_count")
        )
        assert steps == 1 + SAMPLES * (REQUEST.max_new_tokens - 1)
        assert forwards < steps
        assert eventually(lambda: not here.runtime.admission.sessions)
    assert {each.bytes_up == each.decode_bytes_up for each in found[1:]} == {True}
    assert found[0].bytes_up > found[0].decode_bytes_up > 0


def test_samples_that_end_early_are_done_while_the_others_go_on(files: ModelFiles, whole: LocalStage) -> None:
    made = generator(files, [Link(whole, session_of(RESERVED))])
    free = alone(made)
    made.tokens.eos_ids = frozenset({free[1].token_ids[3]})
    request = replace(REQUEST, ignore_eos=False)
    wanted = alone(made, request)
    check_same(together(made, request), wanted)
    assert len({each.n_tokens for each in wanted}) > 1
    events = list(made.stream(replace(request, samples=SAMPLES)))
    assert sorted(event.sample for event in events if isinstance(event, Done)) == list(range(SAMPLES))
    for sample, each in enumerate(wanted):
        own = [event for event in events if event.sample == sample]
        assert isinstance(own[-1], Done)
        assert len(own) == each.n_tokens + 1


def test_the_ledger_of_samples_that_go_in_step_is_that_of_the_time_they_share(
    files: ModelFiles, here: TrunkHere
) -> None:
    with split(files, here.address) as links:
        events: list[Event] = list(generator(files, links).stream(replace(REQUEST, samples=SAMPLES)))
    for metrics in of_samples(events, SAMPLES):
        assert sum(metrics.ledger.values()) == pytest.approx(metrics.e2el_s)
        assert metrics.ledger["unattributed"] >= 0
    times = {event.time_s for event in events if isinstance(event, TokenEvent)}
    assert len(times) == REQUEST.max_new_tokens


def test_a_trunk_that_is_lost_costs_no_token_of_any_sample(files: ModelFiles, here: TrunkHere) -> None:
    with split(files, here.address) as links:
        wanted = together(generator(files, links))
    with proxy(here.address) as between, split(files, between.address) as links:
        events = []
        for event in generator(files, links).stream(replace(REQUEST, samples=SAMPLES)):
            events.append(event)
            if len(events) == 5 * SAMPLES:
                between.cut()
        found = of_samples(events, SAMPLES)
    check_same(found, wanted)
    assert all(len(each.recoveries) == 1 for each in found)


def test_a_sample_whose_prompt_is_lost_at_the_trunk_sends_it(
    files: ModelFiles, here: TrunkHere, monkeypatch: pytest.MonkeyPatch
) -> None:
    with split(files, here.address) as links:
        wanted = together(generator(files, links))
        fork = RemoteSession.fork

        def elsewhere(own: RemoteSession, other: RemoteSession, tokens: int) -> None:
            fork(own, other, tokens)
            own._fork_of = b"a session that has ended"

        monkeypatch.setattr(RemoteSession, "fork", elsewhere)
        found = together(generator(files, links))
    check_same(found, wanted)
    assert [len(each.recoveries) for each in found] == [0, 1, 1, 1]


@pytest.mark.parametrize(
    ("change", "code", "said"),
    [
        ({"fork_of": b"unknown"}, grpc.StatusCode.ABORTED, "does not exist or has ended"),
        ({"position": 4}, grpc.StatusCode.INVALID_ARGUMENT, "at most 3"),
        ({"flags": []}, grpc.StatusCode.INVALID_ARGUMENT, "with the same flags"),
        ({"began": True}, grpc.StatusCode.INVALID_ARGUMENT, "set in the first step"),
    ],
    ids=["unknown key", "more than there is", "other flags", "not the first step"],
)
def test_a_branch_that_cannot_be_is_refused_and_the_session_it_names_goes_on(
    change: dict[str, Any], code: grpc.StatusCode, said: str, files: ModelFiles, here: TrunkHere
) -> None:
    with Raw(here.address) as parent, Raw(here.address) as child:
        key = parent.ask(opening(files)).opened.key
        parent.ask(step(hidden(files, 3), 0, 1))
        child.ask(opening(files, **{name: change[name] for name in change if name == "flags"}))
        if "began" in change:
            child.ask(step(hidden(files, 3), 0, 1))
        asked = {"fork_of": change.get("fork_of", key)}
        status, details = child.refusal(step(hidden(files, 1), change.get("position", 3), 2, **asked))
        assert (status, said in details) == (code, True), details
        parent.ask(step(hidden(files, 1), 3, 2))


def test_keys_are_random_and_long(files: ModelFiles, here: TrunkHere) -> None:
    with Raw(here.address) as one, Raw(here.address) as other:
        keys = [each.ask(opening(files)).opened.key for each in (one, other)]
    assert keys[0] != keys[1]
    assert {len(key) for key in keys} == {16}


def test_where_there_is_no_room_for_all_samples_none_stays(files: ModelFiles) -> None:
    with serve_here(files, max_sessions=SAMPLES - 1, max_waiting=0) as few, split(files, few.address, 0.5) as links:
        with pytest.raises(TrunkFull):
            together(generator(files, links))
        assert eventually(lambda: not few.runtime.admission.sessions)


@pytest.mark.parametrize(
    ("samples", "sampling", "said"),
    [
        (0, SAMPLING, "1 to 16"),
        (17, SAMPLING, "1 to 16"),
        ("x", SAMPLING, "1 to 16"),
        (True, SAMPLING, "1 to 16"),
        (2, SamplingParams(), "a temperature above 0"),
    ],
)
def test_samples_that_make_no_sense_are_refused_by_name(samples: int, sampling: SamplingParams, said: str) -> None:
    with pytest.raises(InputError, match=said) as refused:
        GenerationRequest("Why?", samples=samples, sampling=sampling)
    assert refused.value.field == "samples"


def test_tokens_per_second_of_all_samples_count_until_the_last_one_is_there() -> None:
    lengths = (3, 5)
    events = [
        TokenEvent((token,), "", 0.1 * (token + 1), {}, sample=sample)
        for sample, length in enumerate(lengths)
        for token in range(length)
    ]
    found = of_samples(events, len(lengths))
    assert tps_of_all(found) == pytest.approx(8 / 0.5)
    other = (found[0], replace(found[1], token_ids=(0, 1, 2, 9, 4)))
    assert first_difference(found, found) is None
    assert first_difference(found, other) == (1, 3)


@pytest.mark.parametrize("asked", [{"prompt": "a\udcff"}, {"prompt": "\ud83d"}, {"prompt": "a", "stop": ("\udcff",)}])
def test_text_that_is_not_unicode_is_refused_before_a_model_is_asked(asked: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"\\ud.* cannot be used; expected text in UTF-8"):
        GenerationRequest(**asked)
    assert GenerationRequest("\U0001f600 é\u2028").prompt

"""Answers that are held to JSON: whatever the model would say, what comes is valid, and ends where it is complete."""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jsonschema
import llguidance
import numpy as np
import pytest
import torch
from llguidance import hf
from llguidance import numpy as bitmask
from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessor

from splitlearn.checkpoints.folder import ModelFiles
from splitlearn.errors import InputError
from splitlearn.events import Done, GenerationRequest, StageTiming, TokenEvent
from splitlearn.generation import grammar, grammar_check
from splitlearn.generation.chain import Link
from splitlearn.generation.generator import Generator
from splitlearn.generation.speculation import Proposer
from splitlearn.generation.tokenizer import Tokens
from splitlearn.metrics import RunMetrics, of_samples
from splitlearn.response_format import MAX_SCHEMA_BYTES, JsonFormat
from splitlearn.sampling import SamplingParams
from splitlearn.stages import loading
from splitlearn.stages.base import StageInput, StageOutput
from splitlearn.stages.settings import SessionSettings
from tests.support import schemas
from tests.support.client import CACHED, client
from tests.support.trunk import TrunkHere
from tests.support.words import generation_of, load_of, session_of

PROMPT = "Describe the sky."
SCHEMA = {
    "type": "object",
    "properties": {
        "colour": {"enum": ["blue", "grey"]},
        "height": {"type": "integer", "minimum": 0, "maximum": 999},
        "words": {"type": "array", "items": {"type": "string", "maxLength": 5}, "minItems": 2, "maxItems": 3},
    },
    "required": ["colour", "height", "words"],
    "additionalProperties": False,
}
ROOM = 200
ASKED = GenerationRequest(PROMPT, ROOM, response_format=JsonFormat(json.dumps(SCHEMA)))


@dataclass(frozen=True)
class _Chance:
    """A model that says anything: its logits are random."""

    vocabulary: int
    seed: int

    def open(self, settings: SessionSettings, max_length: int) -> Any:
        return self

    def close(self) -> None:
        """There is nothing to free."""

    def step(self, batch: Sequence[StageInput]) -> list[StageOutput]:
        return [StageOutput(self._logits(item), StageTiming({})) for item in batch]

    def _logits(self, item: StageInput) -> torch.Tensor:
        rng = torch.Generator().manual_seed(self.seed * 10_000 + item.position)
        return 3 * torch.randn((1, item.logits, self.vocabulary), generator=rng)


@pytest.fixture(scope="module")
def tokens(files: ModelFiles) -> Tokens:
    return Tokens.load(files.folder, use_fast=True)


def _by_chance(tokens: Tokens, seed: int, extra: int = 0, own: Sequence[str] = ()) -> Generator:
    link = Link(_Chance(tokens.size + extra, seed), session_of({"use_cache"}))
    return Generator([link], tokens, None, generation_of(own))


def _metrics(made: Generator, request: GenerationRequest) -> RunMetrics:
    metrics = RunMetrics.from_events(made.stream(request))
    assert metrics is not None
    return metrics


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Schemas are not compiled in a process of their own first, for the sake of time."""
    monkeypatch.setattr(grammar, "check", lambda schema: None)


SAMPLINGS = (
    SamplingParams(),
    SamplingParams(temperature=1.0, seed=3),
    SamplingParams(temperature=1.5, top_k=3, top_p=0.5, seed=4),
    SamplingParams(repetition_penalty=1.3, frequency_penalty=2.0, logit_bias=((20, 100.0), (0, 100.0))),
)


@pytest.mark.parametrize("quarter", range(4))
@pytest.mark.usefixtures("unchecked")
def test_an_answer_of_any_model_to_any_schema_is_complete_and_valid(tokens: Tokens, quarter: int) -> None:
    for seed in range(quarter * 50, quarter * 50 + 50):
        schema, padding = schemas.schema(seed), seed % 3 * 40  # some models have more logits than tokens
        wanted = JsonFormat(json.dumps(schema))
        request = GenerationRequest(PROMPT, 4000, response_format=wanted, sampling=SAMPLINGS[seed % len(SAMPLINGS)])
        own = ("fast_top_k",) if seed // len(SAMPLINGS) % 2 else ()
        answer = _metrics(_by_chance(tokens, seed, padding, own), request)
        assert answer.finish_reason == "eos", schema
        _check(answer.text, schema)


def _check(text: str, schema: schemas.Schema) -> None:
    """Assert that `text` is JSON and valid, by others than who made it."""
    kind = jsonschema.Draft202012Validator
    kind(schema, format_checker=kind.FORMAT_CHECKER).validate(json.loads(text))


def test_any_object_is_an_object_or_cut_off(tokens: Tokens) -> None:
    for seed in range(20):
        request = GenerationRequest(PROMPT, 400, response_format=JsonFormat())
        answer = _metrics(_by_chance(tokens, seed), request)
        assert answer.text.startswith("{")
        if answer.finish_reason == "eos":
            assert isinstance(json.loads(answer.text), dict)
        else:
            assert (answer.finish_reason, answer.n_tokens) == ("length", 400)


class _Judge(LogitsProcessor):  # type: ignore[misc]
    """Masks by llguidance for transformers' own generate()."""

    def __init__(self, matcher: llguidance.LLMatcher, vocabulary: int, prompt: int) -> None:
        self.matcher, self.seen = matcher, prompt
        self.bits = bitmask.allocate_token_bitmask(1, vocabulary)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.matcher.consume_tokens(input_ids[0, self.seen :].tolist())
        self.seen = input_ids.shape[1]
        bitmask.fill_next_token_bitmask(self.matcher, self.bits)
        found = scores.numpy().copy()
        bitmask.apply_token_bitmask_inplace(found, self.bits)
        return torch.from_numpy(found)


@pytest.fixture(scope="module")
def judged(files: ModelFiles, tokens: Tokens) -> tuple[int, ...]:
    """What transformers generates, masked by llguidance as its own documentation does it."""
    tokenizer = AutoTokenizer.from_pretrained(files.folder)
    text = llguidance.LLMatcher.grammar_from_json_schema(SCHEMA, overrides=grammar_check.OPTIONS)
    matcher = llguidance.LLMatcher(hf.from_tokenizer(tokenizer), text)
    prompt = torch.tensor([tokens.encode(PROMPT, chat=True)])
    model = AutoModelForCausalLM.from_pretrained(files.folder, dtype=torch.float32)
    judge = _Judge(matcher, model.config.vocab_size, prompt.shape[1])
    whole = model.generate(prompt, max_new_tokens=ROOM, do_sample=False, logits_processor=[judge])[0]
    return tuple(whole[prompt.shape[1] :].tolist())


@pytest.mark.parametrize("own", [(), ("head_overlap",), ("prompt_lookup",), ("prefill_overlap",)], ids=str)
def test_split_has_the_tokens_of_transformers_with_the_same_mask(
    files: ModelFiles, here: TrunkHere, judged: tuple[int, ...], own: tuple[str, ...]
) -> None:
    with client(files, here.address, own=CACHED | set(own)) as asking:
        answer = asking.ask(ASKED)
    assert answer.token_ids == judged
    assert answer.head_starts == 0, "its guesses know no grammar"
    _check(answer.text, SCHEMA)


def _full(files: ModelFiles, *proposers: Callable[[], Proposer]) -> Generator:
    placement = loading.Placement(torch.device("cpu"), torch.float32)
    (stage,) = loading.load(files, loading.full_specs(files.n_layers), load_of(CACHED), placement).chain
    own = replace(generation_of(CACHED), proposers=proposers)
    return Generator([Link(stage, session_of(CACHED))], Tokens.load(files.folder, use_fast=True), 512, own)


@dataclass(frozen=True)
class _Told:
    """Knows the answer, but has every fifth token wrong."""

    prompt: int
    answer: Sequence[int]
    costs: bool = False

    def propose(self, sequence: Sequence[int]) -> tuple[Sequence[int], int]:
        at = len(sequence) - self.prompt
        return [token ^ (number % 5 == 0) for number, token in enumerate(self.answer, 1)][at : at + 16], 1


@pytest.mark.parametrize("sampling", [SamplingParams(), SamplingParams(temperature=1.0, top_p=0.9, seed=5)], ids=str)
def test_full_has_the_same_tokens_with_drafts_and_without(
    files: ModelFiles, judged: tuple[int, ...], sampling: SamplingParams
) -> None:
    asked = replace(ASKED, sampling=sampling)
    alone = _metrics(_full(files), asked)
    drafted = _metrics(_full(files, lambda: _Told(alone.prompt_tokens, alone.token_ids)), asked)
    assert drafted.token_ids == alone.token_ids
    assert 0 < drafted.drafts_accepted < drafted.drafts
    assert not sampling.greedy or alone.token_ids == judged


def test_each_of_several_samples_is_that_of_its_seed_alone(files: ModelFiles) -> None:
    made, sampling = _full(files), SamplingParams(temperature=1.0, seed=5)
    together = of_samples(made.stream(replace(ASKED, sampling=sampling, samples=2)), 2)
    for number, answer in enumerate(together):
        alone = _metrics(made, replace(ASKED, sampling=replace(sampling, seed=sampling.seed + number)))
        assert answer.token_ids == alone.token_ids
        _check(answer.text, SCHEMA)
    assert together[0].token_ids != together[1].token_ids


def test_log_probabilities_are_among_the_tokens_that_can_come(files: ModelFiles) -> None:
    events = list(_full(files).stream(replace(ASKED, top_logprobs=20)))
    listed = [each for event in events if isinstance(event, TokenEvent) for each in event.logprobs]
    (first, *top), (last, *others) = listed[0], listed[-1]
    assert first.text == "{" and {each.text for each in top} == {"{"}, "no other token can begin an object"
    assert first.logprob == pytest.approx(0) and last.logprob == pytest.approx(0)
    assert [each.token_id for each in others] == [last.token_id], "only the end can follow it"
    assert all(np.isfinite(each.logprob) for row in listed for each in row)


def test_an_answer_without_room_is_cut_off(files: ModelFiles, judged: tuple[int, ...]) -> None:
    cut = _metrics(_full(files), replace(ASKED, max_new_tokens=len(judged) // 2))
    assert (cut.finish_reason, cut.token_ids) == ("length", judged[: len(judged) // 2])


def test_a_request_without_a_format_asks_nothing_of_llguidance(
    files: ModelFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammar, "Grammar", None)
    monkeypatch.setitem(sys.modules, "llguidance", None)
    assert _metrics(_full(files), GenerationRequest(PROMPT, 8, ignore_eos=True)).n_tokens == 8


def _nested(made: schemas.Schema, depth: int) -> schemas.Schema:
    return made if not depth else {"type": "array", "items": _nested(made, depth - 1)}


REFUSED = {
    "no JSON": "{",
    "no object": "[]",
    "NaN": '{"minimum": NaN, "type": "number"}',
    "Invalid type": '{"type": "strin"}',
    "not": '{"not": {"type": "object"}}',
    "if": '{"if": {"type": "object"}, "then": {"type": "integer"}}',
    "uniqueItems": '{"type": "array", "uniqueItems": true}',
    "contains": '{"contains": {"type": "integer"}, "type": "array"}',
    "dependentRequired": '{"type": "object", "dependentRequired": {"a": ["b"]}}',
    "format": '{"type": "string", "format": "color"}',
    "look-around": '{"type": "string", "pattern": "(?=a)b"}',
    "oneOf": '{"oneOf": [{"type": "integer"}, {"type": "number"}]}',
    "http": '{"$ref": "http://127.0.0.1:9/x.json"}',
    "file": '{"$ref": "file:///etc/passwd"}',
    "required property": '{"type": "object", "properties": {"a": false}, "required": ["a"]}',
    "minimum": '{"type": "integer", "minimum": 5, "maximum": 3}',
    "x-guidance": '{"x-guidance": {"lenient": true}, "not": {}}',
    "recursion": json.dumps(_nested({"type": "integer"}, 200)),
    "schema too large": json.dumps(
        {"allOf": [{"anyOf": [{"properties": {f"p{i}{j}": {}}} for j in range(10)]} for i in range(8)]}
    ),
}


@pytest.mark.parametrize("named", REFUSED)
def test_a_schema_that_an_answer_cannot_be_held_to_is_refused_with_the_reason(tokens: Tokens, named: str) -> None:
    made = _by_chance(tokens, 1)
    with pytest.raises(InputError, match=f"(?i){named.removeprefix('no ')}") as refused:
        list(made.stream(replace(ASKED, response_format=JsonFormat(REFUSED[named]))))
    assert refused.value.field == "response_format"


HOSTILE = {
    "many values": {"enum": [f"value {number}" for number in range(4000)]},
    "a long array": {"type": "array", "items": {"type": "integer"}, "minItems": 10**9},
    "a long text": {"type": "string", "minLength": 10**9},
    "an exponential pattern": {"type": "string", "pattern": "(a|b)*a(a|b){200}"},
    "counts in counts": {"type": "string", "pattern": "^((a{1,1000}){1,1000}){1,1000}$"},
    "many properties": {"type": "object", "properties": {f"p{n}": {"type": "string"} for n in range(1500)}},
    "itself": {"$ref": "#"},
    "many patterns of one text": {
        "type": "string",
        "allOf": [{"pattern": f"(a|b)*{'ab'[n % 2]}(a|b){{{n}}}"} for n in range(30)],
    },
    "a multiple of many states": {"type": "integer", "multipleOf": 10**12 + 39},
    "doubled 30 times": {
        "$ref": "#/$defs/0",
        "$defs": {str(n): {"allOf": [{"$ref": f"#/$defs/{n + 1}"}] * 2} for n in range(30)}
        | {"30": {"type": "integer"}},
    },
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_schema_ends_in_an_answer_or_an_error(tokens: Tokens, kind: str) -> None:
    request = GenerationRequest(PROMPT, 50, response_format=JsonFormat(json.dumps(HOSTILE[kind])))
    try:
        ended = [event for event in _by_chance(tokens, 1).stream(request) if isinstance(event, Done)]
    except InputError as refused:
        assert refused.field == "response_format"
    else:
        assert len(ended) == 1


def test_what_is_no_format_is_refused_before_anything_runs() -> None:
    with pytest.raises(InputError, match="65536"):
        JsonFormat(" " * (MAX_SCHEMA_BYTES + 1))
    with pytest.raises(InputError, match="UTF-8"):
        JsonFormat('"\ud800"')
    with pytest.raises(InputError, match="ignore_eos"):
        replace(ASKED, ignore_eos=True)


class _Slow:
    """A tokenizer without a Rust one behind it."""

    chat_template = None


def test_a_model_whose_tokenizer_is_in_python_or_that_has_no_end_is_refused(files: ModelFiles) -> None:
    rust = AutoTokenizer.from_pretrained(files.folder)
    for made in (Tokens(rust, frozenset()), Tokens(_Slow(), frozenset({1}))):
        with pytest.raises(InputError, match="response_format"):
            grammar.Grammar.compile(JsonFormat(), made)

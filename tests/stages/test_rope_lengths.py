"""Frequencies that change with a sequence's length (rope types dynamic and longrope): the tokens are those of
transformers' own generate() on the uncut model, across the length at which they change, whatever a step holds."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from splitlearn.arms import draft_model
from splitlearn.checkpoints.folder import ModelFiles
from splitlearn.client.remote_stage import RemoteStage
from splitlearn.events import Event, GenerationRequest, TokenEvent
from splitlearn.generation.chain import Link
from splitlearn.generation.generator import Generator
from splitlearn.generation.head_overlap import OverlapPolicy
from splitlearn.generation.speculation import Proposer, Speculation
from splitlearn.generation.tokenizer import Tokens
from splitlearn.models.rope import is_pure
from splitlearn.models.structure import RECORDS, Record
from splitlearn.sampling import SamplingParams
from splitlearn.stages import cuda_graph, loading
from splitlearn.stages.base import Stage, StageInput
from splitlearn.stages.local import LocalStage
from splitlearn.wire import ENVELOPE_BYTES
from tests.support.client import CACHED
from tests.support.proxy import proxy
from tests.support.tiny import make_converted
from tests.support.trunk import PLAN, Raw, TrunkHere, hidden, opening, serve_here, served, step, tensor_of
from tests.support.words import eager_of, generation_of, load_of, session_of

CHANGE, NEW = 32, 24
"""The length past which frequencies change, and how many tokens an answer has."""
SIX = {"short_factor": [1.0] * 6, "long_factor": [1.0, 2.0, 3.0, 5.0, 9.0, 20.0]}
LONGROPE = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": CHANGE, **SIX}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
DEFAULT = {"rope_type": "default", "rope_theta": 100.0}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    # generate() computes the whole sequence anew where it grows past the original length.
    "phi3-longrope": ("phi3", {"original_max_position_embeddings": CHANGE, "rope_parameters": LONGROPE}),
    "phimoe-longrope": (
        "phimoe",
        {
            "original_max_position_embeddings": CHANGE,
            "rope_parameters": {**LONGROPE, "short_mscale": 1.1, "long_mscale": 1.3},
            "num_local_experts": 4,
        },
    ),
    # Here cached keys keep the frequencies that they have.
    "llama-longrope": ("llama", {"rope_parameters": LONGROPE}),
    "llama-dynamic": ("llama", {"max_position_embeddings": CHANGE, "rope_parameters": DYNAMIC}),
    "gemma3-dynamic": (
        "gemma3_text",
        {
            "max_position_embeddings": CHANGE,
            "sliding_window": 16,
            "layer_types": ["sliding_attention", "full_attention"] * 3,
            "rope_parameters": {"full_attention": DYNAMIC, "sliding_attention": DEFAULT},
        },
    ),
}
MOST = ("phi3-longrope", "llama-dynamic")
RESERVED = CACHED | {"cache"}
GREEDY = SamplingParams()
DRAWN = SamplingParams(temperature=1.0, top_k=1)  # the likeliest token, by way of a draw
WORDS = ("The", " sky", " is", " blue", " because", " air", " scatters", " short", " waves", " of", " light")
HERE = loading.Placement(torch.device("cpu"), torch.float32)


class Case:
    """A model's files, and what generate() answers."""

    def __init__(self, files: ModelFiles) -> None:
        self.files = files
        self.tokens = Tokens.load(files.folder, use_fast=True)
        self.answer = cache(self._answer)
        self.restarts = "phi" in files.facts.model_type
        """Whether generate() computes the whole sequence anew where it grows past CHANGE."""

    def prompt(self, length: int) -> str:
        """A text of so many tokens."""
        text, at = WORDS[length % len(WORDS)], length
        while len(self.tokens.encode(text, chat=False)) < length - 4:
            text, at = text + WORDS[(at := at + 3) % len(WORDS)], at
        while len(self.tokens.encode(text, chat=False)) < length:
            text += "~"
        assert len(self.tokens.encode(text, chat=False)) == length
        return text

    def request(self, length: int, samples: int = 1, new: int = NEW) -> GenerationRequest:
        sampling = GREEDY if samples == 1 else DRAWN
        return GenerationRequest(self.prompt(length), new, False, True, sampling=sampling, samples=samples)

    def _answer(self, length: int, new: int = NEW) -> list[int]:
        """What a fresh uncut model of transformers' own says: the judge."""
        model = AutoModelForCausalLM.from_pretrained(self.files.folder, dtype=torch.float32)
        ids = torch.tensor([self.tokens.encode(self.prompt(length), chat=False)])
        said = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, eos_token_id=None
        )
        found: list[int] = said[0, length:].tolist()
        return found


Cases = Callable[[str], Case]


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Cases:
    @cache
    def make(name: str) -> Case:
        model_type, changes = MODELS[name]
        folder: Path = tmp_path_factory.mktemp("rope") / name
        return Case(make_converted(folder, model_type, **dict[str, Any](changes)))

    return make


@pytest.fixture(scope="module", params=MOST)
def case(cases: Cases, request: pytest.FixtureRequest) -> Case:
    return cases(request.param)


@pytest.fixture(scope="module")
def trunk(case: Case) -> Iterator[TrunkHere]:
    with serve_here(case.files, prompt_tokens=5, max_message_bytes=ENVELOPE_BYTES + 7 * 48 * 4) as running:
        yield running


def loaded(case: Case, specs: Sequence[loading.StageSpec], applied: frozenset[str]) -> tuple[LocalStage, ...]:
    return loading.load(case.files, specs, load_of(applied), HERE).stages


def generator(
    case: Case, stages: Sequence[Stage], own: frozenset[str], proposers: Sequence[Callable[[], Proposer]] = ()
) -> Generator:
    links = [Link(stage, session_of(CACHED if isinstance(stage, RemoteStage) else own)) for stage in stages]
    asked = generation_of(own)
    asked = replace(asked, proposers=(*asked.proposers, *proposers))
    return Generator(links, case.tokens, case.files.facts.context_length, asked)


def full(case: Case, own: frozenset[str] = CACHED) -> Generator:
    return generator(case, loaded(case, loading.full_specs(6), own), own)


def split(
    case: Case, address: str, own: frozenset[str] = CACHED, proposers: Sequence[Callable[[], Proposer]] = ()
) -> Generator:
    bottom, *rest = loading.load(case.files, loading.client_specs(PLAN), load_of(own), HERE).chain
    return generator(case, [bottom, RemoteStage([address], served(case.files), 60), *rest], own, proposers)


def said(events: Iterator[Event], sample: int = 0) -> list[int]:
    return [
        token
        for event in events
        if isinstance(event, TokenEvent) and event.sample == sample
        for token in event.token_ids
    ]


@pytest.mark.parametrize("name", MODELS)
def test_the_full_model_says_what_generate_says_from_each_side_of_the_change(cases: Cases, name: str) -> None:
    case = cases(name)
    running = full(case)
    for length in (CHANGE + 9, CHANGE - 10, CHANGE - 1, CHANGE, CHANGE + 1, 5):  # no answer depends on an earlier one
        assert said(running.stream(case.request(length))) == case.answer(length), length


@pytest.mark.parametrize(
    "own", [{"inference_mode"}, RESERVED, CACHED | {"cache=static"}, RESERVED | {"weight_prepack=blocks"}]
)
@pytest.mark.parametrize("name", MOST)
def test_no_kind_of_cache_or_kernel_changes_that(cases: Cases, name: str, own: set[str]) -> None:
    case = cases(name)
    running = full(case, frozenset(own))
    for length in (CHANGE - 10, CHANGE + 9):
        assert said(running.stream(case.request(length))) == case.answer(length), length


@pytest.mark.parametrize("name", MODELS)
def test_several_samples_of_one_prompt_share_their_forwards(cases: Cases, name: str) -> None:
    case = cases(name)
    for length in (CHANGE - 10, CHANGE):
        events = list(full(case, RESERVED).stream(case.request(length, samples=2)))
        assert said(iter(events), 0) == said(iter(events), 1) == case.answer(length), length


def test_sessions_of_any_length_share_a_trunk(case: Case, trunk: TrunkHere) -> None:
    lengths = (CHANGE - 22, CHANGE - 10, CHANGE, CHANGE + 20)
    clients = [split(case, trunk.address) for _ in lengths]

    def ask(client: Generator, length: int) -> list[int]:
        return said(client.stream(case.request(length)))

    with ThreadPoolExecutor(len(lengths)) as threads:
        found = list(threads.map(ask, clients, lengths))
    assert found == [case.answer(length) for length in lengths]


@pytest.mark.parametrize("name", MODELS)
def test_one_forward_of_several_sessions_is_each_ones_own(cases: Cases, name: str) -> None:
    case = cases(name)
    (stage,) = loaded(case, loading.trunk_specs(PLAN), RESERVED)
    x = hidden(case.files, 60)
    # The last: a piece of a prompt that is past the change only at its end.
    steps = [(3, 4, 3), (20, 21, 9), (40, 41, 12), (CHANGE - 2, CHANGE + 2, 10), (2, 6, CHANGE + 8)]
    assert stage.packs(session_of(RESERVED))
    together = stage.open_together(session_of(RESERVED), 60, len(steps))
    alone = [stage.open(session_of(RESERVED), 60) for _ in steps]

    def inputs(sessions: Sequence[object], begin: bool) -> list[StageInput]:
        return [
            StageInput(session, *((0, x[:, :at]) if begin else (at, x[:, at:end])), rope_length=length)
            for session, (at, end, length) in zip(sessions, steps, strict=True)
        ]

    for begin in (True, False):
        apart = [stage.step([item])[0].x for item in inputs(alone, begin)]
        packed = [output.x for output in stage.step(inputs(together, begin))]
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(apart, packed, strict=True))


@pytest.mark.parametrize("own", [set(), {"cache"}, {"head_overlap"}, {"prompt_lookup"}])
def test_a_split_model_says_the_same(
    case: Case, trunk: TrunkHere, own: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(OverlapPolicy, "pays", lambda self: True)
    client = split(case, trunk.address, CACHED | own)
    for length in (CHANGE - 10, CHANGE - 1, CHANGE, CHANGE + 9):
        events = list(client.stream(case.request(length)))
        assert said(iter(events)) == case.answer(length), length
        if "head_overlap" in own:  # none is begun for a step that computes all anew
            early = [event.head_start is not None for event in events if isinstance(event, TokenEvent)]
            anew = CHANGE + 1 - length if case.restarts and length <= CHANGE else 0
            assert early == [at not in (0, anew) for at in range(NEW)]


def test_a_prompt_in_pieces_says_the_same(case: Case, trunk: TrunkHere) -> None:
    client = split(case, trunk.address)
    client = replace(client, settings=replace(client.settings, chunk_tokens=7))
    for length in (CHANGE - 10, CHANGE, CHANGE + 9):
        assert said(client.stream(case.request(length))) == case.answer(length), length


@pytest.mark.parametrize("side", ["client", "trunk"])
def test_a_side_without_a_cache_says_the_same(case: Case, trunk: TrunkHere, side: str) -> None:
    bare = frozenset({"inference_mode"})
    client = split(case, trunk.address, bare if side == "client" else CACHED)
    if side == "trunk":
        bottom, remote, *rest = client.links
        client = replace(client, links=[bottom, Link(remote.stage, session_of(bare)), *rest])
    for length in (CHANGE - 10, CHANGE + 9):
        assert said(client.stream(case.request(length))) == case.answer(length), length


def test_samples_branch_at_the_trunk(case: Case, trunk: TrunkHere) -> None:
    client = split(case, trunk.address)
    for length in (CHANGE - 10, CHANGE, CHANGE + 9):
        events = list(client.stream(case.request(length, samples=2)))
        assert said(iter(events), 0) == said(iter(events), 1) == case.answer(length), length


class _Answer:
    """Guesses what generate() says, with a wrong token after every few."""

    costs = False

    def __init__(self, case: Case, length: int) -> None:
        self._length = length
        self._answer = [token ^ (at % 6 == 5) for at, token in enumerate(case.answer(length))]

    def propose(self, sequence: Sequence[int]) -> tuple[Sequence[int], int]:
        return self._answer[len(sequence) - self._length :], 1


def test_drafts_stop_short_of_the_change(case: Case, trunk: TrunkHere, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Speculation, "_rate", lambda self, count: count)  # as many as there may be
    for length in (CHANGE - 10, CHANGE - 1, CHANGE + 9):
        client = split(case, trunk.address, CACHED, [partial(_Answer, case, length)])
        events = list(client.stream(case.request(length)))
        assert said(iter(events)) == case.answer(length), length
        assert sum(event.drafts for event in events if isinstance(event, TokenEvent)) > 8


@pytest.mark.parametrize("samples", [1, 2])
def test_what_is_replayed_at_another_stream_says_the_same(case: Case, trunk: TrunkHere, samples: int) -> None:
    for length in (CHANGE - 10, CHANGE + 9):
        with proxy(trunk.address) as between:
            found: list[Event] = []
            for event in split(case, between.address).stream(case.request(length, samples=samples)):
                found.append(event)
                if len(found) in (3 * samples, 11 * samples, 16 * samples):  # before the change, at it, and after it
                    between.cut()
        assert between.connections >= 4 * samples
        assert said(iter(found), samples - 1) == case.answer(length), length


def test_a_draft_model_with_such_frequencies_goes_on_past_the_change(case: Case) -> None:
    make, _ = draft_model.load(case.files, HERE)
    stages = loaded(case, loading.full_specs(6), CACHED)
    events = list(generator(case, stages, CACHED, [make]).stream(case.request(CHANGE - 10)))
    assert said(iter(events)) == case.answer(CHANGE - 10)


def test_pieces_of_one_message_have_the_frequencies_of_all_of_it(case: Case, trunk: TrunkHere) -> None:
    x = hidden(case.files, CHANGE + 8)
    (stage,) = loaded(case, loading.trunk_specs(PLAN), CACHED)
    whole = stage.step([StageInput(stage.open(session_of(CACHED), 64), 0, x)])[0].x
    with Raw(trunk.address) as raw:
        raw.ask(opening(case.files))
        parts = [step(x[:, at : at + 7], at, more=at + 7 < x.shape[1]) for at in range(0, x.shape[1], 7)]
        assert torch.allclose(tensor_of(raw.ask(*parts), case.files), whole, atol=1e-5)


@pytest.mark.parametrize("name", ["llama-dynamic"])
def test_a_length_that_cannot_be_is_refused(cases: Cases, name: str) -> None:
    case = cases(name)
    x = hidden(case.files, 2)
    with serve_here(case.files) as here:
        for messages, why in (
            ([step(x, 0, rope_length=65)], "rope_length: 65 cannot be used; expected at most 64"),
            ([step(x, 0, rope_length=2**32 - 1)], "rope_length: 4294967295"),
            ([step(x, 0, rope_length=4, more=True), step(x, 2, rope_length=5)], "rope_length: 5"),
        ):
            with Raw(here.address) as raw:
                raw.ask(opening(case.files))
                code, said = raw.refusal(*messages)
                assert code is grpc.StatusCode.INVALID_ARGUMENT and why in said


def test_such_a_stage_is_not_captured_and_others_are_left_as_they_are(cases: Cases) -> None:
    (stage,) = loaded(cases("phi3-longrope"), loading.full_specs(6), CACHED)
    assert is_pure(stage.cut.module) and cuda_graph.of(eager_of(stage), lambda body: body) is None
    (stage,) = loaded(cases("llama-dynamic"), loading.full_specs(6), CACHED | {"weight_prepack=blocks"})
    assert is_pure(stage.cut.module) and stage.faster is None


@pytest.mark.parametrize(
    ("name", "context"), [("llama-dynamic", 4 * CHANGE), ("gemma3-dynamic", 4 * CHANGE), ("phi3-longrope", 512)]
)
def test_the_context_is_what_the_scaling_gives(cases: Cases, name: str, context: int) -> None:
    case = cases(name)
    assert case.files.facts.context_length == context
    length = context - NEW
    assert said(full(case).stream(case.request(length))) == case.answer(length)


@pytest.mark.parametrize(
    ("rope", "context"),
    [
        ({"rope_type": "dynamic", "factor": 4.0, "original_max_position_embeddings": 64}, 512),
        ({"rope_type": "dynamic", "factor": 16.0, "original_max_position_embeddings": 64}, 1024),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}, 1024),
        ({"rope_type": "linear", "factor": 4.0}, 512),
    ],
)
def test_the_context_of_other_scalings(tmp_path: Path, rope: dict[str, object], context: int) -> None:
    files = make_converted(tmp_path / "model", n_layers=1, rope_parameters={"rope_theta": 10000.0, **rope})
    assert files.facts.context_length == context


def test_the_families_that_compute_anew_are_those_of_which_transformers_says_so() -> None:
    known = {name for name, record in RECORDS.items() if record.restarts}
    found = set()
    for config, model in MODEL_FOR_CAUSAL_LM_MAPPING.items():
        classes = model if isinstance(model, tuple) else (model,)
        for each in classes:
            names = each.prepare_inputs_for_generation.__code__.co_names
            if "original_max_position_embeddings" in names:
                found.add(config.model_type)
    assert found == known and RECORDS.get("llama", Record()).restarts is False

"""A second model's drafts: the answer is the one without them, and what it guesses is what it would have said alone."""

import json
import shutil
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from splitlearn import config
from splitlearn.arms import draft_model
from splitlearn.arms.compare import KINDS
from splitlearn.arms.draft_model import DraftModel
from splitlearn.arms.report import ArmReport
from splitlearn.arms.runs import Runs
from splitlearn.arms.spec import Kind
from splitlearn.checkpoints.folder import ModelFiles
from splitlearn.errors import InputError
from splitlearn.events import GenerationRequest
from splitlearn.flags.selection import availability
from splitlearn.generation.speculation import COUNTS, Speculation
from splitlearn.models.cut import forward, layers_of
from splitlearn.runtime.progress import silent
from splitlearn.sampling import SamplingParams
from splitlearn.stages import loading
from tests.conftest import TinyFactory
from tests.support.words import load_of, session_of

PLACEMENT = loading.Placement(torch.device("cpu"), torch.float32)
PROMPT, TOKENS = "one two three four five six seven", 40
ALONE = "low_cpu_mem_usage,inference_mode,use_cache,cache"
APPLIED = frozenset(ALONE.split(","))


@pytest.fixture(scope="module")
def files(tiny_model: TinyFactory) -> ModelFiles:
    return tiny_model("llama", n_layers=5)


def _runs(files: ModelFiles, draft: ModelFiles) -> Runs:
    model = {"name": str(files.folder), "draft": str(draft.folder)}
    return Runs(config.parse({"model": model, "runs": {"threads": 1}}), silent)


@pytest.fixture(scope="module")
def by_itself(files: ModelFiles) -> Iterator[Runs]:
    """The model is its own draft: in 4 bits, so that it is right often and not always."""
    with _runs(files, files) as made:
        yield made


@pytest.fixture(scope="module")
def by_another(files: ModelFiles, tiny_model: TinyFactory) -> Iterator[Runs]:
    with _runs(files, tiny_model("gpt2", n_layers=3)) as made:
        yield made


def _report(runs: Runs, kind: Kind, words: str, request: GenerationRequest) -> ArmReport:
    return next(item for item in runs.stream(kind, runs.flags(words), request) if isinstance(item, ArmReport))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sampling", [SamplingParams(), SamplingParams(temperature=0.8, top_k=50, seed=7)], ids=str)
@pytest.mark.parametrize("which", ["by_itself", "by_another"])
def test_an_answer_has_the_tokens_of_one_without_drafts(
    request: pytest.FixtureRequest, which: str, kind: Kind, sampling: SamplingParams
) -> None:
    runs: Runs = request.getfixturevalue(which)
    asked = GenerationRequest(PROMPT, TOKENS, ignore_eos=True, sampling=sampling)
    alone, drafted, both = (
        _report(runs, kind, words, asked).metrics
        for words in (ALONE, f"{ALONE},draft_model", f"{ALONE},draft_model,prompt_lookup")
    )
    assert drafted.token_ids == alone.token_ids == both.token_ids
    assert alone.drafts == 0 < drafted.drafts


def _loaded(files: ModelFiles) -> DraftModel:
    stage = loading.load(files, loading.full_specs(files.n_layers), load_of(APPLIED), PLACEMENT).stages[0]
    return DraftModel(stage, threading.Lock(), session_of(APPLIED), 300, 64)


def _greedy(files: ModelFiles, sequence: list[int], count: int) -> list[int]:
    """What the model says after `sequence`, without a cache."""
    cut, found = _loaded(files)._stage.cut, list(sequence)
    with torch.inference_mode():
        for _ in range(count):
            found.append(int(forward(cut, torch.tensor([found]), 0, None)[0, -1, :300].argmax()))
    return found[len(sequence) :]


def test_it_guesses_what_it_would_say_also_after_it_was_wrong(files: ModelFiles) -> None:
    model, sequence = _loaded(files), [5, 6, 7]
    for came in ([1, 2], [3], [4, 5, 6, 7, 8]):
        guess, _ = model.propose(sequence)
        assert list(guess[:4]) == _greedy(files, sequence, 4)
        sequence = [*sequence, *guess[:2], *came]
    shorter = sequence[:5]
    assert list(model.propose(shorter)[0][:3]) == _greedy(files, shorter, 3)


def test_each_of_its_tokens_but_the_first_goes_through_all_layers_in_one_call(default_model: ModelFiles) -> None:
    make, _ = draft_model.load(default_model, PLACEMENT)
    model, calls = make(), list[int]()
    layers_of(model._stage.cut)[0].register_forward_pre_hook(lambda _, given: calls.append(given[0].shape[1]))
    assert len(model.propose([5, 6, 7])[0][:4]) == 4
    assert calls == [3]


def test_it_guesses_no_further_than_its_context_reaches(files: ModelFiles) -> None:
    model = _loaded(files)
    assert [len(model.propose([1] * length)[0]) for length in (1, 50, 63, 64, 70)] == [COUNTS[-1], 14, 1, 0, 0]


def test_where_its_drafts_do_not_pay_it_is_not_asked(files: ModelFiles) -> None:
    model, fed = _loaded(files), list[int]()
    speculation, sequence = Speculation([model]), [5, 6, 7]
    for _ in range(30):
        fed.append(len(speculation.drafts(sequence, 16)))
        asked = len(model._fed)
        sequence = [*sequence, 1]
        speculation.came([1], fed[-1], 0.01 * (1 + fed[-1]))
        assert len(model._fed) == asked
    tried = [count for count in fed if count]
    assert sorted(tried) == sorted(set(tried)) and not any(fed[len(COUNTS) :])


def test_a_model_of_other_tokens_is_refused_by_name(files: ModelFiles, tmp_path: Path) -> None:
    folder = tmp_path / "other"
    shutil.copytree(files.folder, folder)
    read = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = read["model"]["vocab"]
    one, other = list(vocabulary)[300:302]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    (folder / "tokenizer.json").write_text(json.dumps(read), encoding="utf-8")
    with pytest.raises(InputError, match="model.draft.*vocabulary.*4 differ"):
        draft_model.check_vocabulary(replace(files, folder=folder, name="other"), files)


def test_a_draft_that_is_no_model_is_named_as_it_is_in_the_settings(files: ModelFiles) -> None:
    runs = Runs(config.parse({"model": {"name": str(files.folder), "draft": "nosuch"}}), silent)
    with pytest.raises(InputError, match="model.draft: 'nosuch'"):
        runs.read_model()


def test_without_a_draft_model_the_flag_says_what_it_needs(files: ModelFiles) -> None:
    with Runs(config.parse({"model": {"name": str(files.folder)}}), silent) as runs:
        reasons = availability({"full": runs.here, "client": runs.here, "trunk": runs.here})
    assert all("model.draft" in str(reasons[side]["draft_model"]) for side in ("full", "client"))

"""Attacks recover text from what crossed the wire, and from nothing else."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from splitlearn.checkpoints.folder import ModelFiles
from splitlearn.errors import InputError
from splitlearn.privacy import search
from splitlearn.privacy.checkpoint import Checkpoint
from splitlearn.privacy.registry import ATTACKS
from splitlearn.privacy.split_model import SplitModel, VictimSession
from tests.conftest import TinyFactory
from tests.support import attacker
from tests.support.forks import printed
from tests.support.trunk import PLAN

PROMPT, TOKENS = "The sky is blue, and Größe 7 日本語 cost 12,350.75 at 06:55.", 5
Run = Callable[[str], VictimSession]


@pytest.fixture(scope="module")
def run(files: ModelFiles) -> Run:
    """`run("int8")`: the session of the prompt, with that form on the wire."""
    split = SplitModel(files, PLAN, "float32")

    def of(wire: str) -> VictimSession:
        return split.run(PROMPT, frozenset({f"wire_dtype={wire}"}), TOKENS)

    return of


@pytest.fixture(scope="module")
def checkpoint(files: ModelFiles) -> Checkpoint:
    return Checkpoint(files, PLAN, "float32", network_windows=attacker.FEW)


def share(session: VictimSession, recovered: tuple[int | None, ...]) -> float:
    """Of the ids that crossed the wire, those that were recovered at their place."""
    truth = (session.prompt_ids + session.answer_ids)[: len(session.capture.sent)]
    return sum(one == other for one, other in zip(truth, recovered, strict=True)) / len(truth)


@pytest.mark.parametrize("wire", ["float32", "bfloat16", "int8"])
def test_search_recovers_every_token_that_crossed_the_wire(run: Run, checkpoint: Checkpoint, wire: str) -> None:
    session = run(wire)
    assert share(session, ATTACKS["search"].run(session.capture, checkpoint)) == 1.0


@pytest.mark.parametrize("wire", ["float32", "int8"])
def test_the_trunk_reads_a_greedy_answer_from_what_it_sends_back(run: Run, checkpoint: Checkpoint, wire: str) -> None:
    session = run(wire)
    found = ATTACKS["answer"].run(session.capture, checkpoint)
    assert found == (*[None] * len(session.prompt_ids), *session.answer_ids)


def test_an_attack_in_a_process_with_the_capture_and_the_checkpoint_alone_recovers_the_prompt(
    run: Run, files: ModelFiles, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    session = run("float32")
    session.capture.save(tmp_path / "capture")
    arguments = [str(tmp_path / "capture"), str(files.folder), *ATTACKS]
    found = json.loads(printed(attacker.main, arguments, tmp_path, tmp_path / "errors"))
    assert found.keys() == ATTACKS.keys()
    assert share(session, tuple(found["search"])) == 1.0
    for name in ("linear", "inverter"):  # what is learnt is the same in every process
        assert tuple(found[name]) == ATTACKS[name].run(session.capture, checkpoint)
    assert tuple(found["answer"][len(session.prompt_ids) :]) == session.answer_ids


@pytest.mark.parametrize("name", ATTACKS)
def test_shuffled_states_destroy_recall(run: Run, checkpoint: Checkpoint, name: str) -> None:
    session = run("float32")
    found = ATTACKS[name].run(session.capture.shuffled(seed=3), checkpoint)
    truth = session.prompt_ids + session.answer_ids
    right = [one == other for one, other in zip(truth, found, strict=False) if other is not None]
    assert sum(right) / len(right) < 0.35


def test_a_trained_network_adds_to_the_linear_maps_what_the_tokens_before_tell(tiny_model: TinyFactory) -> None:
    files = tiny_model("gpt2")
    checkpoint = Checkpoint(files, type(PLAN)(4, 5, 6), "float32", network_windows=64)
    ids = torch.randint(len(checkpoint.embeddings), (8, 32), generator=torch.Generator().manual_seed(1))
    x, network = checkpoint.states(ids, 8), checkpoint.recurrent
    with torch.inference_mode():
        linear = checkpoint.linear(x)
        found = network(x, linear)
    right = [(checkpoint.embedding_table.likeness(each).argmax(-1) == ids).sum() for each in (linear, found)]
    assert right[1] > right[0]


@pytest.mark.parametrize("layers", [1, search.SHALLOW + 1])
def test_states_of_another_family_are_read_too_behind_few_layers_and_many(tiny_model: TinyFactory, layers: int) -> None:
    files = tiny_model("gpt2")
    plan = type(PLAN)(layers, 6, 6)
    session = SplitModel(files, plan, "float32").run(PROMPT, frozenset(), TOKENS)
    checkpoint = Checkpoint(files, plan, "float32", network_windows=attacker.FEW)
    ATTACKS["search"].prepare(checkpoint)
    assert ("recurrent" in vars(checkpoint)) == (layers > search.SHALLOW), "a network is trained where it is used"
    assert share(session, ATTACKS["search"].run(session.capture, checkpoint)) == 1.0


def test_a_checkpoint_of_another_model_is_refused(run: Run, tiny_model: TinyFactory) -> None:
    with pytest.raises(InputError, match="digest"):
        Checkpoint.of(run("float32").capture, tiny_model("gpt2"))


def test_what_is_learnt_of_a_cut_is_kept_and_learnt_anew_where_its_file_is_damaged(
    files: ModelFiles, tmp_path: Path
) -> None:
    learnt = Checkpoint(files, PLAN, "float32", kept=tmp_path).first
    (path,) = tmp_path.iterdir()
    kept = path.read_bytes()
    assert torch.equal(Checkpoint(files, PLAN, "float32", kept=tmp_path).first.weights, learnt.weights)
    Checkpoint(files, PLAN, "float32", seed=1, kept=tmp_path).first  # noqa: B018  # another seed's is another file
    assert path.read_bytes() == kept and len(list(tmp_path.iterdir())) == 2
    path.write_bytes(kept[:100])
    assert torch.equal(Checkpoint(files, PLAN, "float32", kept=tmp_path).first.weights, learnt.weights)
    assert path.read_bytes() == kept


def test_a_network_is_learnt_once_where_it_is_kept(files: ModelFiles, tmp_path: Path) -> None:
    x = torch.randn(5, files.facts.hidden_size, generator=torch.Generator().manual_seed(0))
    one, other = (Checkpoint(files, PLAN, "float32", network_windows=attacker.FEW, kept=tmp_path) for _ in range(2))
    learnt = one.inverted(x)
    written = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert torch.allclose(other.inverted(x), learnt, atol=1e-6)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == written

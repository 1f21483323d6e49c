"""Defences against an attacker who does not know them, and against one who does."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from splitlearn.checkpoints.folder import ModelFiles
from splitlearn.cli import main as command_line
from splitlearn.errors import InputError
from splitlearn.models.cut import forward
from splitlearn.models.plan import SplitPlan
from splitlearn.privacy.checkpoint import Checkpoint
from splitlearn.privacy.defences import NONE, ROTATION
from splitlearn.privacy.opponents import Attacker, Opponents
from splitlearn.privacy.own_weights import fine_tune
from splitlearn.privacy.registry import ATTACKS
from splitlearn.privacy.rotation import orthogonal, recovered, rotate
from splitlearn.privacy.split_model import SplitModel, VictimSession
from tests.conftest import TinyFactory
from tests.e2e.test_cli import configured
from tests.support.trunk import PLAN, settings

PROMPT, TOKENS = "The sky is blue, and Größe 7 cost 12,350.75 at 06:55.", 5


@pytest.fixture(scope="module")
def opponents(files: ModelFiles) -> Opponents:
    return Opponents(files, PLAN, "float32", TOKENS)


def share(attacker: Attacker, name: str, session: VictimSession) -> float:
    """Of the prompt's ids, those that were recovered at their place."""
    found = attacker.run(ATTACKS[name], session.capture)
    return sum(one == other for one, other in zip(session.prompt_ids, found, strict=False)) / len(session.prompt_ids)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_a_rotated_trunk_gives_the_same_logits_and_its_weights_say_what_the_rotation_is(
    tiny_model: TinyFactory, family: str
) -> None:
    files = tiny_model(family)
    plan = SplitPlan(2, files.n_layers - 2, files.n_layers)
    plain, rotated = SplitModel(files, plan, "float32"), SplitModel(files, plan, "float32", rotated=True)
    one, other = (split.run(PROMPT, frozenset(), TOKENS) for split in (plain, rotated))
    q = orthogonal(files.facts.hidden_size, 0)
    checkpoint = Checkpoint(files, plan, "float32")
    logits = [
        forward(checkpoint.top, x.unsqueeze(0), 0, None)
        for x in (one.capture.returned, other.capture.turned(q.T).returned)
    ]
    assert (logits[0] - logits[1]).abs().max() <= 1e-4
    assert one.answer_ids == other.answer_ids
    assert (one.capture.sent - other.capture.sent).abs().mean() > 0.1 * one.capture.sent.abs().mean()
    assert torch.allclose(recovered(checkpoint.trunk, rotated.trunk.cut), q, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_a_rotation_changes_nothing_but_rounding(tiny_model: TinyFactory, family: str) -> None:
    files = tiny_model(family)
    cut = SplitModel(files, SplitPlan(2, files.n_layers - 2, files.n_layers), "float32").trunk.cut
    cut.module.double()
    for name, norm in list(cut.module.named_modules()):
        if hasattr(norm, "variance_epsilon"):  # transformers' norms compute in float32 whatever they get
            exact = torch.nn.RMSNorm(len(norm.weight), norm.variance_epsilon, dtype=torch.float64)
            exact.load_state_dict(norm.state_dict())
            cut.module.set_submodule(name, exact)
    made = torch.Generator().manual_seed(1)
    x = torch.randn(1, 9, files.facts.hidden_size, dtype=torch.float64, generator=made)
    q = orthogonal(files.facts.hidden_size, 0)
    with torch.inference_mode():
        before = forward(cut, x, 0, None)
    rotate(cut, q)
    with torch.inference_mode():
        after = forward(cut, x @ q, 0, None) @ q.T
    assert (before - after).abs().max() <= 1e-10 * before.abs().max()


def test_a_model_that_a_rotation_would_change_is_refused(tiny_model: TinyFactory) -> None:
    with pytest.raises(InputError, match="rotation") as refused:
        SplitModel(tiny_model("gpt2"), SplitPlan(1, 5, 6), "float32", rotated=True)
    assert "a model of: llama" in str(refused.value)


def test_a_rotation_stops_those_alone_who_do_not_know_of_it(opponents: Opponents) -> None:
    session = opponents.session("rotation", PROMPT)
    assert share(opponents.unknowing, "linear", session) < 0.3
    assert share(opponents.knowing("rotation"), "search", session) == 1.0


def test_who_knows_of_a_clients_own_weights_learns_from_its_states_and_from_no_more_than_it_asked(
    opponents: Opponents,
) -> None:
    session, plain = opponents.session("own_weights", PROMPT), opponents.session("none", PROMPT)
    assert not torch.allclose(session.capture.sent, plain.capture.sent, rtol=1e-2)
    knowing = opponents.knowing("own_weights").checkpoint
    assert knowing.asked is not None and knowing.asked.ids.shape == (64, 64)
    ids = knowing.asked.ids[:1]
    assert not torch.allclose(knowing.asked.states[:1], knowing.states(ids, 1), rtol=1e-2), "these are the public ones"


def test_a_client_with_own_weights_leaves_all_others_as_they_are(files: ModelFiles) -> None:
    public, own = SplitModel(files, PLAN, "float32"), SplitModel(files, PLAN, "float32")
    fine_tune(own, seed=0)
    first, *rest = [
        all(map(torch.equal, one.module.parameters(), other.module.parameters()))
        for one, other in zip(public.cuts, own.cuts, strict=True)
    ]
    assert not first and all(rest)


@pytest.mark.parametrize("defence", ["gaussian_noise=0.3", "topk_sparsification=0.25"])
def test_search_reads_through_a_defence_that_it_knows(opponents: Opponents, defence: str) -> None:
    session = opponents.session(defence, PROMPT)
    assert share(opponents.knowing(defence), "search", session) >= 0.9


def test_the_loss_of_a_prompt_is_that_of_transformers_unless_a_defence_changes_the_states(
    files: ModelFiles, opponents: Opponents
) -> None:
    plain, rotated, noisy = (opponents.session(each, PROMPT) for each in (NONE, ROTATION, "gaussian_noise=1.0"))
    model = AutoModelForCausalLM.from_pretrained(files.folder, dtype="float32").eval()
    ids = torch.tensor([plain.prompt_ids])
    with torch.inference_mode():
        mean = float(model(ids, labels=ids).loss)
    for session in (plain, rotated):
        assert session.loss.tokens == ids.shape[1] - 1
        assert session.loss.nats / session.loss.tokens == pytest.approx(mean, rel=1e-4)
    assert abs(noisy.loss.nats - plain.loss.nats) > 1e-3 * plain.loss.nats


def test_an_attacker_who_knows_the_noise_learns_with_other_draws_than_the_victims(opponents: Opponents) -> None:
    session, knowing = opponents.session("gaussian_noise=0.3", PROMPT), opponents.knowing("gaussian_noise=0.3")
    plain = opponents.session("none", PROMPT)
    ids = torch.tensor([session.prompt_ids])
    own = knowing.checkpoint.states(ids, 1)[0] - opponents.unknowing.checkpoint.states(ids, 1)[0]
    theirs = session.capture.sent[: len(own)] - plain.capture.sent[: len(own)]
    assert torch.allclose(own.std(dim=1), theirs.std(dim=1), rtol=0.6)
    assert torch.corrcoef(torch.stack([own.flatten(), theirs.flatten()]))[0, 1].abs() < 0.1


def test_a_sweep_has_a_row_for_each_kind_of_attacker_and_what_a_defence_costs(
    files: ModelFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    configured(tmp_path, settings(files))
    defences = "none,wire_dtype=int8,gaussian_noise=1.0,rotation"
    command = [
        "attack",
        "--splits",
        "2",
        "--limit",
        "2",
        "--answer-tokens",
        "3",
        "--attacks",
        "linear,answer",
        "--json",
    ]
    assert command_line.main([*command, "--defences", defences, "--config", "config.yaml"]) == 0
    said = json.loads(capsys.readouterr().out)["results"]
    lines = {(line["defence"], line["knows"], line["attack"]): line for line in said if line["cut"]}
    assert [key for key in lines if key[2] == "linear"] == [
        ("none", None, "linear"),
        ("wire_dtype=int8", None, "linear"),
        ("gaussian_noise=1.0", False, "linear"),
        ("gaussian_noise=1.0", True, "linear"),
        ("rotation", False, "linear"),
        ("rotation", True, "linear"),
    ]
    assert [lines[each]["flips"]["value"] for each in (("none", None, "answer"), ("rotation", True, "answer"))] == [
        0,
        0,
    ]
    assert lines["rotation", True, "answer"]["answer"]["value"] == 1.0
    plain, int8 = (lines[name, None, "linear"]["token_bytes"] for name in ("none", "wire_dtype=int8"))
    assert plain == 8 * files.facts.hidden_size and int8 < plain / 3

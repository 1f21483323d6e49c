"""A capture is what a trunk server has of a session: recorded by a relay before it, or made in this process."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from splitlearn.checkpoints.folder import ModelFiles
from splitlearn.errors import InputError
from splitlearn.events import GenerationRequest
from splitlearn.privacy.capture import Capture
from splitlearn.privacy.relay import Relay
from splitlearn.privacy.split_model import SplitModel
from tests.support.client import CACHED, client
from tests.support.trunk import PLAN, Raw, TrunkHere, hidden, opening, step

PROMPT, TOKENS = "The sky is blue, and the model has three parts.", 5


@pytest.fixture(scope="module")
def split(files: ModelFiles) -> SplitModel:
    return SplitModel(files, PLAN, "float32")


def assert_same(one: Capture, other: Capture) -> None:
    assert torch.equal(one.sent, other.sent) and torch.equal(one.returned, other.returned)
    assert (one.sent.dtype, one.returned.dtype) == (other.sent.dtype, other.returned.dtype)
    facts = [(each.model, each.digest, each.plan, each.dtype, each.form, each.prompt_tokens) for each in (one, other)]
    assert facts[0] == facts[1]


@pytest.mark.parametrize("wire", ["float32", "bfloat16", "int8"])
def test_a_relay_before_a_real_server_records_what_a_sweep_makes_to_the_bit(
    files: ModelFiles, here: TrunkHere, split: SplitModel, wire: str, tmp_path: Path
) -> None:
    flag = f"wire_dtype={wire}"
    request = GenerationRequest(PROMPT, TOKENS, chat=False, ignore_eos=True)
    with Relay(here.address) as relay, client(files, relay.address, trunk=CACHED | {flag}) as victim:
        metrics = victim.ask(request)
    made = split.run(PROMPT, frozenset({flag}), TOKENS)
    (recorded,) = relay.sessions
    assert_same(recorded.capture(), made.capture)
    assert made.answer_ids == tuple(metrics.token_ids)
    assert len(made.capture.sent) == len(made.prompt_ids) + TOKENS - 1
    made.capture.save(tmp_path / "capture")
    assert_same(Capture.load(tmp_path / "capture"), made.capture)


def test_a_relay_ends_a_call_as_the_server_has_ended_it(files: ModelFiles, here: TrunkHere) -> None:
    wrong = opening(files, digest="0" * 64)
    with Raw(here.address) as direct:
        expected = direct.refusal(wrong)
    with Relay(here.address) as relay, Raw(relay.address) as relayed:
        assert relayed.refusal(wrong) == expected
    with pytest.raises(InputError, match="at least one step"):
        relay.sessions[0].capture()


def test_of_positions_that_were_sent_again_the_last_state_counts(files: ModelFiles, here: TrunkHere) -> None:
    first, again = hidden(files, 4), hidden(files, 2, seed=1)
    with Relay(here.address) as relay, Raw(relay.address) as session:
        session.ask(opening(files))
        session.ask(step(first, 0))
        session.ask(step(again, 1, step_id=2, truncate=True))
        found = relay.sessions[0].capture()
    assert torch.equal(found.sent, torch.cat([first[0, :1], again[0]]))
    assert found.sent.shape == found.returned.shape
    assert found.prompt_tokens == 3


@pytest.mark.parametrize("metadata", [None, {"capture": "{}"}, {"capture": '{"format": "another"}'}, {"capture": "["}])
def test_a_file_that_is_no_capture_is_one_line(tmp_path: Path, metadata: dict[str, str] | None) -> None:
    save_file({"sent": torch.zeros(2, 3), "returned": torch.zeros(2, 3)}, tmp_path / "file", metadata)
    with pytest.raises(InputError, match="capture that splitlearn wrote") as refused:
        Capture.load(tmp_path / "file")
    assert "\n" not in str(refused.value)


def test_numbers_that_contradict_the_states_are_refused(split: SplitModel, tmp_path: Path) -> None:
    made = split.run("a b c", frozenset(), 2).capture
    made.sent[0, 0] = torch.nan
    made.save(tmp_path / "file")
    with pytest.raises(InputError, match="finite"):
        Capture.load(tmp_path / "file")

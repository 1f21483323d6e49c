"""Hostile clients beside one that generates: a short form of `python -m bench fuzz`."""

import random
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bench.fuzz import STRANGER, Tally, attack, knock
from bench.hostile import Attacker, Script, Target, oversized, scripts, silent, target
from splitlearn.access import tokens as token_file
from splitlearn.checkpoints.folder import ModelFiles
from splitlearn.client.remote_stage import RemoteStage
from splitlearn.client.served import describe
from splitlearn.errors import InputError, TrunkDenied
from splitlearn.events import GenerationRequest, TokenEvent
from splitlearn.generation.chain import Link
from splitlearn.generation.generator import Generator
from splitlearn.generation.tokenizer import Tokens
from splitlearn.sampling import SamplingParams
from splitlearn.stages import loading
from splitlearn.wire import codec
from splitlearn.wire import trunk_pb2 as pb
from splitlearn.wire.channel import NONE, Credentials
from splitlearn.wire.hidden_states import Int8Blocks, Plain, Rows
from tests.conftest import TinyFactory
from tests.support.trunk import PLAN, Raw, Trunk, encoded, eventually, hidden, opening, serve, served, step, tensor_of
from tests.support.trunk import settings as trunk_settings
from tests.support.words import generation_of, load_of, session_of

CACHED = frozenset({"use_cache", "inference_mode"})
HOSTILE, OTHER = "secret-of-the-hostile", "secret-of-the-other"
SESSIONS = 12
MAX_MESSAGE_BYTES = 65_536
PROMPT = "The sky is blue because air scatters short waves of light more than long ones."
MEGABYTE = 1 << 20
HIDDEN = 6
ANY_SPEED = settings(deadline=None, database=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def files(tiny_model: TinyFactory) -> ModelFiles:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def trunk(files: ModelFiles, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trunk]:
    folder: Path = tmp_path_factory.mktemp("hostile")
    entries = [
        {"name": name, "sha256": token_file.digest(secret), "sessions": SESSIONS, "tokens_per_second": 1e6}
        for name, secret in (("hostile", HOSTILE), ("other", OTHER))
    ]
    (folder / "tokens.yaml").write_text(yaml.safe_dump(entries))
    limits = {
        "tokens": str(folder / "tokens.yaml"),
        "open_s": 1.0,
        "idle_s": 2.0,
        "max_message_bytes": MAX_MESSAGE_BYTES,
        "kv_bytes": 16 * MEGABYTE,
        "max_variants": 0,
    }
    layers = {"start": PLAN.start, "end": PLAN.end}
    with serve(trunk_settings(files, split=layers, server=limits), folder) as running:
        yield running


@dataclass
class Client:
    """The other client: two stages of its own, and the trunk."""

    generator: Generator
    remote: RemoteStage

    def answer(self) -> list[int]:
        request = GenerationRequest(
            PROMPT, max_new_tokens=24, ignore_eos=True, sampling=SamplingParams(repetition_penalty=1.5)
        )
        events = self.generator.stream(request)
        return [token for event in events if isinstance(event, TokenEvent) for token in event.token_ids]


@pytest.fixture(scope="module")
def client(trunk: Trunk, files: ModelFiles) -> Iterator[Client]:
    placement = loading.Placement(torch.device("cpu"), torch.float32)
    bottom, *rest = loading.load(files, loading.client_specs(PLAN), load_of(frozenset()), placement).chain
    remote = RemoteStage([trunk.address], served(files), 60, Credentials(token=OTHER))
    links = [Link(stage, session_of(CACHED)) for stage in (bottom, remote, *rest)]
    yield Client(Generator(links, Tokens.load(files.folder, use_fast=True), None, generation_of(CACHED)), remote)
    remote.close()


@pytest.fixture(scope="module")
def aim(trunk: Trunk) -> Target:
    return target(describe(trunk.address, Credentials(token=HOSTILE)), CACHED, MAX_MESSAGE_BYTES)


def test_hostile_clients_are_refused_properly_while_another_gets_its_exact_tokens(
    trunk: Trunk, client: Client, aim: Target
) -> None:
    wanted, answers, over = client.answer(), list[list[int]](), threading.Event()

    def generate() -> None:
        while not over.is_set():
            answers.append(client.answer())

    process = psutil.Process(trunk.process.pid)
    before, tally = process.memory_info().rss, Tally()
    thread = threading.Thread(target=generate)
    thread.start()
    attacker, stranger = Attacker(trunk.address, Credentials(token=HOSTILE)), Attacker(trunk.address, NONE)
    try:
        attack(attacker, silent(aim), 1, 1, tally)
        attack(attacker, scripts(aim), 120, 2, tally)
        attack(attacker, oversized(aim), 4, 3, tally)
        attack(stranger, scripts(aim).map(lambda script: Script(STRANGER, script.messages)), 5, 4, tally)
        for number in range(10):
            knock(trunk.address, random.Random(number))
        tally.count([], attacker.let_go())
    finally:
        over.set()
        thread.join()
        attacker.close()
        stranger.close()
    assert not tally.wrong
    assert tally.messages > 300
    assert {code for kind, code in tally.ends if kind == STRANGER} == {"UNAUTHENTICATED"}
    assert ("silent", "DEADLINE_EXCEEDED") in tally.ends
    assert answers
    assert all(answer == wanted for answer in answers)
    assert process.memory_info().rss - before < 128 * MEGABYTE
    assert trunk.process.poll() is None
    assert "Traceback" not in trunk.errors.read_text()


def test_afterwards_every_session_is_free(trunk: Trunk, files: ModelFiles, aim: Target) -> None:
    attacker = Attacker(trunk.address, Credentials(token=HOSTILE))
    scripts = [Script("again", (aim.open(), aim.step(1, 0)))] * SESSIONS

    def all_let_in() -> bool:
        return all(end.answers == 3 for end in attacker.play(scripts))

    assert eventually(all_let_in)
    attacker.close()


def test_a_session_does_not_reach_anothers_cache(trunk: Trunk, files: ModelFiles) -> None:
    """Whatever ids and positions it names: what it is answered depends on what it sent, and the other's answers too."""
    shown, x = Credentials(token=OTHER), hidden(files, 6, seed=5)
    with Raw(trunk.address, shown) as alone:
        alone.ask(opening(files))
        wanted = [tensor_of(alone.ask(step(x[:, at : at + 2], at, at + 1)), files) for at in (0, 2, 4)]
    with Raw(trunk.address, shown) as victim, Raw(trunk.address, Credentials(token=HOSTILE)) as spy:
        victim.ask(opening(files))
        spy.ask(opening(files))
        for index, at in enumerate((0, 2, 4)):
            answer = tensor_of(victim.ask(step(x[:, at : at + 2], at, at + 1)), files)
            assert torch.equal(answer, wanted[index])
            guess = pb.Step(sequence_id=1, step_id=at + 1, position=0, hidden=encoded(x[:, :1]), truncate=True)
            for sequence_id in (0, 1, 2, 2**32 - 1):
                guess.sequence_id = sequence_id
                seen = tensor_of(spy.ask(pb.ClientMessage(step=guess).SerializeToString()), files)
                torch.testing.assert_close(seen, wanted[0][:, :1], rtol=1e-4, atol=1e-4)
        status, _ = spy.refusal(step(x[:, 4:5], 4, 9))
        assert status.name == "INVALID_ARGUMENT", "a position that the other has reached, and this one has not"


def test_nothing_of_a_prompt_a_hidden_state_or_a_token_is_in_the_log(
    trunk: Trunk, client: Client, files: ModelFiles, aim: Target
) -> None:
    """After all of the above, and after errors of every kind with values that can be told apart."""
    client.answer()
    x, shown = hidden(files, 3, seed=9), Credentials(token=OTHER)
    wrong = x.clone()
    wrong[0, 1, 2] = torch.nan
    for message in (step(x, 7), step(wrong, 0), step(x, 0)[:-5], opening(files, model=PROMPT), step(x.half(), 0)):
        with Raw(trunk.address, shown) as raw:
            raw.ask(opening(files))
            raw.refusal(message)
    for secret in ("secret-of-nobody", HOSTILE[:-1]):
        with pytest.raises(TrunkDenied):
            describe(trunk.address, Credentials(token=secret))
    with Raw(trunk.address, shown) as raw:  # one that goes without a word
        raw.ask(opening(files))
        raw.ask(step(x, 0))
    said = trunk.errors.read_text()
    numbers = [f"{value:.{digits}f}" for value in x.flatten().tolist() for digits in (3, 4)]
    secrets = [HOSTILE, OTHER, "secret-of", token_file.digest(HOSTILE), "Bearer", "scatters", "waves", *numbers]
    assert not [word for word in secrets if word in said]


@given(st.binary(max_size=300))
@settings(ANY_SPEED, max_examples=300)
def test_any_bytes_are_a_message_or_an_input_error(raw: bytes) -> None:
    from server.messages import parse

    for kind in ("open", "step", "forward", "feed"):
        try:
            assert parse(raw, kind).WhichOneof("kind") == kind
        except InputError as error:
            assert len(str(error)) < 300


SHAPES = st.one_of(
    st.lists(st.integers(0, 2**32 - 1), max_size=12), st.integers(0, 4).map(lambda tokens: [1, tokens, HIDDEN])
)


@given(
    st.one_of(st.integers(0, 4), st.integers(-(2**31), 2**31 - 1)),
    SHAPES,
    st.one_of(st.binary(max_size=400), st.integers(0, 4).map(lambda tokens: bytes(4 * HIDDEN * tokens))),
    st.sampled_from([*map(Plain, codec.DTYPES.values()), Int8Blocks()]),
    st.integers(HIDDEN - 1, HIDDEN),
)
@settings(ANY_SPEED, max_examples=300)
def test_what_passes_the_check_of_a_tensor_is_what_can_be_decoded(
    dtype: int, shape: list[int], data: bytes, rows: Rows, hidden_size: int
) -> None:
    received = pb.Tensor(shape=shape, data=data)
    received.dtype = dtype  # type: ignore[assignment]
    try:
        tokens = codec.check(received, rows, hidden_size)
    except InputError:
        return
    assert rows.from_bytes(received.data, hidden_size).shape == (1, tokens, hidden_size)


@given(
    st.sampled_from(list(codec.DTYPES.values())),
    st.lists(st.floats(width=16), min_size=6, max_size=60),
)
@settings(ANY_SPEED, max_examples=60)
def test_the_first_number_that_is_not_finite_is_found(dtype: torch.dtype, values: list[float]) -> None:
    x = torch.tensor(values[: len(values) // 6 * 6]).view(1, -1, 6).to(dtype)
    rows = [index for index, row in enumerate(x[0]) if not row.isfinite().all()]
    found = codec.where_not_finite(x)
    assert (found and found[0]) == (rows[0] if rows else None)

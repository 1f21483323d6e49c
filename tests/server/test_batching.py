"""Sessions of any length that come and go share forwards at the trunk, and each gets the answer that it gets alone."""

import random
import threading
import time
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import islice

import grpc
import psutil
import pytest
import torch

from splitlearn.checkpoints.folder import ModelFiles
from splitlearn.errors import InputError
from splitlearn.events import GenerationRequest, TokenEvent
from splitlearn.generation.chain import Link
from splitlearn.generation.generator import Generator
from splitlearn.generation.tokenizer import Tokens
from splitlearn.kvcache.pool import KVPool, bytes_per_token
from splitlearn.scheduling.contract import Client
from splitlearn.scheduling.engine import Engine
from splitlearn.scheduling.room import KV_SHARE
from splitlearn.scheduling.sessions import EngineSession, Pace
from splitlearn.stages import loading
from splitlearn.stages.base import Session, Stage, StageInput, StageOutput
from splitlearn.stages.local import LocalStage
from splitlearn.stages.session import LocalSession
from splitlearn.stages.settings import SessionSettings
from tests.conftest import TinyFactory
from tests.e2e.test_ten_families import CACHED, GREEDY, UNCACHED, running
from tests.support.trunk import PLAN, eventually, hidden, opening, serve_here, step, tensor_of
from tests.support.trunk import Raw as Stream
from tests.support.words import generation_of, load_of, session_of

FAMILIES = ("gpt2", "llama", "qwen3", "gemma2")
WITH_SDPA = ("gpt2", "llama", "qwen3")  # gemma2 attends eagerly, whatever is asked for
SESSIONS, AT_ONCE = 50, 8
WORDS = ("The", "sky", "is", "blue", "because", "air", "scatters", "short", "waves", "of", "light", "more")


def _uses(pool: KVPool, blocks: int) -> bool:
    return pool.blocks_used == blocks


def opened(engine: Engine, flags: Collection[str] = CACHED, max_length: int = 20) -> EngineSession:
    """A session of a client that stays."""
    return engine.open(session_of(flags), max_length, Client(60.0, "", lambda gone: True))


def _waits(engine: Engine, count: int) -> bool:
    return engine.waiting == count


@dataclass(frozen=True)
class Wish:
    """One session: how long its prompt is, how many tokens it asks for and how many it stays for, when it comes."""

    words: int
    tokens: int
    stays: int
    delay_s: float

    @property
    def request(self) -> GenerationRequest:
        prompt = " ".join(WORDS[at % len(WORDS)] for at in range(self.words))
        return GenerationRequest(prompt, max_new_tokens=self.tokens, ignore_eos=True, sampling=GREEDY)


@dataclass(frozen=True)
class OneAtATime:
    """A local stage that several threads may call: a module runs one call at a time."""

    stage: Stage
    lock: threading.Lock

    def open(self, settings: SessionSettings, max_length: int) -> Session:
        return self.stage.open(settings, max_length)

    def step(self, batch: Sequence[StageInput]) -> list[StageOutput]:
        with self.lock:
            return self.stage.step(batch)


def wishes(seed: int) -> list[Wish]:
    rng = random.Random(seed)
    made = []
    for _ in range(SESSIONS):
        tokens = rng.randint(1, 24)
        stays = rng.choice([tokens, tokens, rng.randint(1, tokens)])
        made.append(Wish(rng.randint(1, 40), tokens, stays, rng.uniform(0, 0.05)))
    return made


def answer(links: list[Link], tokens: Tokens, wish: Wish) -> list[int]:
    """The tokens that this session sees before it leaves."""
    time.sleep(wish.delay_s)
    generator = Generator(links, tokens, None, generation_of(CACHED))
    with closing(generator.stream(wish.request)) as events:
        seen = islice((event for event in events if isinstance(event, TokenEvent)), wish.stays)
        return [token for event in seen for token in event.token_ids]


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many sessions each step of any local stage had, as they come."""
    seen: list[int] = []
    real = LocalStage.compute

    def count(self: LocalStage, batch: Sequence[StageInput]) -> list[StageOutput]:
        seen.append(len(batch))
        return real(self, batch)

    monkeypatch.setattr(LocalStage, "compute", count)
    return seen


@pytest.mark.parametrize(
    ("family", "load"),
    [*((family, "") for family in FAMILIES), *((family, "output_attentions") for family in WITH_SDPA)],
)
def test_every_batched_answer_is_the_answer_alone(
    family: str, load: str, tiny_model: TinyFactory, sizes: list[int]
) -> None:
    """Prompts come in pieces. Without output_attentions the layers attend eagerly, with it by sdpa."""
    applied = frozenset(filter(None, [load]))
    with running(tiny_model(family), applied, prompt_tokens=8) as model:
        tokens = Tokens.load(model.files.folder, use_fast=True)
        asked = wishes(seed=len(family))
        alone = [answer([Link(model.full, session_of(CACHED | applied))], tokens, wish) for wish in asked]
        lock = threading.Lock()
        bottom, *rest = (OneAtATime(stage, lock) for stage in model.client)
        chain: list[Stage] = [bottom, model.trunk, *rest]
        links = [Link(stage, session_of(CACHED | applied)) for stage in chain]
        with ThreadPoolExecutor(AT_ONCE) as clients:
            batched = list(clients.map(lambda wish: answer(links, tokens, wish), asked))
    assert batched == alone
    assert max(sizes) > 2, "the sessions did not meet"


def test_sessions_with_other_session_flags_are_served_beside(tiny_model: TinyFactory) -> None:
    with running(tiny_model("llama")) as model:
        tokens = Tokens.load(model.files.folder, use_fast=True)
        wish = Wish(words=30, tokens=12, stays=12, delay_s=0)
        alone = answer([Link(model.full, session_of(CACHED))], tokens, wish)
        lock = threading.Lock()
        bottom, *rest = (OneAtATime(stage, lock) for stage in model.client)
        chains = [
            [
                Link(bottom, session_of(CACHED)),
                Link(model.trunk, session_of(at_trunk)),
                *(Link(stage, session_of(CACHED)) for stage in rest),
            ]
            for at_trunk in (CACHED, UNCACHED, frozenset({"use_cache"}), CACHED)
        ]
        with ThreadPoolExecutor(len(chains)) as clients:
            found = list(clients.map(lambda links: answer(links, tokens, wish), chains))
    assert found == [alone] * len(chains)


@pytest.fixture(scope="module")
def files(tiny_model: TinyFactory) -> ModelFiles:
    return tiny_model("llama")


def test_a_long_prompt_is_computed_in_pieces_while_others_decode(files: ModelFiles, sizes: list[int]) -> None:
    x = hidden(files, 200)
    with serve_here(files, prompt_tokens=16) as here, Stream(here.address) as one, Stream(here.address) as two:
        one.ask(opening(files, max_length=256))
        whole = tensor_of(one.ask(step(x, 0)), files)
        time.sleep(0.7)  # a client that takes as long between its steps is waited for as long again
        one.ask(step(x[:, :1], 200, 2))
        two.ask(opening(files, max_length=256))
        sizes.clear()
        pieces = tensor_of(two.ask(step(x, 0)), files)
        assert len(sizes) == -(-200 // 16)
    torch.testing.assert_close(pieces, whole, rtol=1e-4, atol=1e-4)


def test_a_long_prompt_beside_a_session_that_says_no_more_is_computed_at_once(
    files: ModelFiles, sizes: list[int]
) -> None:
    x = hidden(files, 200)
    with serve_here(files, prompt_tokens=16) as here, Stream(here.address) as one, Stream(here.address) as two:
        one.ask(opening(files, max_length=256))
        one.ask(step(x[:, :1], 0))
        one.ask(step(x[:, :1], 1, 2))
        two.ask(opening(files, max_length=256))
        time.sleep(0.5)
        sizes.clear()
        two.ask(step(x, 0))
        assert len(sizes) == 1


def test_a_session_without_a_cache_is_computed_in_pieces_and_keeps_nobody_waiting(
    files: ModelFiles, sizes: list[int]
) -> None:
    x = hidden(files, 200)
    with serve_here(files, prompt_tokens=16) as here, Stream(here.address) as one, Stream(here.address) as two:
        one.ask(opening(files, max_length=256, flags=["use_cache"]))
        whole = tensor_of(one.ask(step(x, 0)), files)
        time.sleep(0.7)  # a client that takes as long between its steps is waited for as long again
        one.ask(step(x[:, :1], 200, 2))
        two.ask(opening(files, max_length=256, flags=[]))
        sizes.clear()
        pieces = tensor_of(two.ask(step(x, 0)), files)
        assert len(sizes) == -(-200 // 16)
        again = tensor_of(two.ask(step(x[:, :9], 0, 2)), files)
        code, said = two.refusal(step(x[:, :1], 9, 3))
    torch.testing.assert_close(pieces, whole, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(again, whole[:, :9], rtol=1e-4, atol=1e-4)
    assert (code, "without use_cache" in said) == (grpc.StatusCode.INVALID_ARGUMENT, True)


def test_the_parts_of_steps_that_wait_are_within_the_memory_that_sessions_reserved(files: ModelFiles) -> None:
    with serve_here(files, kv_bytes=None, kv_block_tokens=64) as here:
        pool = here.runtime.admission.pool
        row = 3 * files.facts.hidden_size * 4
        held = bytes_per_token(
            loading.load(
                files, loading.trunk_specs(PLAN), load_of(()), loading.Placement(torch.device("cpu"), torch.float32)
            )
            .stages[0]
            .kv_shapes,
            torch.float32,
        )
        assert pool.capacity * (row + held) <= KV_SHARE * psutil.virtual_memory().total
        for flags in (["use_cache"], []):
            before = pool.blocks_used
            with Stream(here.address) as stream:
                stream.ask(opening(files, max_length=128, flags=flags))
                assert pool.blocks_used == before + 2
            assert eventually(partial(_uses, pool, before))


def test_a_step_in_parts_must_be_whole_within_the_time_of_one_message(files: ModelFiles) -> None:
    x = hidden(files, 60)
    with serve_here(files, idle_s=1.5) as here, Stream(here.address) as stream:
        stream.ask(opening(files))
        for at in range(40):
            stream.send(step(x[:, at : at + 1], at, more=True))
            time.sleep(0.1)
        code, said = stream.refusal()
    assert (code, said) == (
        grpc.StatusCode.DEADLINE_EXCEEDED,
        "the client was silent for 1.5 s (server.idle_s)",
    )


def test_sessions_that_differ_in_what_no_forward_sees_share_one(
    files: ModelFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on, tried, real = threading.Event(), [], LocalStage.compute

    def wait_and_step(self: LocalStage, batch: Sequence[StageInput]) -> list[StageOutput]:
        go_on.wait(60)
        tried.append(len(batch))
        return real(self, batch)

    kinds: tuple[set[str], ...] = (
        {"use_cache"},
        {"use_cache", "inference_mode"},
        {"use_cache", "wire_dtype=bfloat16"},
        set(),
    )
    x = hidden(files, 1)
    with serve_here(files) as here:
        engine = here.runtime.engine
        first, *others = (opened(engine, flags) for flags in (*kinds, kinds[0]))
        monkeypatch.setattr(LocalStage, "compute", wait_and_step)
        with ThreadPoolExecutor(len(kinds) + 1) as pool:
            asked = [pool.submit(engine.step, first, StageInput(first.local, 0, x))]
            assert eventually(lambda: engine.running == 1)
            for count, each in enumerate(others, 1):
                asked.append(pool.submit(engine.step, each, StageInput(each.local, 0, x)))
                assert eventually(partial(_waits, engine, count))
            go_on.set()
            outputs = [each.result().x for each in asked]
    assert tried == [1, len(kinds)]
    assert all(torch.allclose(output, outputs[0], atol=1e-5) for output in outputs)


def test_a_session_that_cannot_be_made_leaves_its_place(files: ModelFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: KVPool, run: object) -> None:
        raise MemoryError("no cache")

    with serve_here(files) as here:
        monkeypatch.setattr(KVPool, "cache", fail)
        with pytest.raises(MemoryError):
            opened(here.runtime.engine)
        admission = here.runtime.admission
        assert admission.sessions == admission.pool.blocks_used == 0


def test_memory_that_a_branch_is_copied_into_is_nobody_elses_until_it_is_done(
    files: ModelFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go_on, real = threading.Event(), threading.Event(), LocalSession.fork

    def wait_and_fork(self: LocalSession, other: LocalSession, tokens: int) -> None:
        begun.set()
        assert go_on.wait(60)
        real(self, other, tokens)

    monkeypatch.setattr(LocalSession, "fork", wait_and_fork)
    with serve_here(files, kv_block_tokens=64) as here:
        engine, pool = here.runtime.engine, here.runtime.admission.pool
        parent, child = (opened(engine, max_length=64) for _ in range(2))
        engine.step(parent, StageInput(parent.local, 0, hidden(files, 9)))
        with ThreadPoolExecutor(1) as thread:
            copied = thread.submit(engine.fork, child, parent.key, 9)
            assert begun.wait(60)
            engine.close(child)
            engine.close(parent)
            assert pool.blocks_used == 2
            go_on.set()
            copied.result()
        assert pool.blocks_used == 0


def test_only_the_last_positions_are_answered_when_no_more_are_wanted(files: ModelFiles) -> None:
    x = hidden(files, 9)
    with serve_here(files) as here, Stream(here.address) as stream:
        stream.ask(opening(files))
        whole = tensor_of(stream.ask(step(x, 0)), files)
        reply = stream.ask(step(x, 0, 2, answer_last=2, truncate=True))
    assert reply.result.position == 7
    assert torch.equal(tensor_of(reply, files), whole[:, 7:])


def test_a_session_that_leaves_gives_its_blocks_back(files: ModelFiles) -> None:
    with serve_here(files, kv_block_tokens=16) as here:
        pool = here.runtime.admission.pool
        with Stream(here.address) as stream:
            stream.ask(opening(files, max_length=100))
            assert pool.blocks_used == 7
            stream.ask(step(hidden(files, 5), 0))
        assert eventually(lambda: pool.blocks_used == 0)


def test_one_session_cannot_reach_what_another_left(files: ModelFiles) -> None:
    with serve_here(files, kv_block_tokens=64) as here:
        with Stream(here.address) as stream:
            stream.ask(opening(files))
            stream.ask(step(1e3 * hidden(files, 60, seed=5), 0))
        assert eventually(lambda: here.runtime.admission.sessions == 0)
        with Stream(here.address) as stream:
            stream.ask(opening(files))
            after = tensor_of(stream.ask(step(hidden(files, 3), 0)), files)
    with serve_here(files) as fresh, Stream(fresh.address) as stream:
        stream.ask(opening(files))
        assert torch.equal(after, tensor_of(stream.ask(step(hidden(files, 3), 0)), files))


def test_a_session_that_goes_back_beside_one_that_is_refused_gets_its_answer(
    files: ModelFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on, tried, real = threading.Event(), [], LocalStage.compute

    def wait_and_step(self: LocalStage, batch: Sequence[StageInput]) -> list[StageOutput]:
        go_on.wait(10)
        tried.append(len(batch))
        return real(self, batch)

    whole, other = hidden(files, 9), hidden(files, 1, seed=1)
    with serve_here(files) as here:
        engine = here.runtime.engine
        back, ahead, first = (opened(engine) for _ in range(3))
        wanted = engine.step(back, StageInput(back.local, 0, whole)).x[:, 8:]
        monkeypatch.setattr(LocalStage, "compute", wait_and_step)
        with ThreadPoolExecutor(3) as pool:
            led = pool.submit(engine.step, first, StageInput(first.local, 0, other))
            assert eventually(lambda: engine.running == 1)
            again = pool.submit(engine.step, back, StageInput(back.local, 8, whole[:, 8:]), truncate=True)
            assert eventually(lambda: engine.waiting == 1)
            gap = pool.submit(engine.step, ahead, StageInput(ahead.local, 3, other))
            assert eventually(lambda: engine.waiting == 2)
            go_on.set()
            assert led.result() is not None
            with pytest.raises(InputError, match="position: 3"):
                gap.result()
            assert torch.allclose(again.result().x, wanted, atol=1e-5)
    assert tried == [1, 2, 1, 1]


def test_every_one_of_the_ten_families_is_batched_or_served_alone(tiny_model: TinyFactory) -> None:
    """Which of the two it is shows in the engine; that the tokens are right is shown by test_ten_families."""
    packed = {family: served_packed(tiny_model(family)) for family in ("llama", "gpt2", "bloom", "opt")}
    assert packed["llama"] and packed["gpt2"]


@pytest.mark.parametrize("family", WITH_SDPA)
def test_with_sdpa_a_token_and_a_piece_of_a_prompt_share_a_forward_and_are_what_they_are_alone(
    family: str, tiny_model: TinyFactory
) -> None:
    files, applied = tiny_model(family), frozenset({"output_attentions", "use_cache", "inference_mode"})
    placement = loading.Placement(torch.device("cpu"), torch.float32)
    stage = loading.load(files, loading.trunk_specs(PLAN), load_of(applied), placement).stages[0]
    assert {config._attn_implementation for config in stage.cut.configs} == {"sdpa"}
    assert stage.packs(session_of(applied))


def served_packed(files: ModelFiles) -> bool:
    with serve_here(files) as here:
        return here.runtime.engine.limits.shared


def test_one_long_pause_of_a_client_does_not_count_as_what_it_usually_takes() -> None:
    pace, now = Pace(), 100.0
    pace.stepped(now)  # its first step follows no answer
    assert (pace.due_s, pace.overdue_s) == (float("inf"), 0.0)
    for pause in (5.0, 0.01, 0.01):
        pace.answered(now)
        now += pause
        pace.stepped(now)
    pace.answered(now)
    assert now < pace.due_s < pace.overdue_s < now + 0.1

"""The first loads in the background: what is warm at the end, what is left for later, and what a failure leaves."""

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import psutil
import pytest

from splitlearn import config
from splitlearn.arms.report import ArmReport
from splitlearn.arms.spec import Kind
from splitlearn.arms.startup import ARMS, MODEL, TRUNK, Startup
from splitlearn.checkpoints.folder import ModelFiles
from splitlearn.events import GenerationRequest
from tests.conftest import TinyFactory
from tests.support.trunk import eventually, forks_of, settings

KINDS: tuple[Kind, ...] = ("full", "split")
WORDS = "use_cache,inference_mode"
REQUEST = GenerationRequest("Why is the sky blue?", max_new_tokens=6, ignore_eos=True)


@pytest.fixture(scope="module")
def files(tiny_model: TinyFactory) -> ModelFiles:
    return tiny_model("llama")


@contextmanager
def started(files: ModelFiles, **sections: Mapping[str, object]) -> Iterator[Startup]:
    """A startup whose loads are over."""
    startup = Startup(config.parse({**settings(files, **sections), "flags": WORDS}))
    try:
        startup.begin()
        startup.wait(threading.Event())
        yield startup
    finally:
        startup.close()


def states(startup: Startup) -> list[str]:
    return [part.state for part in startup.parts().values()]


def report(startup: Startup, kind: Kind) -> ArmReport:
    *_, last = startup.runs.stream(kind, startup.runs.flags(WORDS), REQUEST)
    assert isinstance(last, ArmReport)
    return last


def processes() -> set[int]:
    return {child.pid for child in psutil.Process().children(recursive=True)}


def test_afterwards_the_first_run_of_both_arms_needs_no_new_process(files: ModelFiles) -> None:
    with started(files) as startup:
        assert states(startup) == ["ready"] * 4
        before = processes()
        full, split = (report(startup, kind) for kind in KINDS)
        assert processes() == before
        assert full.metrics.token_ids == split.metrics.token_ids
        startup.begin()
        assert not startup.running


def test_what_does_not_fit_is_left_for_later_and_says_so(files: ModelFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("splitlearn.arms.setup.WEIGHTS_FREE", float("inf"))
    with started(files) as startup:
        parts = startup.parts()
        assert [parts[name].state for name in (MODEL, TRUNK, *ARMS.values())] == ["ready", "ready", "ready", "later"]
        assert "memory" in parts[ARMS["split"]].detail
        full, split = (report(startup, kind) for kind in KINDS)
        assert full.metrics.token_ids == split.metrics.token_ids


def test_a_model_that_cannot_be_read_is_a_reason_and_the_next_begin_tries_again(files: ModelFiles) -> None:
    with started(files, generation={"chat": "nosuch"}) as startup:
        assert "nosuch" in startup.failure
        assert states(startup) == ["failed", "waiting", "waiting", "waiting"]
        startup.begin()
        startup.wait(threading.Event())
        assert "nosuch" in startup.failure


def test_without_a_trunk_the_full_arm_is_warm_all_the_same(files: ModelFiles) -> None:
    with started(files, trunk={"address": "127.0.0.1:9"}) as startup:
        assert states(startup) == ["ready", "failed", "ready", "failed"]
        assert "127.0.0.1:9" in startup.parts()[TRUNK].detail
        assert startup.failure == ""


def test_closing_ends_what_is_being_loaded(files: ModelFiles) -> None:
    before = set(forks_of())
    startup = Startup(config.parse({**settings(files), "flags": WORDS}))
    startup.begin()
    assert eventually(lambda: startup.parts()[TRUNK].state == "loading", within_s=120)
    startup.close()
    startup.wait(threading.Event())
    assert eventually(lambda: set(forks_of()) <= before)

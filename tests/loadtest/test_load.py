"""Load on a trunk: which requests there are, when they begin, what is counted, and the command as a person runs it."""

import json
import re
import signal
import threading
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import grpc
import pandas as pd
import pytest
import torch
from scipy import stats

from splitlearn import config
from splitlearn.arms.runs import Runs
from splitlearn.checkpoints.folder import ModelFiles
from splitlearn.cli import main as command_line
from splitlearn.errors import TrunkFull
from splitlearn.events import GenerationRequest
from splitlearn.flags.selection import FlagSet
from splitlearn.generation.tokenizer import Tokens
from splitlearn.loadtest.clients import Client
from splitlearn.loadtest.driver import NOT_BEGUN, NOT_ENDED, Measurement, Outcome, State, drive
from splitlearn.loadtest.plan import Levels, LoadRequest, LoadTest, arrivals, load_requests
from splitlearn.loadtest.recording import Recording, record
from splitlearn.loadtest.summary import Summary
from splitlearn.loadtest.trace import TraceLine, written
from splitlearn.runtime.progress import Step, silent
from splitlearn.stages import loading
from splitlearn.stages.base import StageInput
from tests.conftest import TinyFactory
from tests.e2e.test_cli import Refusal, configured, refusal
from tests.support.forks import Fork
from tests.support.trunk import PLAN, Raw, Trunk, eventually, forks_of, opening, serve, settings
from tests.support.words import load_of, session_of

__all__ = ["refusal"]

PROMPTS = ("Why is the sky blue?", "The sky is blue because air scatters short waves of light more.", "How?")
ASKED = LoadTest(PROMPTS, clients=2, duration_s=0.5, max_new_tokens=8)
CACHED = frozenset({"use_cache", "inference_mode"})
SESSIONS = 2


@pytest.fixture(scope="module")
def files(tiny_model: TinyFactory) -> ModelFiles:
    return tiny_model("llama")


def settings_of(files: ModelFiles, **sections: Mapping[str, object]) -> dict[str, Any]:
    """One set of flags for client and trunk."""
    return {**settings(files, **sections), "flags": "use_cache,inference_mode"}


@pytest.fixture(scope="module")
def trunk(files: ModelFiles, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trunk]:
    limits = {"max_sessions": SESSIONS, "max_waiting": 0}
    with serve(settings_of(files, server=limits), tmp_path_factory.mktemp("trunk")) as running:
        yield running


@pytest.fixture
def folder(files: ModelFiles, trunk: Trunk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: a config.yaml for the tiny model and a trunk that runs, and prompts of three lengths."""
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    monkeypatch.chdir(tmp_path)
    return configured(tmp_path, settings_of(files, trunk={"address": trunk.address}))


class Paced:
    """A client whose every token takes a while; it keeps the jobs that it was given."""

    def __init__(self, token_s: float = 0.01) -> None:
        self.jobs: list[LoadRequest] = []
        self._token_s = token_s
        self._closed = threading.Event()

    def warm(self) -> None:
        return

    def answer(self, job: LoadRequest) -> Generator[float, None, None]:
        self.jobs.append(job)
        for _ in range(job.new_tokens):
            self._closed.wait(self._token_s)
            yield time.perf_counter()

    def close(self) -> None:
        self._closed.set()


class Hanging(Paced):
    """Gives one token and then none, and does not end when it is closed either."""

    def answer(self, job: LoadRequest) -> Generator[float, None, None]:
        yield time.perf_counter()
        threading.Event().wait(60)


class Together(Paced):
    """Gives one token and then waits until it is closed; and its close waits for that of all others."""

    def __init__(self, closes: threading.Barrier) -> None:
        super().__init__()
        self._closes = closes

    def answer(self, job: LoadRequest) -> Generator[float, None, None]:
        self.jobs.append(job)
        yield time.perf_counter()
        self._closed.wait()

    def close(self) -> None:
        self._closes.wait(60)
        super().close()


class Refused(Paced):
    """Is never let in."""

    def answer(self, job: LoadRequest) -> Generator[float, None, None]:
        for left in range(job.new_tokens):
            raise TrunkFull(f"no room for {job.new_tokens - left} tokens")
        yield 0.0


def driven(clients: Sequence[Client], asked: LoadTest, grace_s: float = 30.0) -> Measurement:
    return drive(clients, replace(asked, clients=len(clients)), silent, threading.Event(), grace_s)


def test_the_same_seed_gives_the_same_requests_and_each_stream_others() -> None:
    one, again, other = (list(islice(load_requests(ASKED, stream), 200)) for stream in (0, 0, 1))
    assert one == again
    assert one != other
    assert one != list(islice(load_requests(replace(ASKED, seed=1), 0), 200))
    assert {job.prompt for job in one} == {0, 1, 2}
    assert {job.new_tokens for job in one} == {2, 3, 4, 5, 6, 7, 8}


def test_arrivals_are_a_poisson_process() -> None:
    times = arrivals(rate=50.0, duration_s=100.0, seed=3)
    assert times == arrivals(50.0, 100.0, 3)
    assert len(times) == pytest.approx(5000, abs=4 * 5000**0.5)
    gaps = [later - earlier for earlier, later in pairwise(times)]
    assert stats.kstest(gaps, "expon", args=(0, 1 / 50)).pvalue > 0.01


def test_closed_loop_a_client_begins_its_next_request_when_the_last_one_ended() -> None:
    clients = [Paced(), Paced()]
    measured = driven(clients, ASKED)
    for number, client in enumerate(clients):
        own = [outcome for outcome in measured.outcomes if outcome.client == number]
        assert [outcome.job for outcome in own] == client.jobs == list(islice(load_requests(ASKED, number), len(own)))
        assert all(before.ended_s <= after.arrived_s for before, after in pairwise(own))
        assert all(outcome.arrived_s < ASKED.duration_s for outcome in own)
    assert {outcome.state for outcome in measured.outcomes} == {"done"}


def test_open_loop_what_a_request_waits_for_a_free_client_counts() -> None:
    asked = replace(ASKED, rate=30.0, duration_s=1.0)
    times = arrivals(30.0, 1.0, asked.seed)
    measured = driven([Paced(0.02)], asked)
    assert [outcome.arrived_s for outcome in measured.outcomes] == times
    assert {outcome.state for outcome in measured.outcomes} == {"done"}
    for number, (before, after) in enumerate(pairwise(measured.outcomes), 1):
        assert after.begun_s is not None
        assert after.ttft_s is not None
        assert after.begun_s >= max(before.ended_s, after.arrived_s)
        # Everything before it took at least two tokens' time, however many clients there should have been.
        assert after.ttft_s >= number * 2 * 0.02 - after.arrived_s


def test_what_never_ends_and_what_is_never_begun_is_counted_as_incomplete(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("splitlearn.loadtest.driver.CLOSE_TIMEOUT_S", 0.3)
    asked = replace(ASKED, rate=20.0)
    measured = driven([Hanging()], asked, grace_s=0.2)
    begun, *waiting = measured.outcomes
    assert (begun.state, begun.reason, len(begun.token_s)) == ("incomplete", NOT_ENDED, 1)
    assert len(waiting) == len(arrivals(20.0, asked.duration_s, asked.seed)) - 1
    assert {(outcome.state, outcome.reason, outcome.begun_s) for outcome in waiting} == {
        ("incomplete", NOT_BEGUN, None)
    }


def test_what_was_refused_is_counted_under_one_reason_and_not_as_good() -> None:
    measured = driven([Refused()], replace(ASKED, rate=40.0))
    found = Summary.of(measured, Levels())
    assert found.rejected == found.offered == len(measured.outcomes) > 5
    assert found.reasons == {"no room for # tokens": found.rejected}
    assert (found.goodput_per_s, found.goodput_share, found.tps_system, found.ttft.n) == (0.0, 0.0, 0.0, 0)


def test_a_load_that_is_stopped_ends_with_what_there_is() -> None:
    stop = threading.Event()
    threading.Timer(0.3, stop.set).start()
    asked = replace(ASKED, clients=1, rate=20.0, duration_s=600.0)
    measured = drive([Paced()], asked, silent, stop)
    assert 0 < measured.duration_s < 600
    assert all(outcome.arrived_s <= measured.duration_s for outcome in measured.outcomes)


@pytest.mark.parametrize(("duration_s", "label"), [(600.0, "Loading"), (0.2, "Waiting")])
def test_a_load_that_is_stopped_waits_for_no_request_and_closes_all_clients_at_once(
    duration_s: float, label: str
) -> None:
    closes, stop = threading.Barrier(16), threading.Event()
    clients = [Together(closes) for _ in range(16)]

    def stop_when_all_have_begun(step: Step) -> None:
        if step.label.startswith(label) and all(client.jobs for client in clients):
            stop.set()

    asked = replace(ASKED, clients=16, duration_s=duration_s)
    measured = drive(clients, asked, stop_when_all_have_begun, stop, grace_s=600)
    assert [outcome.state for outcome in measured.outcomes] == ["incomplete"] * 16
    assert not closes.broken


def outcome(state: State, arrived_s: float, *token_s: float) -> Outcome:
    job = LoadRequest(0, max(2, len(token_s)))
    return Outcome(0, job, arrived_s, arrived_s, 10.0, state, "" if state == "done" else "why", token_s)


def test_goodput_counts_whole_answers_within_both_levels() -> None:
    outcomes = (
        outcome("done", 0.0, 1.0, 1.1, 1.2),
        outcome("done", 0.0, 2.5, 2.6),  # TTFT over the level
        outcome("done", 1.0, 2.0, 2.5),  # TPOT over the level
        outcome("done", 9.0, 9.5, 10.1),  # ends after the time: good, but not within the rate
        outcome("failed", 1.0, 1.5, 1.6),
        outcome("rejected", 1.0),
    )
    found = Summary.of(Measurement(outcomes, 10.0, 0.1), Levels(ttft_s=2.0, tpot_s=0.3))
    assert (found.offered, found.done, found.failed, found.rejected, found.incomplete) == (6, 4, 1, 1, 0)
    assert found.goodput_per_s == pytest.approx(1 / 10)
    assert found.goodput_share == pytest.approx(1 / 6)
    assert found.requests_per_s == pytest.approx(3 / 10)
    assert found.tps_system == pytest.approx(10 / 10)
    assert found.tpot.n == 4
    assert found.ttft.n == 5
    assert found.ttft.p50_s is None, "five values do not bound a median"


def test_percentiles_are_given_where_the_number_of_requests_bounds_them() -> None:
    def spread(n: int) -> Summary:
        return Summary.of(Measurement(tuple(outcome("done", 0.0, 1.0, 1.1) for _ in range(n)), 10.0, 0.0), Levels())

    assert spread(71).ttft.p95_s is None
    assert spread(72).ttft.p95_s == pytest.approx(1.0)
    assert spread(367).ttft.p99_s is None
    assert spread(368).ttft.p99_s == pytest.approx(1.0)


def test_a_recording_is_what_the_bottom_gives_for_prompt_and_answer(files: ModelFiles, trunk: Trunk) -> None:
    with ExitStack() as stack:
        parsed = config.parse(settings_of(files, trunk={"address": trunk.address}))
        runs = stack.enter_context(Runs(parsed, silent))
        requests = [GenerationRequest(prompt, 6, ignore_eos=True) for prompt in PROMPTS[:2]]
        recordings = record(runs.ready_spec("split", FlagSet(client=CACHED, trunk=CACHED)), requests, silent)
    placement = loading.Placement(torch.device("cpu"), torch.float32)
    bottom = loading.load(files, loading.client_specs(PLAN), load_of(CACHED), placement).stages[0]
    for recording, prompt in zip(recordings, PROMPTS, strict=False):
        ids = Tokens.load(files.folder, use_fast=True).encode(prompt, chat=True)
        assert recording.prompt_tokens == len(ids)
        assert recording.states.shape == (1, len(ids) + 5, files.facts.hidden_size)
        (out,) = bottom.step([StageInput(bottom.open(session_of(CACHED), 512), 0, torch.tensor([ids]))])
        torch.testing.assert_close(recording.states[:, : len(ids)], out.x)


def test_a_replay_sends_the_prompt_and_one_position_for_each_token_but_the_first() -> None:
    recording = Recording(3, torch.arange(8.0).view(1, 8, 1))
    steps = [(position, x.flatten().tolist()) for position, x in recording.steps(4)]
    assert steps == [(0, [0, 1, 2]), (3, [3]), (4, [4]), (5, [5])]


LOAD = ("loadtest", "--config", "config.yaml", "--prompts", "prompts.txt", "--max-new-tokens", "8", "--duration", "1.5")


@pytest.mark.parametrize(
    "how", [("--replay",), ("--rate", "4"), ("--replay", "--rate", "15")], ids=lambda how: "".join(how)
)
def test_load_reports_what_its_clients_got(
    how: tuple[str, ...], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command_line.main((*LOAD, *how, "--clients", str(SESSIONS), "--out", "found", "--json")) == 0
    found = json.loads(capsys.readouterr().out)
    summary = found["summary"]
    assert summary["done"] > 0
    assert summary["offered"] == sum(summary[name] for name in ("done", "rejected", "failed", "incomplete"))
    assert summary["failed"] == summary["incomplete"] == 0
    assert found["asked"]["replay"] == ("--replay" in how)
    assert json.loads((folder / "found" / "loadtest.json").read_text()) == found
    requests = pd.read_csv(folder / "found" / "requests.csv")
    assert len(requests) == summary["offered"]
    done = requests[requests["state"] == "done"]
    assert (done["tokens"] == done["new_tokens"]).all()
    page = (folder / "found" / "report.html").read_text(encoding="utf-8")
    assert "goodput" in page
    assert not re.search(r"<(script|link|img)[^>]+(src|href)=", page), "the report needs nothing beside it"


@pytest.mark.parametrize(
    "how",
    [("--turns", "2", "--prefix-words", "4"), ("--trace", "trace.jsonl"), ("--trace", "trace.jsonl", "--replay")],
    ids=lambda how: "".join(how),
)
def test_a_trunk_gets_conversations_and_traces(
    how: tuple[str, ...], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "trace.jsonl").write_text(written(TraceLine(at / 10, 20 + at, 3 + at) for at in range(4)))
    load = LOAD if "--turns" in how else LOAD[:3]
    assert command_line.main((*load, *how, "--clients", "1", "--out", "found", "--json")) == 0
    summary = json.loads(capsys.readouterr().out)["summary"]
    assert summary["done"] == summary["offered"] >= 2
    requests = pd.read_csv("found/requests.csv")
    if "--trace" in how:
        assert list(requests["tokens"]) == [3, 4, 5, 6]
    else:
        assert set(requests["turn"]) == {0, 1}


def test_load_prints_tables_and_counts_what_a_full_trunk_refuses(
    files: ModelFiles, trunk: Trunk, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    with Raw(trunk.address) as held:
        held.ask(opening(files))
        assert command_line.main((*LOAD, "--replay", "--clients", "6", "--rate", "60", "--out", "found")) == 0
    said = capsys.readouterr().out
    for words in ("TTFT", "TPOT", "TPS (system)", "goodput", "rejected", "RESOURCE_EXHAUSTED", "report.html"):
        assert words in said
    states = set(pd.read_csv(folder / "found" / "requests.csv")["state"])
    assert {"done", "rejected"} <= states


ENDLESS = (*LOAD[:5], "--max-new-tokens", "400", "--duration", "600", "--clients", str(SESSIONS), "--out", "found")


@pytest.mark.parametrize("how", [(), ("--replay",)], ids=["real", "replay"])
def test_ctrl_c_ends_a_load_and_its_sessions_and_writes_what_there_is(
    how: tuple[str, ...], files: ModelFiles, trunk: Trunk, folder: Path
) -> None:
    process = Fork(command_line.main, [*ENDLESS, *how], folder, folder / "errors")
    try:
        assert eventually(lambda: process.poll() or "Loading the server for" in _read(folder / "errors"), within_s=120)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
    finally:
        process.close()
    found = json.loads((folder / "found" / "loadtest.json").read_text())["summary"]
    assert 0 < found["duration_s"] < 600
    assert found["offered"] == found["done"] + found["incomplete"]
    with ExitStack() as stack:
        for _ in range(SESSIONS):  # the trunk has room for as many as the load had
            assert eventually(lambda: _admits(trunk, files, stack), within_s=30)


def _read(file: Path) -> str:
    return file.read_text() if file.exists() else ""


def _admits(trunk: Trunk, files: ModelFiles, stack: ExitStack) -> bool:
    """Whether the trunk opens one more session, which ends with `stack`."""
    try:
        stack.enter_context(Raw(trunk.address)).ask(opening(files))
    except grpc.RpcError:
        return False
    return True


def test_ctrl_c_while_the_clients_start_ends_the_command(files: ModelFiles, trunk: Trunk, folder: Path) -> None:
    with ExitStack() as stack:
        for _ in range(SESSIONS):  # the clients wait for room
            stack.enter_context(Raw(trunk.address)).ask(opening(files))
        process = Fork(command_line.main, ENDLESS, folder, folder / "errors")
        try:
            assert eventually(lambda: len(forks_of(process.pid)) >= SESSIONS, within_s=120)
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 130
        finally:
            process.close()
    assert not (folder / "found" / "loadtest.json").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--clients", "0"), "clients: 0 cannot be used"),
        (("--clients", "x"), "clients: 'x'"),
        (("--rate", "0"), "rate: 0.0 cannot be used; expected requests per second"),
        (("--rate", "nan"), "rate: nan cannot be used"),
        (("--duration", "-1"), "duration: -1.0 cannot be used; expected seconds"),
        (("--duration", "inf"), "duration: inf cannot be used"),
        (("--ttft", "0"), "ttft: 0.0 cannot be used"),
        (("--tpot", "-3"), "tpot: -3.0 cannot be used"),
        (("--max-new-tokens", "1"), "max_new_tokens: 1 cannot be used; expected 2 or more"),
        (("--max-new-tokens", "500"), "prompts of at most 12 tokens: the context holds 512"),
        (("--prompts", "missing.txt"), "missing.txt"),
        (("--out", "/dev/null/found"), "out: '/dev/null/found' cannot be used; expected a folder that can be written"),
        (("--trunk", "nowhere"), "trunk.address: 'nowhere'"),
        (("--trunk", "127.0.0.1:1"), "does not answer or was lost"),
    ],
)
def test_a_load_that_cannot_be_made_is_one_line_and_status_2(
    arguments: tuple[str, ...], said: str, folder: Path, refusal: Refusal
) -> None:
    assert said in refusal.of(folder, *LOAD, *arguments)

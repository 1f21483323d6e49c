"""Arms in worker processes: what happens when a worker or a trunk dies, and when a person stops."""

import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

import psutil
import pytest
import torch

from server.__main__ import main
from splitlearn import config
from splitlearn.arms.report import ArmReport, Item
from splitlearn.arms.runs import Runs
from splitlearn.arms.spec import Kind
from splitlearn.checkpoints.folder import ModelFiles
from splitlearn.client.probe import TrunkProbe
from splitlearn.errors import InputError, TrunkUnavailable, WorkerDied, WorkFailed
from splitlearn.events import Done, GenerationRequest, Reconnecting, TokenEvent
from splitlearn.flags.selection import FlagSet
from splitlearn.lab.environment import trunk_pid
from splitlearn.models.plan import SplitPlan
from splitlearn.runtime.progress import silent
from splitlearn.sampling import SamplingParams
from tests.conftest import TinyFactory
from tests.support.forked import forked
from tests.support.tiny import make_hostile
from tests.support.trunk import Raw, eventually, forks_of, gone, listens, opening, settings

KINDS: tuple[Kind, ...] = ("full", "split")
CACHED = frozenset({"use_cache", "inference_mode", "low_cpu_mem_usage"})
FLAGS = FlagSet(CACHED, CACHED, CACHED)
# Those for which the tests' trunks start no server beside their own.
OWN_FLAGS = FlagSet(CACHED, CACHED, CACHED - {"low_cpu_mem_usage"})
SHORT = GenerationRequest("Why is the sky blue?", max_new_tokens=6, ignore_eos=True)
LONG = GenerationRequest("Why is the sky blue?", max_new_tokens=480, ignore_eos=True)
SESSIONS = 2


@pytest.fixture(scope="module")
def files(tiny_model: TinyFactory) -> ModelFiles:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def runs(files: ModelFiles) -> Iterator[Runs]:
    parsed = config.parse(settings(files, server={"max_sessions": SESSIONS}))
    with Runs(parsed, silent) as made:
        yield made


def report(runs: Runs, kind: Kind, request: GenerationRequest = SHORT, flags: FlagSet = FLAGS) -> ArmReport:
    """The report of a run that goes well."""
    *_, last = runs.stream(kind, flags, request)
    assert isinstance(last, ArmReport)
    return last


def test_runs_that_all_compile_something_end_with_an_error_and_no_figures(
    runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("splitlearn.arms.runs.compile_seconds", lambda seen: 1.0)
    items: list[Item] = []
    with pytest.raises(WorkFailed, match="cuda_graph"):
        items.extend(runs.stream("full", FLAGS, SHORT))
    monkeypatch.undo()
    assert report(runs, "full").metrics.n_tokens == SHORT.max_new_tokens


def test_a_run_whose_chat_template_takes_all_memory_is_refused_and_the_next_one_goes_well(tmp_path: Path) -> None:
    with Runs(config.parse({"model": {"name": str(make_hostile(tmp_path / "hostile").folder)}}), silent) as runs:
        assert report(runs, "full").metrics.n_tokens == SHORT.max_new_tokens
        before = workers()
        with pytest.raises(InputError, match="takes more than 256 MiB of memory"):
            report(runs, "full", replace(SHORT, prompt="HOARD"))
        assert report(runs, "full").metrics.n_tokens == SHORT.max_new_tokens
        assert workers() == before


def interrupted(runs: Runs, kind: Kind, hit: Callable[[], object], flags: FlagSet = FLAGS) -> Iterator[Item]:
    """A long run in whose middle `hit` is called."""
    items = runs.stream(kind, flags, LONG)
    for _ in range(20):
        yield next(items)
    hit()
    yield from items


def workers() -> set[psutil.Process]:
    """The worker processes below this one."""
    return {child for child in forks_of() if not listens(child)}


def worker_of(runs: Runs, kind: Kind) -> psutil.Process:
    """The worker process of the arm `kind`: the one that computes while it runs, and did not before."""
    items = runs.stream(kind, FLAGS, LONG)
    next(items)
    spent = {worker: worker.cpu_times().user for worker in workers()}
    for _ in range(100):
        next(items)
    items.close()  # type: ignore[attr-defined]
    return max(spent, key=lambda worker: worker.cpu_times().user - spent[worker])


def free_places(address: str, files: ModelFiles) -> int:
    """How many sessions the trunk lets in now."""
    with ExitStack() as stack:
        for count in range(SESSIONS):
            try:
                stack.enter_context(Raw(address)).ask(opening(files))
            except Exception:
                return count
    return SESSIONS


def test_both_arms_give_the_same_tokens_and_the_ledger_sums_to_the_time(runs: Runs) -> None:
    sampled = SamplingParams(temperature=0.8, top_k=50, top_p=0.9, repetition_penalty=1.1, seed=7)
    request = GenerationRequest("Why is the sky blue?", max_new_tokens=30, ignore_eos=True, sampling=sampled)
    full, split = (report(runs, kind, request).metrics for kind in KINDS)
    assert full.token_ids == split.token_ids
    assert len(set(full.token_ids)) > 5
    for metrics in (full, split):
        assert sum(metrics.ledger.values()) == pytest.approx(metrics.e2el_s)
        assert metrics.e2el_s == pytest.approx(metrics.ttft_s + 29 * (metrics.tpot_s or 0))
    assert set(split.ledger) >= {"bottom", "encode", "wire", "queue", "trunk", "decode", "top"}


def test_a_worker_is_kept_for_the_next_run(runs: Runs) -> None:
    report(runs, "full")
    before = {worker.pid for worker in workers()}
    report(runs, "full")
    assert {worker.pid for worker in workers()} == before


@pytest.mark.parametrize("kind", KINDS)
def test_arms_that_differ_in_session_flags_only_share_a_worker_and_keep_their_ways(kind: Kind, runs: Runs) -> None:
    with_cache, without = (FlagSet(*[each] * 3) for each in (CACHED, CACHED - {"use_cache"}))
    first = report(runs, kind, flags=with_cache)
    before = {worker.pid for worker in workers()}
    other = report(runs, kind, flags=without)
    assert {worker.pid for worker in workers()} == before
    assert other.metrics.token_ids == first.metrics.token_ids
    # Without a cache each step sends the hidden states of the whole context.
    assert kind == "full" or other.metrics.bytes_up > 2 * first.metrics.bytes_up


def test_no_more_workers_than_the_limit_are_kept(files: ModelFiles) -> None:
    already = {worker.pid for worker in workers()}
    parsed = config.parse(settings(files, runs={"threads": 1, "warm_workers": 1}))
    with Runs(parsed, silent) as made:
        for applied in (CACHED, CACHED - {"low_cpu_mem_usage"}, CACHED):
            report(made, "full", flags=FlagSet(full=applied))
            assert len({worker.pid for worker in workers()} - already) == 1
    assert eventually(lambda: {worker.pid for worker in workers()} <= already)


def test_workers_are_kept_as_long_as_memory_allows_and_each_copy_of_an_arm_has_its_own(
    files: ModelFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    already = {worker.pid for worker in workers()}
    with Runs(config.parse(settings(files, runs={"threads": 1})), silent) as made:
        for copy in (0, 1, 0):
            list(made.stream("full", FlagSet(full=CACHED), SHORT, copy=copy))
        assert len({worker.pid for worker in workers()} - already) == 2
        monkeypatch.setattr("splitlearn.arms.setup.WEIGHTS_FREE", float("inf"))
        list(made.stream("full", FlagSet(full=CACHED), SHORT, copy=2))
        assert len({worker.pid for worker in workers()} - already) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_worker_that_is_killed_is_an_error_and_the_next_run_works(kind: Kind, runs: Runs) -> None:
    wanted = report(runs, kind).metrics.token_ids
    worker = worker_of(runs, kind)
    with pytest.raises(WorkerDied, match=rf"The {kind} arm's worker process was killed"):
        list(interrupted(runs, kind, worker.kill))
    assert report(runs, kind).metrics.token_ids == wanted


def test_a_worker_that_is_killed_between_runs_is_replaced(runs: Runs) -> None:
    worker = worker_of(runs, "full")
    worker.kill()
    assert eventually(lambda: gone(worker.pid))
    assert report(runs, "full").metrics.n_tokens == 6


def test_an_embedded_trunk_that_is_killed_is_started_again_and_the_answer_goes_on(runs: Runs) -> None:
    wanted, address = report(runs, "split", LONG, OWN_FLAGS).metrics, runs.trunk_address()
    server = psutil.Process(trunk_pid(address))
    *items, last = interrupted(runs, "split", server.kill, OWN_FLAGS)
    notices = [item for item in items if isinstance(item, Reconnecting)]
    assert [(notice.attempt, notice.lost) for notice in notices] == [(n + 1, address) for n in range(len(notices))]
    after = items[items.index(notices[-1]) + 1]  # told while it lasts, not with the answer
    assert isinstance(after, TokenEvent)
    assert after.recoveries
    assert after.recoveries[0].seconds >= notices[-1].seconds
    assert isinstance(last, ArmReport)
    assert last.metrics.token_ids == wanted.token_ids
    assert last.metrics.text == wanted.text
    assert (last.trunk_address, runs.trunk_address()) == (address, address)
    ((token, recovery),) = last.metrics.recoveries
    assert 20 <= token < 480
    assert (recovery.lost, recovery.found) == (address, address)
    assert recovery.replayed_tokens == last.metrics.prompt_tokens + token - 2
    assert last.metrics.ledger["recover"] == recovery.seconds
    assert report(runs, "split", flags=OWN_FLAGS).metrics.recoveries == ()


def found_again(runs: Runs) -> tuple[int, ...] | None:
    """The tokens of a run; None while the trunk is not tried, or not there."""
    try:
        return report(runs, "split", flags=OWN_FLAGS).metrics.token_ids
    except TrunkUnavailable:
        return None


def test_a_trunk_elsewhere_that_is_started_again_serves_the_same_client(files: ModelFiles, tmp_path: Path) -> None:
    sections = settings(files)
    with forked(sections, tmp_path) as trunk:
        parsed = config.with_trunk(config.parse(sections), trunk.address)
        with Runs(parsed, silent) as made:
            wanted = found_again(made)
            assert wanted
            trunk.kill()
            for _ in range(2):
                with pytest.raises(TrunkUnavailable, match=trunk.address):
                    report(made, "split", flags=OWN_FLAGS)
            trunk.start()
            assert eventually(lambda: found_again(made) == wanted, 30)


def test_another_cut_gives_the_same_tokens_from_a_trunk_with_those_layers(files: ModelFiles) -> None:
    with Runs(config.parse(settings(files)), silent) as runs:
        before, there, running = report(runs, "split"), runs.describe_trunk(), set(forks_of())
        assert (there.start, there.end) != (1, 5)
        runs.split_at(SplitPlan(1, 5, files.n_layers))
        after, there = report(runs, "split"), runs.describe_trunk()
        assert (there.start, there.end) == (1, 5)
        assert after.metrics.token_ids == before.metrics.token_ids
        assert len(set(forks_of()) - running) == 2  # a worker and a trunk
        assert len([each for each in running if each.is_running()]) <= len(running) - 2  # those of the cut before


def test_a_trunk_elsewhere_is_not_cut_differently(files: ModelFiles) -> None:
    parsed = config.with_trunk(config.parse(settings(files)), "127.0.0.1:1")
    with Runs(parsed, silent) as runs:
        plan = runs.plan
        with pytest.raises(InputError, match=f"cut: '1:5' .*{plan.start}:{plan.end}, the layers that the trunk"):
            runs.split_at(SplitPlan(1, 5, files.n_layers))
        assert runs.plan == plan


def test_an_input_error_leaves_the_worker_as_it_is(runs: Runs) -> None:
    report(runs, "split")
    before = {worker.pid for worker in workers()}
    too_long = GenerationRequest("word " * 2000, max_new_tokens=4)
    for kind in KINDS:
        with pytest.raises(InputError, match="prompt: .* tokens.*at most 511 tokens: the context holds 512"):
            report(runs, kind, too_long)
        with pytest.raises(InputError, match="max_new_tokens: 511 cannot be used; expected at most"):
            report(runs, kind, GenerationRequest("Why is the sky blue?", max_new_tokens=511))
        assert report(runs, kind).metrics.n_tokens == 6
    assert {worker.pid for worker in workers()} >= before
    assert free_places(runs.trunk_address(), runs.files) == SESSIONS


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["event", "close"])
def test_a_stop_in_the_middle_is_quick_and_frees_the_trunks_session(
    how: str, kind: Kind, runs: Runs, files: ModelFiles
) -> None:
    wanted = report(runs, kind).metrics.token_ids
    cancelled = threading.Event()
    items = runs.stream(kind, FLAGS, LONG, cancelled)
    seen: list[Item] = [next(items) for _ in range(10)]
    started = time.monotonic()
    if how == "event":
        cancelled.set()
        seen += items
    else:
        items.close()  # type: ignore[attr-defined]
    assert time.monotonic() - started < 2
    tokens = [item for item in seen if isinstance(item, TokenEvent)]
    assert len(tokens) < 480
    assert not any(isinstance(item, Done) for item in seen)
    assert eventually(lambda: free_places(runs.trunk_address(), files) == SESSIONS)
    assert report(runs, kind).metrics.token_ids == wanted


def test_a_stop_before_the_first_token_is_a_run_without_a_report(runs: Runs) -> None:
    cancelled = threading.Event()
    cancelled.set()
    assert not [item for item in runs.stream("split", FLAGS, LONG, cancelled) if isinstance(item, ArmReport)]
    assert report(runs, "split").metrics.n_tokens == 6


def test_closing_ends_every_process(files: ModelFiles) -> None:
    already = {child.pid for child in psutil.Process().children(recursive=True)}
    with Runs(config.parse(settings(files)), silent) as made:
        for kind in KINDS:
            report(made, kind)
        mine = {child.pid for child in psutil.Process().children(recursive=True)} - already
        assert len(mine) >= 3  # two workers and the server
    assert eventually(lambda: all(gone(pid) for pid in mine if pid not in _fork_servers()))


def _fork_servers() -> set[int]:
    """This process's fork server and what watches it: they stay for the next worker."""
    mine = psutil.Process().children()
    return {child.pid for child in mine if any("multiprocessing" in word for word in child.cmdline())}


def test_ctrl_c_at_the_terminal_does_not_reach_the_workers(runs: Runs) -> None:
    worker = worker_of(runs, "full")
    worker.send_signal(signal.SIGINT)
    assert report(runs, "full").metrics.n_tokens == 6
    assert not gone(worker.pid)


def serve_traced(arguments: list[str]) -> int:
    """The server's `main`, where to compile is to trace alone. tests/flags/test_fidelity.py has inductor make code."""
    torch.compile = partial(torch.compile, backend="eager")
    return main(arguments)


def test_a_trunk_that_compiles_is_waited_for_longer_than_one_that_does_not(
    tiny_model: TinyFactory, tmp_path: Path
) -> None:
    compiled = FlagSet(full=CACHED, client=CACHED, trunk=CACHED | {"torch_compile"})
    sections = settings(tiny_model("llama", n_layers=3), trunk={"timeout_s": 0.5})
    flags = {"flags": "trunk:" + ",".join(compiled.trunk)}
    with forked(sections | flags, tmp_path, serve_traced) as trunk:
        parsed = config.with_trunk(config.parse(sections), trunk.address)
        with Runs(parsed, silent) as impatient:
            done = report(impatient, "split", flags=compiled)
    assert done.compile_s > parsed.trunk.timeout_s
    assert done.metrics.n_tokens == SHORT.max_new_tokens


def prompt_tokens(runs: Runs) -> float:
    """Tokens of prompts that the trunk has computed so far."""
    probe = TrunkProbe()
    try:
        text = probe.snapshot(runs.trunk_addresses()).metrics
    finally:
        probe.close()
    return sum(float(count) for count in re.findall(r'tokens_total\{.*"prompt".*\} (\S+)', text))


def test_a_worker_that_has_rested_runs_a_few_tokens_before_what_counts(
    runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A trunk closes connections that rest; to connect again is no part of TTFT."""
    counts = []
    for rest_s in (float("inf"), float("inf"), -1.0):
        monkeypatch.setattr("splitlearn.arms.worker.REST_S", rest_s)
        tokens = report(runs, "split").metrics.prompt_tokens
        counts.append(prompt_tokens(runs) / tokens)
    assert (counts[1] - counts[0], counts[2] - counts[1]) == (1, 2)

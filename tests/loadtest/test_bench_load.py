"""The measurements of a loaded trunk server, in a short form on a tiny model: what they count, not how long it took."""

from collections.abc import Iterator

import pytest

from bench import overload
from bench.batched import Batched, Contexts
from bench.overload import WAIT_S, WAITED
from bench.soak import soak
from bench.stepping import StepTimes, Trunk, admission, mixed, run_of, side_by_side, split
from splitlearn import config
from splitlearn.arms.runs import Runs
from splitlearn.arms.spec import ArmSpec
from splitlearn.checkpoints.folder import ModelFiles
from splitlearn.flags.selection import FlagSet
from splitlearn.loadtest.driver import Measurement, Outcome
from splitlearn.loadtest.plan import LoadRequest
from splitlearn.loadtest.recording import Recording
from splitlearn.runtime.progress import silent
from tests.conftest import TinyFactory
from tests.support.trunk import RAW, hidden, serve, settings
from tests.support.trunk import Trunk as Server

CACHED = frozenset({"use_cache", "inference_mode"})
SESSIONS = 4


@pytest.fixture(scope="module")
def files(tiny_model: TinyFactory) -> ModelFiles:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def server(files: ModelFiles, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    limits = {"max_sessions": SESSIONS}
    words = {"flags": "use_cache,inference_mode"}
    with serve({**settings(files, server=limits), **words}, tmp_path_factory.mktemp("trunk")) as running:
        yield running


@pytest.fixture(scope="module")
def spec(files: ModelFiles, server: Server) -> ArmSpec:
    with Runs(config.parse(settings(files, trunk={"address": server.address})), silent) as runs:
        return runs.ready_spec("split", FlagSet(client=CACHED, trunk=CACHED))


@pytest.mark.parametrize("count", [1, 2, 8, 16, 32])
def test_mixed_lengths_have_the_context_of_as_many_equal_ones(count: int) -> None:
    lengths = mixed(count, 100)
    assert (len(lengths), sum(lengths)) == (count, 100 * count)
    assert len(set(lengths)) == count
    assert min(lengths) >= 20


def test_a_step_that_carried_all_sessions_is_known_by_their_equal_times() -> None:
    trunk_s = ([9.0, 9.0, 0.5, 0.1, 0.3], [9.0, 9.0, 0.5, 0.2, 0.3])
    found = run_of([StepTimes([float(at) for at in range(5)], list(values)) for values in trunk_s])
    assert found.trunk_s == pytest.approx(0.4)
    assert found.whole == pytest.approx(4 / 6)
    assert found.tpot_s == pytest.approx(1.0)
    apart = run_of([StepTimes([float(at) for at in range(4)], [9.0, 9.0, value, value]) for value in (0.1, 0.2)])
    assert (apart.trunk_s, apart.whole) == (None, 0.0)


def test_a_wait_for_a_token_belongs_to_the_prompt_if_any_of_it_does() -> None:
    times = StepTimes([float(at) for at in range(8)], [])  # the first two are the warm-up
    assert split(times, began=4.5, ended=5.5) == ([1.0, 1.0], [1.0, 1.0])


def test_sessions_step_side_by_side_and_beside_a_long_prompt(spec: ArmSpec, files: ModelFiles) -> None:
    trunk = Trunk(spec, hidden(files, 300))
    found = side_by_side(trunk, mixed(SESSIONS, 20), steps=6)
    assert found.tpot_s > 0
    assert 0 <= found.whole <= 1
    prompt = admission(trunk, mixed(SESSIONS - 1, 20), prompt=200, steps=4)
    assert min(prompt.before_s, prompt.during_s, prompt.prompt_s) > 0
    assert prompt.longest_s >= prompt.during_s


def test_the_plain_forward_steps_from_the_same_context_each_time(spec: ArmSpec, files: ModelFiles) -> None:
    data = RAW.to_bytes(hidden(files, 16))
    plain = Batched(spec, Contexts(data, 8, (1, 3)))
    try:
        assert all(plain.run(n, 4).tpot_s > 0 for n in (0, 1, 3, 0, 3))
    finally:
        plain.stop()


def test_nothing_of_sessions_that_were_cut_short_stays_at_the_server(spec: ArmSpec, files: ModelFiles) -> None:
    recorded = [Recording(length, hidden(files, length + 16)) for length in (3, 20, 60)]
    soak(spec, recorded, 20, seed=0, longest_s=0.2)
    found = soak(spec, recorded, 40, seed=1, longest_s=0.2)
    assert len(found.resident) == 40
    assert 0 < found.answered < 40
    assert found.after.descriptors <= found.before.descriptors
    assert found.after.threads < found.before.threads + 20, "threads are shared: their number follows no session's"
    assert found.before.kv_blocks == found.after.kv_blocks == 0


def test_refusals_are_told_apart_by_what_was_said() -> None:
    def refused(reason: str, after_s: float) -> Outcome:
        return Outcome(0, LoadRequest(0, 2), 1.0, 1.5, 1.5 + after_s, "rejected", reason, ())

    outcomes = [refused("sessions are waiting already", 0.02)] * 80 + [refused(f"{WAITED} 2 s", WAIT_S + 0.05)] * 6
    full, waited = overload.refusals(Measurement(tuple(outcomes), 10.0, 0.0))
    assert (full["n"], full["p50"], full["p95"]) == ("80", "20 ms", "20 ms")
    assert (waited["n"], waited["p50"], waited["p95"], waited["largest"]) == ("6", "50 ms", "", "50 ms")

"""What is said of the machine, the software and the trunk; and what other programs took of the machine."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import psutil
import pytest

from splitlearn import config
from splitlearn.arms.compare import environment
from splitlearn.arms.runs import Runs
from splitlearn.checkpoints.folder import ModelFiles
from splitlearn.client.real_link import round_trip_s
from splitlearn.errors import TrunkError
from splitlearn.lab.environment import differences, fingerprint, trunk_pid
from splitlearn.runtime import hardware, process
from splitlearn.runtime.load import reading
from splitlearn.runtime.progress import silent
from tests.conftest import TinyFactory
from tests.support.trunk import eventually, serve, settings

BURN = (
    "import time\nprint('go', flush=True)\nend = time.process_time() + {cpu_s}\nwhile time.process_time() < end: pass"
)
WORK_S = 0.6
ONE = {"torch": "2.13.0", "governor": None, "rtt_s": 0.001, "cpu_mhz": 2500.0, "trunk": {"threads": 2, "device": "cpu"}}


@pytest.fixture(scope="module")
def files(tiny_model: TinyFactory) -> ModelFiles:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def found(files: ModelFiles) -> Iterator[dict[str, object]]:
    """The fingerprint of arms with an embedded trunk, and what `compare` says of the same."""
    parsed = config.parse(settings(files, split={"start": 1, "end": 5}))
    with Runs(parsed, silent) as runs:
        yield {"fingerprint": fingerprint(runs), "environment": environment(runs)}


@contextmanager
def burning(cpu_s: float, ours: bool) -> Iterator[int]:
    """A program that computes for so long; somebody else's if it is not `ours`. Its process id; ended at the end."""
    pipe = subprocess.PIPE
    # A shell that ends at once leaves its background program to somebody else.
    line = f'{sys.executable} -c "$0" & echo $!' if not ours else f'exec {sys.executable} -c "$0"'
    shell = subprocess.Popen(["sh", "-c", line, BURN.format(cpu_s=cpu_s)], stdout=pipe, text=True)
    assert shell.stdout is not None
    said = [shell.stdout.readline().strip() for _ in range(1 if ours else 2)]
    pid = shell.pid if ours else int(next(word for word in said if word != "go"))
    try:
        yield pid
    finally:
        while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.01)
        shell.wait()
        shell.stdout.close()


def test_it_extends_what_compare_says(found: dict[str, dict[str, object]]) -> None:
    said, known = found["fingerprint"], found["environment"]
    trunk = known.pop("trunk")
    assert known.items() <= said.items()
    assert said["trunk"] == {**trunk, "address": "embedded"}  # type: ignore[dict-item]


def test_the_trunk_says_of_its_own_machine_what_decides_its_figures(found: dict[str, dict[str, object]]) -> None:
    said, trunk = found["fingerprint"], found["fingerprint"]["trunk"]
    known = {name: str(value) for name, value in hardware.describe().items() if value is not None}
    assert known.items() <= trunk.items()  # type: ignore[attr-defined]
    elsewhere = {**said, "trunk": {**trunk, "logical_cores": "96"}}  # type: ignore[dict-item]
    assert differences(said, elsewhere) == [f"trunk.logical_cores: {os.cpu_count()} and 96"]


def test_it_names_what_decides_the_figures(found: dict[str, dict[str, object]], files: ModelFiles) -> None:
    said = found["fingerprint"]
    assert said["model"] == files.name and said["digest"] == files.digest and said["dtype"] == "float32"
    assert said["split"] == {"start": 1, "end": 5, "n_layers": 6}
    assert said["threads"] == 1 and said["trunk"]["threads"] == 1  # type: ignore[index]
    assert said["memory_bytes"] == psutil.virtual_memory().total
    assert said["logical_cores"] == os.cpu_count()
    for library in ("torch", "transformers", "grpcio", "numpy", "scipy"):
        assert said[library] == version(library)


def test_it_is_plain_json(found: dict[str, dict[str, object]]) -> None:
    assert json.loads(json.dumps(found["fingerprint"])) == found["fingerprint"]


def test_the_round_trip_of_a_trunk_on_this_machine_is_short(found: dict[str, dict[str, object]]) -> None:
    assert 1e-5 < float(str(found["fingerprint"]["rtt_s"])) < 0.1


def test_a_trunk_that_was_started_by_hand_is_told_from_an_embedded_one(files: ModelFiles, tmp_path: Path) -> None:
    with serve(settings(files), tmp_path) as trunk:
        parsed = config.parse(settings(files, trunk={"address": trunk.address}, runs={"threads": None}))
        with Runs(parsed, silent) as runs:
            said = fingerprint(runs)
        assert said["trunk"]["address"] == "host"
        assert said["threads"] == process.default_threads() and said["trunk"]["threads"] == 1
        assert trunk_pid(trunk.address) == trunk.process.pid
    assert trunk_pid(trunk.address) is None and trunk_pid("192.0.2.1:50051") is None


def test_no_trunk_is_a_clear_error() -> None:
    with pytest.raises(TrunkError, match="127.0.0.1:1"):
        round_trip_s("127.0.0.1:1")


def test_equal_fingerprints_do_not_differ(found: dict[str, dict[str, object]]) -> None:
    assert differences(found["fingerprint"], found["fingerprint"]) == []


def test_each_thing_that_differs_is_named_with_both_values() -> None:
    other = {**ONE, "torch": "2.14.0", "governor": "powersave", "trunk": {"threads": 4, "device": "cpu"}, "new": 1}
    assert differences(ONE, other) == [
        "torch: 2.13.0 and 2.14.0",
        "governor: unknown and powersave",
        "trunk.threads: 2 and 4",
        "new: unknown and 1",
    ]
    assert differences(other, ONE)[2] == "trunk.threads: 4 and 2"


def test_what_varies_by_itself_is_no_difference() -> None:
    assert differences(ONE, {**ONE, "rtt_s": 0.05, "cpu_mhz": 800.0}) == []


def test_a_first_reading_knows_of_no_others() -> None:
    first = reading(None)
    assert first.others_cpu == first.stolen_cpu == 0.0
    assert abs(first.at_s - time.time()) < 5
    assert json.loads(json.dumps(asdict(first))) == asdict(first)


def test_what_other_programs_use_is_counted() -> None:
    before = reading(None)
    with burning(WORK_S, ours=False):
        pass
    after = reading(before)
    assert after.others_cpu * (after.clock_s - before.clock_s) > 0.8 * WORK_S


def test_what_we_use_is_ours_in_this_process_and_in_those_it_started_also_after_they_ended() -> None:
    before = reading(None)
    end = time.process_time() + WORK_S
    while time.process_time() < end:
        pass
    with burning(WORK_S, ours=True):
        during = reading(before)
    after = reading(during)
    assert during.ours_s - before.ours_s > 0.95 * WORK_S
    assert after.ours_s - before.ours_s > 0.95 * 2 * WORK_S
    assert after.ours_s - before.ours_s < 2 * WORK_S + 0.5


def test_a_trunk_that_somebody_else_started_can_be_counted_as_ours() -> None:
    with burning(WORK_S, ours=False) as pid:
        before = reading(None, also=[pid])
        assert eventually(lambda: reading(before, also=[pid]).ours_s - before.ours_s > 0.1 * WORK_S)


def test_others_and_stolen_are_rates_of_what_was_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, own = psutil.cpu_times(), psutil.Process().cpu_times()
    counted = {"busy": 100.0, "stolen": 3.0, "ours": 40.0, "clock": 1000.0}

    def cpu_times() -> object:
        return cpu._replace(user=counted["busy"], nice=0.0, system=0.0, steal=counted["stolen"])

    def own_times(process: psutil.Process) -> object:
        used = counted["ours"] if process.pid == os.getpid() else 0.0
        return own._replace(user=used, system=0.0, children_user=0.0, children_system=0.0)

    monkeypatch.setattr(psutil, "cpu_times", cpu_times)
    monkeypatch.setattr(psutil.Process, "cpu_times", own_times)
    monkeypatch.setattr(time, "monotonic", lambda: counted["clock"])
    before = reading(None)
    counted |= {"busy": 112.0, "stolen": 4.0, "ours": 50.0, "clock": 1010.0}
    after = reading(before)
    assert after.others_cpu == pytest.approx(0.2) and after.stolen_cpu == pytest.approx(0.1)
    counted |= {"busy": 112.0, "ours": 51.0, "clock": 1020.0}
    assert reading(after).others_cpu == 0.0, "a tick that was counted late is no negative load"


def test_a_process_that_ends_while_it_is_read_is_not_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its time moves to its parent's count, which had been read by then."""
    real, failures = psutil.Process.children, [psutil.NoSuchProcess(1)]

    def children(self: psutil.Process, recursive: bool = False) -> list[psutil.Process]:
        if failures:
            raise failures.pop()
        return real(self, recursive)

    monkeypatch.setattr(psutil.Process, "children", children)
    assert reading(None).ours_s > 0


def test_a_trunk_that_has_gone_counts_as_nothing() -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    assert reading(None, also=[gone.pid]).ours_s == pytest.approx(reading(None).ours_s, abs=0.2)

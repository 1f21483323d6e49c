"""Everything that a program starts ends with it, however it ends."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import pytest

from splitlearn import config
from splitlearn.arms import embedded_server
from splitlearn.arms.embedded_server import EmbeddedTrunk, Server
from splitlearn.arms.runs import Runs
from splitlearn.checkpoints.folder import ModelFiles
from splitlearn.client.served import check_served, describe
from splitlearn.errors import SetupError
from splitlearn.runtime.progress import silent
from tests.conftest import TinyFactory
from tests.support.trunk import environment, eventually, gone, served, settings

# A program such as the page: an embedded trunk and a worker for each arm; it says so when both have run, and goes on.
PROGRAM = """
import sys, time
from splitlearn import config
from splitlearn.events import GenerationRequest
from splitlearn.runtime.progress import silent
from splitlearn.arms.runs import Runs
from splitlearn.flags.selection import FlagSet
if __name__ == "__main__":
    cached = frozenset({"use_cache"})
    with Runs(config.Config.model_validate_json(sys.argv[1]), silent) as runs:
        for kind in ("full", "split"):
            list(runs.stream(kind, FlagSet(cached, cached, cached), GenerationRequest("Hello", max_new_tokens=4)))
        print("running", flush=True)
        long = GenerationRequest("Hello", max_new_tokens=400, ignore_eos=True)
        while sys.argv[2] == "busy":
            list(runs.stream("split", FlagSet(cached, cached, cached), long))
        sys.stdin.read()
"""


@pytest.fixture(scope="module")
def files(tiny_model: TinyFactory) -> ModelFiles:
    return tiny_model("llama")


@contextmanager
def program(files: ModelFiles, what: str) -> Iterator[tuple[subprocess.Popen[str], list[psutil.Process]]]:
    """The program, running, and every process below it."""
    text = config.parse(settings(files)).model_dump_json()
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, text, what],
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "running\n"
            yield process, psutil.Process(process.pid).children(recursive=True)
        finally:
            process.kill()


@pytest.mark.parametrize("what", ["idle", "busy"])
def test_a_program_that_is_killed_leaves_nothing_running(what: str, files: ModelFiles) -> None:
    with program(files, what) as (process, below):
        servers = [child for child in below if "server" in child.cmdline()]
        assert len(servers) == 1
        assert len(below) >= 4  # a fork server, two workers, the trunk server
        process.kill()
        process.wait(10)
        assert eventually(lambda: all(gone(child.pid) for child in below)), [c for c in below if not gone(c.pid)]


def test_an_embedded_trunk_serves_the_configured_model_on_loopback_and_stops(files: ModelFiles) -> None:
    trunk = EmbeddedTrunk(config.parse(settings(files)))
    try:
        assert trunk.address.startswith("127.0.0.1:")
        check_served(describe(trunk.address), served(files), trunk.address)
        below = psutil.Process(trunk.pid).children(recursive=True)
        assert trunk.alive()
    finally:
        trunk.stop()
    assert not trunk.alive()
    assert eventually(lambda: all(gone(child.pid) for child in below))
    trunk.stop()  # a second time does nothing


def test_an_embedded_trunk_that_was_killed_is_back_at_its_address_until_it_cannot_be_started_any_more(
    files: ModelFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded_server, "MOST_STARTS", 2)
    trunk = EmbeddedTrunk(config.parse(settings(files)))
    try:
        first = trunk.pid
        psutil.Process(first).kill()
        assert eventually(lambda: gone(first))
        assert trunk.usable()
        assert trunk.pid != first
        check_served(describe(trunk.address), served(files), trunk.address)
        monkeypatch.setattr(sys, "executable", "/bin/false")
        psutil.Process(trunk.pid).kill()
        assert eventually(lambda: not trunk.usable())
    finally:
        trunk.stop()
    assert not trunk.alive()


def test_an_expected_trunk_becomes_the_first_one(files: ModelFiles) -> None:
    with Runs(config.parse(settings(files)), silent) as runs:
        before = set(psutil.Process().children())
        runs.expect_trunk()
        (process,) = set(psutil.Process().children()) - before
        check_served(describe(runs.trunk_address()), served(files), "it")
        assert set(psutil.Process().children()) - before == {process}
    assert gone(process.pid)


def test_an_expected_trunk_that_is_never_used_ends_with_the_runs(files: ModelFiles) -> None:
    before = set(psutil.Process().children())
    with Runs(config.parse(settings(files)), silent) as runs:
        runs.expect_trunk()
    assert eventually(
        lambda: not [child for child in set(psutil.Process().children()) - before if "server" in child.cmdline()]
    )


def test_a_server_that_nobody_has_a_use_for_ends_in_silence(capfd: pytest.CaptureFixture[str]) -> None:
    server = Server()
    server.close()
    assert server.process.wait(120) == 0
    assert capfd.readouterr().err == ""


def test_an_embedded_trunk_that_cannot_start_says_so(files: ModelFiles, capfd: pytest.CaptureFixture[str]) -> None:
    wrong = config.parse(settings(files, split={"start": 5, "end": 3}))
    with pytest.raises(SetupError, match="embedded trunk server did not start"):
        EmbeddedTrunk(wrong)
    assert "error: split.end: 3 cannot be used" in capfd.readouterr().err

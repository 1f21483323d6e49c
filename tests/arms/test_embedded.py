"""Everything that a program starts ends with it, however it ends."""

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from splitlearn import config
from splitlearn.arms import embedded_server
from splitlearn.arms.embedded_server import EmbeddedTrunk
from splitlearn.checkpoints.folder import ModelFiles
from splitlearn.client.served import check_served, describe
from splitlearn.errors import SetupError
from tests.conftest import TinyFactory
from tests.support import ROOT, two_arms
from tests.support.children import output_of
from tests.support.forks import Fork
from tests.support.trunk import environment, eventually, forks_of, gone, listens, served, settings


@pytest.fixture(scope="module")
def files(tiny_model: TinyFactory) -> ModelFiles:
    return tiny_model("llama")


@contextmanager
def program(files: ModelFiles, what: str, errors: Path) -> Iterator[tuple[Fork, list[psutil.Process]]]:
    """A program with two arms, running, and every process below it."""
    process = Fork(two_arms.main, [config.parse(settings(files)).model_dump_json(), what], ROOT, errors)
    try:
        assert process.stdout.readline() == "running\n", errors.read_text()
        yield process, psutil.Process(process.pid).children(recursive=True)
    finally:
        process.close()


@pytest.mark.parametrize("what", ["idle", "busy"])
def test_a_program_that_is_killed_leaves_nothing_running(what: str, files: ModelFiles, tmp_path: Path) -> None:
    with program(files, what, tmp_path / "errors") as (process, below):
        assert len([child for child in below if listens(child)]) == 1
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
    files: ModelFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded_server, "MOST_STARTS", 2)
    trunk, moved = EmbeddedTrunk(config.parse(settings(files))), tmp_path / "moved"
    try:
        first = trunk.pid
        psutil.Process(first).kill()
        assert eventually(lambda: gone(first))
        assert trunk.usable()
        assert trunk.pid != first
        check_served(describe(trunk.address), served(files), trunk.address)
        files.folder.rename(moved)
        psutil.Process(trunk.pid).kill()
        assert eventually(lambda: not trunk.usable(), within_s=60)
    finally:
        trunk.stop()
        if moved.exists():
            moved.rename(files.folder)
    assert not trunk.alive()


def test_a_server_whose_start_is_stopped_ends(files: ModelFiles) -> None:
    before, stop = set(forks_of()), threading.Event()
    stop.set()
    with pytest.raises(SetupError, match="stopped while it started"):
        EmbeddedTrunk(config.parse(settings(files)), stop=stop)
    assert eventually(lambda: set(forks_of()) <= before)


def test_an_embedded_trunk_that_cannot_start_says_why(files: ModelFiles) -> None:
    wrong = config.parse(settings(files, split={"start": 5, "end": 3}))
    with pytest.raises(SetupError, match=r"embedded trunk server did not start\. split\.end: 3 cannot be used"):
        EmbeddedTrunk(wrong)


def test_a_child_runs_the_servers_own_code_also_where_the_parent_has_a_module_of_that_name(tmp_path: Path) -> None:
    (tmp_path / "server.py").write_text("")
    program = """
import server, sys
from splitlearn.runtime import programs
found = programs.own("server.auth.gate:Access")
assert found.__module__ == "server.auth.gate" and sys.modules["server"].__path__
"""
    output_of([sys.executable, "-c", program], tmp_path, environment())

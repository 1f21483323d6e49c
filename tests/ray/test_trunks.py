"""Trunk servers on a real Ray, by make test-ray: what is killed, drained, scaled or ended costs no token and leaves
nothing running."""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import psutil
import pytest
import yaml

from splitlearn.checkpoints.folder import ModelFiles
from splitlearn.client.directory import Directory
from splitlearn.client.hop import hops_at
from splitlearn.errors import TrunkError, TrunkUnavailable
from splitlearn.events import GenerationRequest, TokenEvent
from splitlearn.runtime import programs
from splitlearn.wire import READY
from tests.client.test_remote import free_port
from tests.conftest import TinyFactory
from tests.support import ROOT
from tests.support.children import output_of
from tests.support.client import CACHED, client
from tests.support.trunk import PLAN, TrunkHere, eventually, settings
from tests.support.words import session_of

pytestmark = [
    pytest.mark.ray,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed: make test-ray"),
]
LONG_S = 300.0
"""Limits what hangs: on a busy machine Ray takes minutes to start."""
MARK = "SPLITLEARN_TEST_RAY"
TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "a-token-of-the-tests-with-thirty-two-characters"}
REQUEST = GenerationRequest("Why is the sky blue?", max_new_tokens=60, ignore_eos=True)
ACTORS = """
import json, ray
ray.init(address="auto", namespace="splitlearn", log_to_driver=False, logging_level="ERROR")
groups = [each["state"] for each in ray.util.placement_group_table().values()]
print(json.dumps([sorted(ray.util.list_named_actors()), sorted(groups)]))
"""


class Program:
    """A running `python -m server --ray`. All processes that it starts, and theirs, have its mark."""

    def __init__(self, config: dict[str, Any], folder: Path, address: str, mark: str) -> None:
        self.mark, self.errors = mark or uuid.uuid4().hex, folder / "errors"
        file = folder / "config.yaml"
        file.write_text(yaml.safe_dump(config))
        with self.errors.open("w") as errors:
            self.process = subprocess.Popen(
                programs.command("server", "--config", str(file), "--port", "0", "--ray", address),
                env={**programs.environment(), MARK: self.mark},
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                start_new_session=True,
            )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line.startswith(READY), self.errors.read_text()
        self.address = line.removeprefix(READY).strip()
        self._directory = Directory(self.address)

    def replicas(self) -> list[str]:
        """The addresses that the directory lists; none when it does not answer."""
        with suppress(TrunkError):
            return [each.address for each in self._directory.replicas()]
        return []

    def left(self) -> list[str]:
        """The command lines of its processes that run, and of theirs."""
        found = []
        for each in psutil.process_iter():
            with suppress(psutil.Error):  # it has ended meanwhile
                if _has(each, self.mark):
                    found.append(" ".join(each.cmdline()))
        return found

    def end(self, number: signal.Signals) -> int:
        """Send a signal to the whole group of the program, as a terminal does. Returns its exit status."""
        os.killpg(self.process.pid, number)
        return self.process.wait(LONG_S)

    def stop(self) -> None:
        self._directory.close()
        self.process.kill()
        self.process.wait()


def _has(process: psutil.Process, mark: str) -> bool:
    with suppress(psutil.Error):
        return process.status() != psutil.STATUS_ZOMBIE and process.environ().get(MARK) == mark
    return False


def server_at(address: str) -> psutil.Process:
    """The process that listens there."""
    port = int(address.rpartition(":")[2])
    listening = [each for each in psutil.net_connections("tcp") if each.status == psutil.CONN_LISTEN]
    found = {each.pid for each in listening if each.laddr and each.laddr.port == port}
    (pid,) = found
    return psutil.Process(pid or 0)


@contextmanager
def program(
    files: ModelFiles, folder: Path, ray: Mapping[str, object], address: str = "local", mark: str = "", **server: int
) -> Iterator[Program]:
    split = {"start": PLAN.start, "end": PLAN.end}
    running = Program(
        settings(files, split=split, ray=ray, server={"drain_s": LONG_S, **server}), folder, address, mark
    )
    try:
        yield running
    finally:
        running.stop()


@pytest.fixture(scope="module")
def files(tiny_model: TinyFactory) -> ModelFiles:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def wanted(files: ModelFiles, here: TrunkHere) -> tuple[int, ...]:
    """The answer without Ray, with no loss."""
    with client(files, here.address) as asking:
        return asking.ask(REQUEST).token_ids


def test_an_actor_or_a_server_that_is_killed_costs_no_token_and_comes_back_and_a_drain_loses_no_session(
    files: ModelFiles, wanted: tuple[int, ...], tmp_path: Path
) -> None:
    with program(files, tmp_path, {"min_replicas": 2}) as running, client(files, running.address) as asking:
        assert len(set(running.replicas())) == 2
        for whom in ("actor", "server"):
            before = set(running.replicas())

            def kill(tokens: int, whom: str = whom) -> None:
                if tokens == 20:
                    server = server_at(asking.stage.facts.address)
                    (server.parent() if whom == "actor" else server).kill()  # type: ignore[union-attr]

            found = asking.ask(REQUEST, kill)
            assert found.token_ids == wanted
            ((_, loss),) = found.recoveries
            assert loss.lost in before and loss.found in before - {loss.lost}
            assert eventually(lambda lost=loss.lost: len(set(running.replicas()) - {lost}) == 2, LONG_S)  # type: ignore[misc]

        def end(tokens: int) -> None:
            if tokens == 20:
                os.killpg(running.process.pid, signal.SIGINT)
                assert eventually(lambda: running.replicas() == [], LONG_S)  # it drains

        found = asking.ask(REQUEST, end)
        assert found.token_ids == wanted and not found.recoveries
        assert running.process.wait(LONG_S) == 0
        assert not running.left()
        with pytest.raises(TrunkUnavailable):
            asking.ask(REQUEST)


def test_replicas_come_with_the_sessions_and_go_without_losing_one_and_a_kill_leaves_nothing(
    files: ModelFiles, wanted: tuple[int, ...], tmp_path: Path
) -> None:
    port = free_port()
    limits = {"max_sessions": 4, "metrics_port": port}
    with (
        program(files, tmp_path, {"max_replicas": 2, "idle_s": 0}, "local", "", **limits) as running,
        client(files, running.address) as asking,
    ):
        (first,) = running.replicas()
        assert seen(port, "serving") == 1
        with ExitStack() as held:
            for _ in range(4):
                held.callback(asking.stage.open(session_of(CACHED), 64).close)
            assert eventually(lambda: seen(port, "serving") == 2, LONG_S)
            actors, groups = state()
            assert [name.rpartition("-")[0] for name in actors] == ["", "link-1-replica", "link-1-replica"]
            assert groups == ["CREATED", "CREATED"]
            events = asking.stream(REQUEST)
            answer = [next(event for event in events if isinstance(event, TokenEvent))]
            assert asking.stage.facts.address != first
        assert eventually(lambda: seen(port, "draining") == 1, LONG_S)
        assert running.replicas() == [first]
        answer += [event for event in events if isinstance(event, TokenEvent)]
        assert tuple(each for event in answer for each in event.token_ids) == wanted
        assert not any(event.recoveries for event in answer)
        assert eventually(lambda: (seen(port, "draining"), seen(port, "serving")) == (0, 1), LONG_S)
        assert eventually(lambda: [len(each) for each in state()] == [2, 2], LONG_S)
        assert state()[1] == ["CREATED", "REMOVED"]
        assert len(running.left()) > 5
        running.end(signal.SIGKILL)
        assert eventually(lambda: not running.left(), LONG_S)


def test_a_chain_on_ray_costs_no_token_when_the_actor_of_one_link_is_killed(
    files: ModelFiles, wanted: tuple[int, ...], tmp_path: Path
) -> None:
    chain = {"layers": [[2, 3], [3, 4]], "num_cpus": 0.5, "max_replicas": 1}
    with program(files, tmp_path, chain) as running:
        hops = hops_at((running.address,), PLAN)
        assert [(hop.link, str(hop.plan), len(hop.listed())) for hop in hops] == [
            ("1 of 2", "[2, 3)", 1),
            ("2 of 2", "[3, 4)", 1),
        ]
        with client(files, hops=hops) as asking:

            def kill(tokens: int) -> None:
                if tokens == 20:
                    server_at(hops[1].address()).parent().kill()  # type: ignore[union-attr]

            found = asking.ask(REQUEST, kill)
        assert found.token_ids == wanted and len(found.recoveries) == 1
        assert running.end(signal.SIGTERM) == 0
        assert not running.left()


def test_a_directory_that_is_killed_comes_back_and_sessions_and_their_losses_do_not_need_it(
    files: ModelFiles, wanted: tuple[int, ...], tmp_path: Path
) -> None:
    with program(files, tmp_path, {"min_replicas": 2}) as running, client(files, running.address) as asking:
        before = set(running.replicas())

        def kill(tokens: int) -> None:
            if tokens == 20:
                server_at(running.address).kill()
                server_at(asking.stage.facts.address).kill()

        found = asking.ask(REQUEST, kill)
        assert found.token_ids == wanted
        ((_, loss),) = found.recoveries
        assert {loss.lost, loss.found} == before
        assert asking.ask(REQUEST).token_ids == wanted
        assert eventually(lambda: len(set(running.replicas()) - {loss.lost}) == 2, LONG_S)

        with port_taken_of(running.address):  # which keeps it from starting, so that Ray gives it up
            assert asking.ask(REQUEST).token_ids == wanted
            assert eventually(lambda: "the directory ended" in running.errors.read_text(), LONG_S)
        assert eventually(lambda: len(set(running.replicas())) == 2, LONG_S)
        with client(files, running.address) as newcomer:
            assert newcomer.ask(REQUEST).token_ids == wanted
        assert running.end(signal.SIGTERM) == 0
        assert not running.left()


@contextmanager
def port_taken_of(address: str) -> Iterator[None]:
    """Kill the process that listens there, and take its port for a `with` block."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)

        def taken() -> bool:
            with suppress(ValueError, psutil.Error):  # nobody listens there
                server_at(address).kill()
            with suppress(OSError):
                other.bind((host, int(port)))
                return True
            return False

        assert eventually(taken, LONG_S)
        other.listen()
        yield


@contextmanager
def nodes(mark: str, count: int) -> Iterator[str]:
    """A Ray cluster of `count` nodes with a CPU each, all on this machine, by `ray start`. Gives its address."""
    command, port = [str(Path(sys.executable).parent / "ray"), "start", "--num-cpus", "1"], free_port()
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp") as folder:  # a socket's path is short
        environment = {**programs.environment(), **TOKEN, MARK: mark, "RAY_TMPDIR": folder}
        kinds = [["--head", "--port", str(port)], *[["--address", f"127.0.0.1:{port}"]] * (count - 1)]
        try:
            for kind in kinds:
                output_of([*command, "--object-store-memory", "80000000", *kind], ROOT, environment, LONG_S)
            yield f"127.0.0.1:{port}"
        finally:
            for each in psutil.process_iter():
                if _has(each, mark):
                    with suppress(psutil.Error):
                        each.kill()


def test_on_a_cluster_each_replica_has_a_node_and_when_ray_is_stopped_nothing_is_left(
    files: ModelFiles, wanted: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in TOKEN.items():
        monkeypatch.setenv(name, value)
    mark = uuid.uuid4().hex
    with (
        nodes(mark, 2) as address,
        program(files, tmp_path, {"min_replicas": 2}, address, mark) as running,
        client(files, running.address) as asking,
    ):
        assert asking.ask(REQUEST).token_ids == wanted
        ((strategy, places),) = placed(address)
        assert (strategy, len(set(places.values()))) == ("STRICT_SPREAD", 2)
        assert ours(running)
        for each in psutil.process_iter():
            if _has(each, mark) and any(name in each.name() for name in ("raylet", "gcs_server")):
                each.kill()  # `ray stop` would stop every Ray of this machine
        assert running.process.wait(LONG_S) == 2
        assert "error: Ray has ended" in running.errors.read_text()
        assert eventually(lambda: not ours(running), LONG_S)


def ours(running: Program) -> list[str]:
    """What is left of it that is not the cluster's own."""
    return [
        each
        for each in running.left()
        if any(word in each for word in ("splitlearn", "ray::Replica", "ray::Directory"))
    ]


def placed(address: str) -> list[Any]:
    """The strategy of each placement group, and the nodes of its places, by Ray itself."""
    code = f"""
import json, ray
ray.init(address="{address}", log_to_driver=False, logging_level="ERROR")
groups = ray.util.placement_group_table().values()
print(json.dumps([[each["strategy"], each["bundles_to_node_id"]] for each in groups]))
"""
    found: list[Any] = json.loads(output_of([sys.executable, "-c", code], end_s=LONG_S).splitlines()[-1])
    return found


def seen(port: int, state: str) -> float:
    """How many replicas are in that state, by the program's metrics."""
    with urlopen(f"http://127.0.0.1:{port}/metrics", timeout=LONG_S) as answer:
        lines = answer.read().decode().splitlines()
    (line,) = [each for each in lines if each.startswith(f'splitlearn_ray_replicas{{link="1",state="{state}"}}')]
    return float(line.split()[-1])


def state() -> list[list[str]]:
    """The actors' names and the placement groups' states, by Ray itself."""
    found: list[list[str]] = json.loads(output_of([sys.executable, "-c", ACTORS], end_s=LONG_S).splitlines()[-1])
    return found


def test_a_comparison_with_its_trunk_on_ray_gives_the_same_tokens_and_leaves_nothing(
    files: ModelFiles, tmp_path: Path
) -> None:
    mark, config = uuid.uuid4().hex, tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(settings(files, trunk={"address": "ray"})))
    command = programs.command("splitlearn", "compare", "--config", str(config), "--max-new-tokens", "8", "--json")
    environment = {**programs.environment(), MARK: mark}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=LONG_S)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["identical_tokens"] and len(found["split_run"]["token_ids"]) == 8
    assert eventually(lambda: not [each for each in psutil.process_iter() if _has(each, mark)], LONG_S)


def test_a_server_that_cannot_start_on_ray_is_one_line(files: ModelFiles, tmp_path: Path) -> None:
    for wrong, said in (
        ({"split": {"start": 2, "end": 99}}, "split"),
        ({"ray": {"num_cpus": 999}}, "ray: there is no room for 1 trunk servers: 1 of them need CPU 999"),
    ):
        file = tmp_path / "config.yaml"
        file.write_text(yaml.safe_dump(settings(files, **wrong)))
        command = programs.command("server", "--config", str(file), "--port", "0", "--ray")
        done = subprocess.run(
            command, env=programs.environment(), cwd=ROOT, capture_output=True, text=True, timeout=LONG_S
        )
        assert done.returncode == 2
        (line,) = [each for each in done.stderr.splitlines() if not each.startswith("{")]
        assert line.startswith("error: The trunk servers on Ray did not start.") and said in line

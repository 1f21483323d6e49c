"""A trunk server in a process that starts quickly: for tests that kill it, stop it, and start it again at the same
address."""

import os
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from server.__main__ import main
from splitlearn.client.served import describe
from splitlearn.errors import TrunkError
from tests.client.test_remote import free_port
from tests.support.forks import Fork, Main
from tests.support.trunk import eventually

START_S = 60.0


class Forked:
    """The server of `config` at `address`, to be killed and started again there; `pid` is that of the process that runs
    now, which runs `command`."""

    def __init__(self, config: Mapping[str, Any], folder: Path, command: Main) -> None:
        self._command = command
        self._port = free_port()
        self.address = f"127.0.0.1:{self._port}"
        self._folder = folder
        self._config = folder / f"trunk-{self._port}.yaml"
        self.configure(config)
        self.start()

    @property
    def pid(self) -> int:
        return self._server.pid

    def configure(self, config: Mapping[str, Any]) -> None:
        """What it serves from its next start on."""
        self._config.write_text(yaml.safe_dump({**config, "server": {"port": self._port}}))

    def start(self) -> None:
        """Start it, and wait until it serves."""
        arguments = ["--config", str(self._config)]
        self._server = Fork(self._command, arguments, self._folder, self._config.with_suffix(".err"))
        assert eventually(self._serves, START_S)

    def kill(self) -> None:
        """SIGKILL, and wait until it has gone."""
        self._server.close()

    def hold(self) -> None:
        """SIGSTOP, and wait until none of its threads runs: a step takes less than that can."""
        os.kill(self.pid, signal.SIGSTOP)
        threads = Path(f"/proc/{self.pid}/task")
        assert eventually(lambda: {_state(each) for each in threads.glob("*/stat")} == {"T"})

    def stop(self) -> None:
        """End it, also while it is stopped by a signal."""
        self._server.close()

    def _serves(self) -> bool:
        assert self._server.poll() is None
        try:
            describe(self.address)
        except TrunkError:
            return False
        return True


def _state(stat: Path) -> str:
    """The letter of a thread's state, which follows its name in brackets (man 5 proc)."""
    return stat.read_text().rpartition(")")[2].split()[0]


@contextmanager
def forked(config: Mapping[str, Any], folder: Path, command: Main = main) -> Iterator[Forked]:
    """Such a server for as long as the context is open."""
    made = Forked(config, folder, command)
    try:
        yield made
    finally:
        made.stop()

"""A trunk server in a forked process, which starts quickly: for tests that kill, stop and restart it at the same
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

START_S = 240.0


class ForkedTrunk:
    """A server for `config` at `address`, which can be killed and restarted there. `pid` is that of its current
    process, which runs `command`."""

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
        """Set the configuration for the next start."""
        self._config.write_text(yaml.safe_dump({**config, "server": {**config.get("server", {}), "port": self._port}}))

    def start(self) -> None:
        """Start it, and wait until it serves."""
        arguments = ["--config", str(self._config)]
        self._server = Fork(self._command, arguments, self._folder, self._config.with_suffix(".err"))
        assert eventually(self._serves, START_S)

    def kill(self) -> None:
        """Send SIGKILL, and wait until the process has ended."""
        self._server.close()

    def hold(self) -> None:
        """Send SIGSTOP, and wait until none of its threads runs: a step takes less time than that may take."""
        os.kill(self.pid, signal.SIGSTOP)
        threads = Path(f"/proc/{self.pid}/task")
        assert eventually(lambda: {_state(each) for each in threads.glob("*/stat")} == {"T"})

    def stop(self) -> None:
        """End the process, even while a signal has stopped it."""
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
def forked(config: Mapping[str, Any], folder: Path, command: Main = main) -> Iterator[ForkedTrunk]:
    """A forked trunk server for a `with` block."""
    made = ForkedTrunk(config, folder, command)
    try:
        yield made
    finally:
        made.stop()

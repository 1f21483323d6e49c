"""Trunk servers on Ray, started and ended by this program: a process of their own controls them (docs/ray.md).

    trunk = RayTrunk(config)
    trunk.address           # ray://host:port of the directory

Nothing of it is left when it was stopped, nor when this process was killed.
"""

import logging
import threading

from splitlearn.config import Config, ServerTls
from splitlearn.errors import SetupError, SplitlearnError
from splitlearn.runtime import ray_installed
from splitlearn.runtime.piped import Piped
from splitlearn.runtime.process import raised

WORK = "server.ray_trunks.controller:work"
"""What the child runs, by name: only the child imports the server."""
POLL_S, STOP_S = 0.05, 20.0
DRAIN_SPARE_S = 60.0
LOCAL = "local"
HOST = "127.0.0.1"


class RayTrunk:
    """Trunk servers by the settings of `config` on the Ray at `address`, by default one of its own. Raises SetupError
    where they do not start, and where `stop` is set before they have."""

    def __init__(
        self, config: Config, address: str = LOCAL, stop: threading.Event | None = None, level: int = logging.WARNING
    ) -> None:
        ray_installed.check("--ray" if address != LOCAL else "trunk.address")
        self._drain_s = config.server.drain_s
        self._child = Piped("The controller of the trunks on Ray", WORK, config, address, level, own_session=True)
        try:
            self.address = self._ready(stop or threading.Event())
        except SplitlearnError as error:
            self.stop()
            raise SetupError(f"The trunk servers on Ray did not start. {error}") from error
        except BaseException:
            self.stop()
            raise

    @property
    def pid(self) -> int:
        """The controller's process id."""
        return self._child.pid

    def usable(self) -> bool:
        """False when it has ended for good: Ray restarts what ends before."""
        return self._child.alive()

    def idle(self) -> bool:
        """True: one that a worker still knows is started again when that worker's arm runs."""
        return True

    def drain(self, at_once: threading.Event) -> None:
        """Let open sessions end, for as long as server.drain_s says, or until `at_once` is set. `stop` is still to be
        called."""
        try:
            self._child.send(True)
        except SplitlearnError:
            return
        left = int((self._drain_s + DRAIN_SPARE_S) / POLL_S)
        while left and not at_once.is_set() and not self._child.wait(POLL_S):
            left -= 1

    def stop(self) -> None:
        """End all of it. Again, it does nothing."""
        self._child.stop(STOP_S)

    def _ready(self, stop: threading.Event) -> str:
        while not self._child.poll(POLL_S):
            if stop.is_set():
                raise SetupError("They were stopped while they started.")
        address: str = raised(self._child.receive())
        return address


def embedded(config: Config, stop: threading.Event) -> RayTrunk:
    """One for this program alone, on loopback: without TLS, and without tokens."""
    own = {"tls": ServerTls(), "tokens": None, "host": HOST, "port": 0, "metrics_port": None}
    return RayTrunk(config.model_copy(update={"server": config.server.model_copy(update=own)}), stop=stop)

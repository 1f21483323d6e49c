"""A trunk server as a child process on a free loopback port, for when none is given. It ends with its parent.

    trunk = EmbeddedTrunk(config)
    trunk.address

When the server dies it is started again on the same port, so that clients find it there again and go on.
"""

import logging
import threading
from dataclasses import dataclass
from pathlib import Path

from splitlearn.config import Config, ServerTls
from splitlearn.errors import SetupError, SplitlearnError
from splitlearn.runtime import process
from splitlearn.runtime.process import raised

log = logging.getLogger(__name__)
WORK = "server.program:work"
"""What the child runs, by name: only the child imports the server."""
HOST = "127.0.0.1"
STOP_TIMEOUT_S = 10.0
POLL_S = 0.05
# A server that cannot be started so often in a row is given up; the pause before each start doubles.
MOST_STARTS = 5
FIRST_PAUSE_S = 0.5


@dataclass(frozen=True)
class Listening:
    """What a server sends its parent when it serves: where it listens, and where its metrics are (None: nowhere)."""

    address: str
    metrics: str | None


class EmbeddedTrunk:
    """A server with this program's settings, on loopback: without TLS, and without tokens but for those of the file
    `tokens`. `address` is where it listens, also after it was restarted.

    Raises SetupError where it does not start, and where `stop` is set before it has.
    """

    def __init__(self, config: Config, tokens: Path | None = None, stop: threading.Event | None = None) -> None:
        own = config.server.model_copy(update={"tls": ServerTls(), "tokens": tokens})
        self._config = config.model_copy(update={"server": own})
        self._stopping = threading.Event()
        self._lost = threading.Event()
        self._server = Server(self._config)
        try:
            address = self._server.wait_ready(stop or self._stopping)
        except SplitlearnError as error:
            self.stop()
            raise SetupError(f"The embedded trunk server did not start. {error}") from error
        if address is None:
            self.stop()
            raise SetupError("The embedded trunk server was stopped while it started.")
        self.address = address
        threading.Thread(target=self._supervise, daemon=True).start()

    @property
    def pid(self) -> int:
        """The server's process id; another one after a restart."""
        return self._server.pid

    def alive(self) -> bool:
        """True while the server runs."""
        return self._server.alive()

    def usable(self) -> bool:
        """Wait while the server is being started again; False when it was stopped or given up."""
        while not (self._server.ready and self.alive()):
            if self._lost.is_set() or self._stopping.wait(POLL_S):
                return False
        return True

    def idle(self) -> bool:
        """True: a trunk that a worker still knows is started again when that worker's arm runs."""
        return True

    def stop(self) -> None:
        """End the server."""
        self._stopping.set()
        self._server.stop()

    def _supervise(self) -> None:
        """Start the server again whenever it has died, until it is stopped or cannot be started."""
        port, starts = int(self.address.rpartition(":")[2]), 0
        while True:
            self._server.wait_end()
            starts = 0 if self._server.ready else starts
            if starts == MOST_STARTS:
                log.error("The embedded trunk server could not be started again.")
                self._lost.set()
                return
            if self._stopping.wait(FIRST_PAUSE_S * (2**starts - 1)):
                return
            if self._server.ready:
                log.warning("The embedded trunk server died. %s", self._server.fate())
            starts += 1
            self._start_again(port)
            if self._stopping.is_set():  # stop() may have seen the server before this one
                self._server.stop()
                return

    def _start_again(self, port: int) -> None:
        """Put a new server in the place of the one that died. One that does not start has ended afterwards."""
        try:
            self._server = Server(self._config, port)
            self._server.wait_ready(self._stopping)
        except (SplitlearnError, OSError, EOFError) as error:  # the last two: the fork server is gone
            log.warning("The embedded trunk server did not start. %s", error)
            self._server.stop()


class Server:
    """One process of the server, on loopback. `ready` is true once it serves."""

    def __init__(self, config: Config, port: int = 0) -> None:
        # One with the same settings may run beside it, and has the port of the metrics.
        own = config.server.model_copy(update={"host": HOST, "port": port, "metrics_port": None})
        self.ready = False
        self._child = process.start("The trunk server", WORK, config.model_copy(update={"server": own}))

    @property
    def pid(self) -> int:
        """The process's id."""
        return self._child.pid

    def wait_ready(self, stop: threading.Event) -> str | None:
        """Wait until it serves; where, or None when `stop` was set before. Raises the error that it ended with."""
        while not self._child.connection.poll(POLL_S) and not stop.is_set():
            pass
        if stop.is_set():
            return None
        listening: Listening = raised(self._child.receive())
        self.ready = True
        return listening.address

    def alive(self) -> bool:
        """True while the process runs."""
        return self._child.alive()

    def wait_end(self) -> None:
        """Wait until the process has ended."""
        self._child.wait()

    def fate(self) -> str:
        """How the process ended, which is about to."""
        return str(self._child.death())

    def stop(self, within_s: float = STOP_TIMEOUT_S) -> None:
        """End the process: asked, and killed if it does not end in time or serve yet. Again, it does nothing."""
        if self.ready:
            self._child.connection.close()
            self._child.wait(within_s)
        self._child.process.kill()
        self._child.wait()

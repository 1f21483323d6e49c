"""A trunk server as a child process on a free loopback port, for when none is given. It ends with its parent.

When the server dies it is started again on the same port, so that clients find it there again and go on. Its process
can be started before its settings are known, and imports meanwhile what takes seconds:

    server = Server()
    trunk = EmbeddedTrunk(config, server=server)
"""

import contextlib
import logging
import signal
import subprocess
import threading
from pathlib import Path
from typing import IO, cast

from splitlearn.config import Config, ServerTls
from splitlearn.errors import SetupError
from splitlearn.runtime import cgroups, process, programs
from splitlearn.wire import READY

log = logging.getLogger(__name__)
STOP_TIMEOUT_S = 10.0
POLL_S = 0.05
# A server that cannot be started so often in a row is given up; the pause before each start doubles.
MOST_STARTS = 5
FIRST_PAUSE_S = 0.5


class EmbeddedTrunk:
    """`python -m server` with this program's settings, on loopback: without TLS, and without tokens but for those of
    the file `tokens`. `address` is where it listens, also after it was restarted."""

    def __init__(self, config: Config, tokens: Path | None = None, server: "Server | None" = None) -> None:
        own = config.server.model_copy(update={"tls": ServerTls(), "tokens": tokens})
        self._config = config.model_copy(update={"server": own})
        self._stopping = threading.Event()
        self._lost = threading.Event()
        self._server = server or Server()
        self._server.tell(self._config)
        address = self._server.wait_ready()
        if address is None:
            fate = self._server.fate()
            self.stop()
            raise SetupError(f"The embedded trunk server did not start ({fate}); what it said stands above.")
        self.address = address
        threading.Thread(target=self._supervise, daemon=True).start()

    @property
    def pid(self) -> int:
        """The server's process id; another one after a restart."""
        return self._server.process.pid

    def alive(self) -> bool:
        """True while the server runs."""
        server = self._server.process
        return server.poll() is None and process.runs(server.pid)

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
        """End the server by closing its stdin, as the end of this process would."""
        self._stopping.set()
        self._server.stop()

    def _supervise(self) -> None:
        """Start the server again whenever it has died, until it is stopped or cannot be started."""
        port, starts = int(self.address.rpartition(":")[2]), 0
        while True:
            self._server.process.wait()
            starts = 0 if self._server.ready else starts
            if starts == MOST_STARTS:
                log.error("The embedded trunk server could not be started again.")
                self._lost.set()
                return
            if self._stopping.wait(FIRST_PAUSE_S * (2**starts - 1)):
                return
            log.warning("The embedded trunk server died (%s).", self._server.fate())
            self._server.close()
            self._server = Server(port)
            self._server.tell(self._config)
            starts += 1
            if self._stopping.is_set():  # stop() may have seen the server before this one
                self._server.stop()
                return
            self._server.wait_ready()


class Server:
    """One process of the server, which waits to be told its settings. `ready` is true once it serves."""

    def __init__(self, port: int = 0) -> None:
        self.ready = False
        self.process = subprocess.Popen(
            programs.command("server", "--embedded", "--host", "127.0.0.1", "--port", str(port)),
            env=programs.environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C at the terminal reaches the parent, which ends this in order
        )
        self._stdin, self._stdout = cast(IO[str], self.process.stdin), cast(IO[str], self.process.stdout)

    def tell(self, config: Config) -> None:
        """Its settings; said once."""
        with contextlib.suppress(BrokenPipeError):  # it died at once: the missing line on stdout tells
            self._stdin.write(config.model_dump_json() + "\n")
            self._stdin.flush()

    def wait_ready(self) -> str | None:
        """Wait until it serves; where, or None when it ended before it did."""
        try:
            line = self._stdout.readline()
        except ValueError:  # stop() has closed it
            line = ""
        self.ready = line.startswith(READY)
        return line.removeprefix(READY).strip() if self.ready else None

    def fate(self) -> str:
        """How the process ended, which is about to."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(STOP_TIMEOUT_S)
        if self.process.returncode == -signal.SIGKILL:
            return f"it was killed, most often for want of memory: {cgroups.machine()}"
        return f"exit status {self.process.returncode}"

    def stop(self, within_s: float = STOP_TIMEOUT_S) -> None:
        """End the process: asked, and killed if it does not end in time or serve yet. Again, it does nothing."""
        with contextlib.suppress(BrokenPipeError):
            self._stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(within_s if self.ready else 0)
        self.process.kill()
        self.process.wait()
        self.close()

    def close(self) -> None:
        """Close the pipes."""
        with contextlib.suppress(BrokenPipeError):
            self._stdin.close()
        self._stdout.close()

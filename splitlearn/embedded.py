"""A trunk server as a child process on a free loopback port, for when none is given. It ends with its parent."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path
from typing import IO, cast

from splitlearn.config import Config
from splitlearn.errors import SetupError
from splitlearn.wire import READY

STOP_TIMEOUT_S = 10.0


class EmbeddedTrunk:
    """`python -m server` with this program's settings. `address` is where it listens."""

    def __init__(self, config: Config) -> None:
        root = Path(__file__).resolve().parent.parent  # where the packages splitlearn and server lie
        self._process = subprocess.Popen(
            [sys.executable, "-m", "server", "--embedded", "--host", "127.0.0.1", "--port", "0"],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH"))))},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C at the terminal reaches the parent, which ends this in order
        )
        self._stdin, self._stdout = cast(IO[str], self._process.stdin), cast(IO[str], self._process.stdout)
        with contextlib.suppress(BrokenPipeError):  # it died at once: the missing line on stdout tells
            self._stdin.write(config.model_dump_json() + "\n")
            self._stdin.flush()
        line = self._stdout.readline()
        if not line.startswith(READY):
            self.stop()
            raise SetupError("The embedded trunk server did not start; its message stands above.")
        self.address = line.removeprefix(READY).strip()

    @property
    def pid(self) -> int:
        """The server's process id."""
        return self._process.pid

    def alive(self) -> bool:
        """True while the server runs."""
        return self._process.poll() is None

    def stop(self) -> None:
        """End the server by closing its stdin, as the end of this process would."""
        with contextlib.suppress(BrokenPipeError):
            self._stdin.close()
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._stdout.close()

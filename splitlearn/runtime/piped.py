"""A child process with a pipe that is a fresh interpreter: nothing of this process is forked or imported there.

    child = Piped("The trunk server", "server.program:work", config)
    child.receive()

The child runs `work(connection, config)`. It ends with its parent, however the parent ends. For parents that must not
be forked (Ray's workers), and for children in a session of their own, which signals of a terminal do not reach.
Messages on the pipe are pickled: they stay between processes of one program on one machine.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from types import MappingProxyType
from typing import Any

import psutil

from splitlearn.errors import WorkerDied
from splitlearn.runtime import environment, programs

SWEEP_S, LOOK_S = 10.0, 0.02
ORPHAN_S = 15.0
"""How long a child may take to end in order after its parent was killed."""


class Piped:
    """The child. `what` names it in errors. With `own_session` it begins a session, and `stop` ends all processes of
    that session. `variables` replace those of its environment; None takes one away. Methods raise WorkerDied when the
    other end is gone."""

    def __init__(
        self,
        what: str,
        target: str,
        *arguments: object,
        own_session: bool = False,
        variables: Mapping[str, str | None] = MappingProxyType({}),
    ) -> None:
        self.what, self._own_session = what, own_session
        self._connection, theirs = Pipe()
        life, self._life = Pipe(duplex=False)  # this end is open for as long as this process lives
        changed = {**programs.environment(), **variables}
        with theirs, life:
            descriptors = [theirs.fileno(), life.fileno()]
            self._process = subprocess.Popen(
                programs.command("splitlearn.runtime.piped", target, *map(str, descriptors)),
                env={name: value for name, value in changed.items() if value is not None},
                stdin=subprocess.DEVNULL,
                pass_fds=descriptors,
                start_new_session=own_session,
            )
        self.send(arguments)

    @property
    def pid(self) -> int:
        """The process's id."""
        return self._process.pid

    def send(self, message: object) -> None:
        """Send `message` to the child."""
        try:
            self._connection.send(message)
        except (BrokenPipeError, ConnectionResetError) as error:
            raise self._death() from error

    def receive(self) -> Any:
        """Return the child's next message; blocks until it comes."""
        try:
            return self._connection.recv()
        except (EOFError, ConnectionResetError) as error:
            raise self._death() from error

    def poll(self, timeout_s: float) -> bool:
        """Whether there is a message, or the end, within `timeout_s`."""
        return self._connection.poll(timeout_s)

    def alive(self) -> bool:
        """True while the process runs."""
        return self._process.poll() is None

    def signal(self, number: signal.Signals) -> None:
        """Send a signal, if the process runs."""
        self._process.send_signal(number)

    def wait(self, timeout_s: float | None = None) -> bool:
        """Whether the process has ended, or does within `timeout_s`; None waits for it."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout_s)
        return not self.alive()

    def stop(self, within_s: float) -> None:
        """End the process: close its pipe, and kill it if it does not end in time. Again, it does nothing."""
        self._connection.close()
        if not self.wait(within_s):
            self._process.kill()
            self._process.wait()
        if self._own_session:
            sweep(self.pid)

    def _death(self) -> WorkerDied:
        self.wait(LOOK_S)
        return WorkerDied(f"{self.what} ended unexpectedly (exit status {self._process.poll()}).")


def sweep(session: int) -> None:
    """Kill all processes of a session whose leader has ended, also those that they start meanwhile."""
    deadline = time.monotonic() + SWEEP_S
    while (left := _members(session)) and time.monotonic() < deadline:
        for each in left:
            with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                each.kill()
        time.sleep(LOOK_S)


def _members(session: int) -> list[psutil.Process]:
    """The processes of a session that run."""
    found = []
    for each in psutil.process_iter():
        with suppress(ProcessLookupError, PermissionError, psutil.Error):
            if os.getsid(each.pid) == session and each.status() != psutil.STATUS_ZOMBIE:
                found.append(each)
    return found


def _end_with(life: Connection) -> None:
    """End this process some time after its parent's end of `life` closes."""
    life.poll(None)
    time.sleep(ORPHAN_S)
    os._exit(1)


def main() -> None:
    """The child's main function. Its arguments: what to run, and the file descriptors of the two pipes."""
    target, talk, life = sys.argv[1:]
    threading.Thread(target=_end_with, args=(Connection(int(life), writable=False),), daemon=True).start()
    environment.set_defaults()
    connection = Connection(int(talk))
    try:
        arguments = connection.recv()
        programs.own(target)(connection, *arguments)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # the other end is gone: there is nobody to report to


if __name__ == "__main__":
    main()

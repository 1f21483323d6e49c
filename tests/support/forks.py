"""Processes of this program for tests, forked from one that has imported all that they need.

To start one takes 0.3 s; a fresh interpreter computes for five seconds to import torch and transformers. What runs is
the command's own `main`, with real pipes, signals and an exit status. Its own fork server is a fork as well, so that
the workers and servers below it start as quickly. Tests of the command as a person types it start a fresh interpreter.
`LIGHT_FIRST` comes before torch, for the page (tests/support/without_torch.py).
"""

import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path
from unittest import mock

from splitlearn.runtime import process

LIGHT_FIRST, IMPORTED = "tests.support.light", ["server.__main__", "server.program", "splitlearn.cli.main"]
process.PRELOAD[:] = dict.fromkeys([LIGHT_FIRST, *process.PRELOAD, *IMPORTED])
Main = Callable[[list[str]], int]


class Fork:
    """`command(arguments)` in a process of its own, run in `folder`: what of subprocess.Popen the tests use.

    `stdout` is a pipe. What it writes to stderr goes to the file `errors`, or to that pipe. It gets the test's
    environment as it is now with `environment` over it; libraries have read theirs before.
    """

    def __init__(
        self,
        command: Main,
        arguments: Sequence[str],
        folder: Path,
        errors: Path | None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        told = (list(arguments), str(folder), errors and str(errors), {**os.environ, **(environment or {})})
        reader, writer = os.pipe()
        out = Connection(writer, readable=False)
        try:
            self._child = process.start("The command", _run, command, out, *told)
        finally:
            out.close()
        self.stdout = os.fdopen(reader, encoding="utf-8")

    @property
    def pid(self) -> int:
        """The process's id."""
        pid = self._child.process.pid
        assert pid is not None
        return pid

    @property
    def returncode(self) -> int | None:
        """The exit status, or minus the signal's number; None while it runs."""
        return self._child.process.exitcode

    def poll(self) -> int | None:
        """As `returncode`."""
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait until it has ended; its exit status. Raises subprocess.TimeoutExpired."""
        self._child.process.join(timeout)
        if (code := self.returncode) is None:
            raise subprocess.TimeoutExpired("a forked command", timeout or 0.0)
        return code

    def send_signal(self, number: int) -> None:
        """Send a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        """SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL."""
        self.send_signal(signal.SIGKILL)

    def close(self) -> None:
        """End it, also while it is stopped by a signal, and let go of its pipes."""
        self.kill()
        self._child.connection.close()
        self._child.process.join()
        self.stdout.close()


def printed(command: Main, arguments: Sequence[str], folder: Path, errors: Path) -> str:
    """What `command(arguments)`, run in `folder`, prints to stdout. Fails with what it wrote to `errors` unless it ends
    with status 0."""
    child = Fork(command, arguments, folder, errors)
    try:
        text = child.stdout.read()
        assert child.wait() == 0, errors.read_text()
    finally:
        child.close()
    return text


def _run(
    connection: Connection,
    command: Main,
    out: Connection,
    arguments: list[str],
    folder: str,
    log: str | None,
    environment: dict[str, str],
) -> None:
    """The forked process: `command` with the test's pipe as stdout."""
    multiprocessing.current_process().daemon = False  # a daemon may not start workers
    os.environ.update(environment)
    os.chdir(folder)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.dup2(out.fileno(), 1)
    out.close()
    with os.fdopen(os.dup(1), "w") if log is None else Path(log).open("w") as file:
        os.dup2(file.fileno(), 2)
    # Those that came with the fork may hold that their file can be sought in.
    sys.stdout, sys.stderr = (open(number, "w", encoding="utf-8", closefd=False) for number in (1, 2))  # noqa: SIM115
    sys.stderr.reconfigure(line_buffering=True)
    _start_fork_server()
    sys.argv[1:] = arguments
    sys.exit(command(arguments))


def _start_fork_server() -> None:
    """Fork this process's own fork server, which `multiprocessing` would start as a fresh interpreter. To be called
    before the process has threads that hold a lock."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(process.PRELOAD)
    with mock.patch("multiprocessing.util.spawnv_passfds", _fork):
        forkserver.ensure_running()


def _fork(path: str, arguments: Sequence[str], passed: Sequence[int]) -> int:
    """Run an interpreter's `arguments`, of which the last is code, in a fork that has the files `passed` and the three
    standard ones. Return its process id."""
    if pid := os.fork():
        return pid
    try:
        for low, high in pairwise((2, *sorted(passed), os.sysconf("SC_OPEN_MAX"))):
            os.closerange(low + 1, high)
        exec(arguments[-1], {})
    finally:
        os._exit(0)

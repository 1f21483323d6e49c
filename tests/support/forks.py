"""Runs commands of this program for tests, in processes forked from one that has all imports.

A fork takes 0.3 s; a fresh interpreter takes five seconds to import torch and transformers. The process runs the
command's own `main`, with real pipes, signals and an exit status. Its fork server is a fork, too, so that its workers
and servers start as quickly. Tests of the command as a person types it start a fresh interpreter. `LIGHT_FIRST` is
imported before torch, for the page (tests/support/without_torch.py).
"""

import importlib
import multiprocessing
import os
import runpy
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
READS_ENVIRONMENT = "huggingface_hub.constants"
Main = Callable[[list[str]], int]


class Fork:
    """`command(arguments)` in a process of its own, run in `folder`, with the methods of Popen that tests use.

    `stdout` is a pipe. stderr goes to the file `errors`, or to the same pipe. The process gets the test's current
    environment, updated by `environment`. The model hub's client reads it anew, other libraries have read theirs.
    """

    def __init__(
        self,
        command: Main,
        arguments: Sequence[str],
        folder: Path,
        errors: Path | None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        how = (list(arguments), str(folder), errors and str(errors), {**os.environ, **(environment or {})})
        reader, writer = os.pipe()
        out = Connection(writer, readable=False)
        try:
            self._child = process.start("The command", _run, command, out, *how)
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
        """The exit status, or the negative number of the signal. None while the process runs."""
        return self._child.process.exitcode

    def poll(self) -> int | None:
        """As `returncode`."""
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end, and return the exit status. Raises subprocess.TimeoutExpired."""
        self._child.process.join(timeout)
        if (code := self.returncode) is None:
            raise subprocess.TimeoutExpired("a forked command", timeout or 0.0)
        return code

    def send_signal(self, number: int) -> None:
        """Send a signal, unless the process has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        """Send SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Send SIGKILL."""
        self.send_signal(signal.SIGKILL)

    def close(self) -> None:
        """End the process, even while a signal has stopped it, and close its pipes."""
        self.kill()
        self._child.connection.close()
        self._child.process.join()
        self.stdout.close()


def printed(
    command: Main,
    arguments: Sequence[str],
    folder: Path,
    errors: Path,
    environment: Mapping[str, str] | None = None,
) -> str:
    """Run `command(arguments)` in `folder` and return its stdout. Fails with the text of `errors` unless it ends with
    status 0."""
    child = Fork(command, arguments, folder, errors, environment)
    try:
        text = child.stdout.read()
        assert child.wait() == 0, errors.read_text()
    finally:
        child.close()
    return text


def run_programs(paths: list[str]) -> int:
    """Print each path and run it, as `python PATH` does: __main__ is its module and its file."""
    for path in paths:
        print(path)
        runpy.run_path(path, run_name="__main__")
    return 0


def _run(
    connection: Connection,
    command: Main,
    out: Connection,
    arguments: list[str],
    folder: str,
    log: str | None,
    environment: dict[str, str],
) -> None:
    """The main function of the forked process: runs `command` with the test's pipe as stdout."""
    multiprocessing.current_process().daemon = False  # a daemon may not start workers
    os.environ.update(environment)
    importlib.reload(importlib.import_module(READS_ENVIRONMENT))
    os.chdir(folder)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.dup2(out.fileno(), 1)
    out.close()
    with os.fdopen(os.dup(1), "w") if log is None else Path(log).open("w") as file:
        os.dup2(file.fileno(), 2)
    # New ones: those of the fork's parent may assume that their file is seekable.
    sys.stdout, sys.stderr = (open(number, "w", encoding="utf-8", closefd=False) for number in (1, 2))  # noqa: SIM115
    sys.stderr.reconfigure(line_buffering=True)
    _start_fork_server()
    sys.argv[1:] = arguments
    sys.exit(command(arguments))


def _start_fork_server() -> None:
    """Fork this process's own fork server, which `multiprocessing` would start as a fresh interpreter. Call it before
    any thread may hold a lock."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(process.PRELOAD)
    with mock.patch("multiprocessing.util.spawnv_passfds", _fork):
        forkserver.ensure_running()


def _fork(path: str, arguments: Sequence[str], passed: Sequence[int]) -> int:
    """Run an interpreter's `arguments`, the last of which is code, in a fork. It keeps the descriptors `passed` and
    the three standard ones. Returns the process id."""
    if pid := os.fork():
        return pid
    try:
        for low, high in pairwise((2, *sorted(passed), os.sysconf("SC_OPEN_MAX"))):
            os.closerange(low + 1, high)
        exec(arguments[-1], {})
    finally:
        os._exit(0)

"""Child processes that compute, forked from a server that has only imported torch and transformers.

`start(what, target, *arguments)` returns a `Child`: a process with a pipe. It starts in about 0.3 s; the imports alone
would take seconds. It has its own process-wide settings and its own peak of memory, and ends with its parent, however
the parent ends. Messages on the pipe are pickled: they stay between processes of one program on one machine.
"""

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

import psutil

from splitlearn.errors import SetupError, SplitlearnError, WorkerDied, as_error
from splitlearn.runtime import cgroups, environment, programs

ASK_TIMEOUT_S = 1.0
# What the fork server imports (330 MB), and what a worker adds before it loads weights (60 MB, the tokenizer).
IMPORTS_BYTES = 400_000_000
STOP_TIMEOUT_S = 5.0
POLL_S = 0.05
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # malloc.h
_MMAPPED_BYTES, _SPARE_BYTES = 8 << 20, 16 << 20
# What the fork server imports: what every child needs.
PRELOAD = ["splitlearn.arms.preload"]


def _context() -> ForkServerContext:
    """The fork server's context. The environment that its children inherit is set before it starts."""
    environment.set_defaults()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    with programs.as_parent():
        forkserver.ensure_running()
    return context


@dataclass(frozen=True)
class Child:
    """A child process and this end of its pipe. Methods raise WorkerDied when the other end is gone."""

    process: ForkServerProcess
    connection: Connection
    what: str

    @property
    def pid(self) -> int:
        """The process's id."""
        pid = self.process.pid
        assert pid is not None  # it was started
        return pid

    def send(self, message: object) -> None:
        """Send `message` to the child."""
        try:
            self.connection.send(message)
        except (BrokenPipeError, ConnectionResetError) as error:
            raise self.death() from error

    def receive(self) -> Any:
        """Return the child's next message; blocks until it comes."""
        try:
            return self.connection.recv()
        except (EOFError, ConnectionResetError) as error:
            raise self.death() from error

    def alive(self) -> bool:
        """True while the process runs."""
        return not self.wait(0) and runs(self.pid)

    def wait(self, timeout_s: float | None = None) -> bool:
        """Whether the process has ended, or does within `timeout_s`; None waits for it. Any thread may call it: unlike
        Process.join it does not read the exit status, which is there for one reader only."""
        return bool(wait([self.process.sentinel], timeout_s))

    def stop(self) -> None:
        """End the process: close its pipe, then terminate it, then kill it."""
        self.connection.close()
        self.process.join(ASK_TIMEOUT_S)
        self.process.terminate()
        self.process.join(STOP_TIMEOUT_S)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()

    def death(self) -> WorkerDied:
        """The error that says how the process ended."""
        self.process.join(STOP_TIMEOUT_S)
        code = self.process.exitcode
        if code == -signal.SIGKILL:
            return WorkerDied(f"{self.what} was killed, most often for want of memory ({cgroups.machine()}).")
        return WorkerDied(f"{self.what} ended unexpectedly (exit status {code}).")


@cache
def _check_room() -> None:
    """Raise SetupError if there is too little memory for the fork server, which starts with the first child."""
    have = cgroups.available_memory()
    if have < IMPORTS_BYTES:
        raise SetupError(
            f"Too little memory to start a worker process: {have / 1e9:.2f} GB can be had ({cgroups.machine()}), and "
            f"its libraries and tokenizer alone take {IMPORTS_BYTES / 1e9:.2f} GB."
        )


def start(what: str, target: Callable[..., None] | str, *arguments: object) -> Child:
    """Start `target(connection, *arguments)` in a child process. `what` names it in error messages.

    A target that only the child should import is given by its name, `module:function`. The child has this process's
    environment, but libraries that the fork server imported have read theirs. Raises SetupError if there is too little
    memory.
    """
    _check_room()
    context = _context()
    ours, theirs = context.Pipe()
    process = context.Process(target=_main, args=(target, theirs, dict(os.environ), *arguments), daemon=True)
    process.start()
    theirs.close()
    return Child(process, ours, what)


def ask(what: str, target: str, *arguments: object) -> Any:
    """What `target(connection, *arguments)` sends from a child process of its own. Raises the SplitlearnError that it
    sends in place of an answer, and what `start` and `Child.receive` raise."""
    child = start(what, target, *arguments)
    try:
        return raised(child.receive())
    finally:
        child.stop()


def stream(what: str, target: str, stop: threading.Event, *arguments: object) -> Iterator[Any]:
    """What `target(say, *arguments)` says in a child process of its own, by `say(item)`. It goes on once the next item
    is asked for. The process ends with the iterator, or when `stop` is set. Raises the target's error, and what `start`
    and `Child.receive` raise."""
    child = start(what, _say, target, what, *arguments)
    try:
        while not stop.is_set():
            if not child.connection.poll(POLL_S):
                continue
            item = raised(child.receive())
            if item is None:
                return
            yield item
            child.send(True)
    finally:
        child.stop()


def _say(connection: Connection, target: str, what: str, *arguments: object) -> None:
    def say(item: object) -> None:
        connection.send(item)
        connection.recv()

    try:
        programs.own(target)(say, *arguments)
        connection.send(None)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        raise
    except Exception as error:
        connection.send(as_error(error, f"running {what[0].lower()}{what[1:]}"))


def raised(item: Any) -> Any:
    """What a child sent, raised if it is an error."""
    if isinstance(item, SplitlearnError):
        raise item
    return item


def runs(pid: int) -> bool:
    """True while that process runs.

    A killed process stops some time before its end is reported and its pipes close: its threads end one by one, and
    the last of them closes the pipes.
    """
    try:
        return psutil.Process(pid).status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return False


def _main(
    target: Callable[..., None] | str, connection: Connection, environment: dict[str, str], *arguments: object
) -> None:
    """Run `target` in the child; end early if the parent dies."""
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        work = programs.own(target) if isinstance(target, str) else target
        work(connection, *arguments)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        # The other end is gone: there is nobody to report to.
        return


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def resident_bytes() -> int:
    """Resident memory of this process now, in bytes."""
    return int(psutil.Process().memory_info().rss)


def peak_resident_bytes() -> int:
    """The most resident memory that this process had since its start or `reset_peak` (VmHWM), in bytes.

    Not `ru_maxrss`: a child inherits its parent's. Without /proc, the memory of now.
    """
    try:
        with Path("/proc/self/status").open(encoding="ascii") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return resident_bytes()


def reset_peak() -> None:
    """Let `peak_resident_bytes` begin again at the memory of now, where the system can (Linux)."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def keep_heap_small() -> None:
    """Make all threads of this process share one heap that returns freed memory, where the C library is glibc.

    By default each computing thread gets its own heap, which keeps what it once held. With threads that take turns at
    one stage, memory would grow by the largest step with each new thread.

    Blocks above 8 MiB are returned as soon as they are freed. By default glibc comes to keep blocks of up to 32 MiB in
    the heap, where small ones soon lie between them (30 MB after 50 sessions on a tiny model). With a limit of 1 MiB,
    every operation on a prompt of some hundred tokens would get its memory from the system, page by page: a trunk took
    600 ms for 512 tokens in place of 420.
    """
    if sys.platform == "linux":
        set_option = getattr(ctypes.CDLL(None), "mallopt", None)
        if set_option is not None:
            set_option(_M_ARENA_MAX, 1)
            set_option(_M_MMAP_THRESHOLD, _MMAPPED_BYTES)
            set_option(_M_TRIM_THRESHOLD, _SPARE_BYTES)


def trim_heap() -> None:
    """Give the heap's free memory back to the system, where the C library is glibc.

    After reading a tokenizer that is 30 MB of 50. Reordering the default model's weights peaks at 1.5 GB without it and
    at 1.2 GB with it, and takes 0.2 s longer.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def default_threads() -> int:
    """One thread for each physical core that this process may use, at least one.

    Hyper-threads share the units that matrix products need. One and a half cores give one thread: of two threads on
    less than two cores, each waits at every barrier for the throttled one.
    """
    usable = cgroups.cpus()
    return max(1, int(min(psutil.cpu_count(logical=False) or usable, usable)))

"""Child processes that compute: forked from a server that has imported torch and transformers and done nothing more.

`start(target, *arguments)` gives a `Child`: a process with a pipe. It starts in about 0.3 s instead of the seconds
that the imports take, has process-wide settings and a peak of memory of its own, and ends with its parent, however the
parent ends. What crosses the pipe is pickled, between processes of one program on one machine only.
"""

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

import psutil

from splitlearn.errors import SetupError, WorkerDied
from splitlearn.runtime import cgroups, environment

ASK_TIMEOUT_S = 1.0
# What the fork server imports (270 MB), and what a worker holds before it loads weights.
IMPORTS_BYTES = 450_000_000
STOP_TIMEOUT_S = 5.0
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # malloc.h
_MMAPPED_BYTES, _SPARE_BYTES = 8 << 20, 16 << 20
# What every child needs, imported once; transformers would otherwise import its larger half on first use.
PRELOAD = [
    "splitlearn.arms.arm",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.modeling_utils",
    "transformers.convert_slow_tokenizer",
]


def _context() -> ForkServerContext:
    """The fork server's context. The environment that its children inherit is set before it starts."""
    environment.tell()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    return context


@dataclass(frozen=True)
class Child:
    """A child process and this end of its pipe. Raises WorkerDied where the other end is gone."""

    process: ForkServerProcess
    connection: Connection
    what: str

    def send(self, message: object) -> None:
        """Hand `message` over."""
        try:
            self.connection.send(message)
        except (BrokenPipeError, ConnectionResetError) as error:
            raise self.death() from error

    def receive(self) -> Any:
        """Wait for the next message."""
        try:
            return self.connection.recv()
        except (EOFError, ConnectionResetError) as error:
            raise self.death() from error

    def alive(self) -> bool:
        """True while the process runs."""
        return self.process.pid is not None and self.process.is_alive() and runs(self.process.pid)

    def stop(self) -> None:
        """End the process: asked by the closing of its pipe, then told, then killed."""
        self.connection.close()
        self.process.join(ASK_TIMEOUT_S)
        self.process.terminate()
        self.process.join(STOP_TIMEOUT_S)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()

    def death(self) -> WorkerDied:
        """What is known of how the process ended."""
        self.process.join(STOP_TIMEOUT_S)
        code = self.process.exitcode
        if code == -signal.SIGKILL:
            return WorkerDied(f"{self.what} was killed, most often for want of memory ({cgroups.machine()}).")
        return WorkerDied(f"{self.what} ended unexpectedly (exit status {code}).")


@cache
def _check_room() -> None:
    """Raise SetupError where the fork server, which the first child brings with it, would find too little memory."""
    have = cgroups.available_memory()
    if have < IMPORTS_BYTES:
        raise SetupError(
            f"Too little memory to start a worker process: {have / 1e9:.2f} GB can be had ({cgroups.machine()}), and "
            f"its libraries and tokenizer alone take {IMPORTS_BYTES / 1e9:.2f} GB."
        )


def start(what: str, target: Callable[..., None], *arguments: object) -> Child:
    """Start `target(connection, *arguments)` in a child process. `what` names it in error messages. Raises SetupError
    where there is too little memory for any."""
    _check_room()
    context = _context()
    ours, theirs = context.Pipe()
    process = context.Process(target=_main, args=(target, theirs, *arguments), daemon=True)
    process.start()
    theirs.close()
    return Child(process, ours, what)


def runs(pid: int) -> bool:
    """True while that process runs: a killed one has stopped some time before its end is reported or its pipes shut.

    Its threads end one by one, and the last of them closes the pipes.
    """
    try:
        return psutil.Process(pid).status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return False


def _main(target: Callable[..., None], connection: Connection, *arguments: object) -> None:
    """The child's life: `target`, or the parent's death, whichever comes first."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        target(connection, *arguments)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        # The other end is gone: nobody is left to tell.
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
    """The most resident memory that this process ever had (VmHWM), in bytes.

    `ru_maxrss` will not do: a child inherits its parent's. Where /proc is missing, the memory of now.
    """
    try:
        with Path("/proc/self/status").open(encoding="ascii") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return resident_bytes()


def keep_heap_small() -> None:
    """Have all threads of this process allocate from one heap that gives back what it can, where there is glibc.

    By default each thread that computes gets a heap of its own, which keeps what it once held: with threads that take
    turns at one stage, memory would grow by the largest step with each new thread. And what is larger than 8 MiB is
    given back when it is freed: the library would come to keep blocks of up to 32 MiB in the heap, where small ones
    that stay soon lie between them (30 MB after 50 sessions on a tiny model). With a limit of 1 MiB every operation on
    a prompt of some hundred tokens would get its memory from the system, page by page: a trunk took 600 ms in place of
    420 for 512 tokens.
    """
    if sys.platform == "linux":
        set_option = getattr(ctypes.CDLL(None), "mallopt", None)
        if set_option is not None:
            set_option(_M_ARENA_MAX, 1)
            set_option(_M_MMAP_THRESHOLD, _MMAPPED_BYTES)
            set_option(_M_TRIM_THRESHOLD, _SPARE_BYTES)


def trim_heap() -> None:
    """Give the heap's free memory back to the system, where the C library is glibc.

    After a tokenizer was read that is 30 MB of 50. Without it, putting the default model's weights in another order
    peaks at 1.5 GB, with it at 1.2, and takes 0.2 s longer.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def default_threads() -> int:
    """One thread for each physical core that this process may use: hyper-threads share what matrix products need.

    At least one. Of one core and a half it is one: where two threads share less than two cores, each waits at every
    barrier for the one that is held back.
    """
    usable = cgroups.cpus()
    return max(1, int(min(psutil.cpu_count(logical=False) or usable, usable)))

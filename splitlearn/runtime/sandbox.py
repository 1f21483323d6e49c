"""Child processes that run what a stranger wrote, within limits: each answers requests in JSON, one at a time.

    sandbox = Sandbox("splitlearn.checkpoints.template_program")
    reply = sandbox.ask({"op": "render", ...}, cpu_s=5.0)

A child is a small interpreter that calls `serve` of sandbox_child.py. The system ends it when a request takes more CPU
time than it may, whatever Python or C code runs; this process ends it when a request takes WALL_S. Its memory is its
own, so no other thread of this process meets a limit. One child is enough while requests are quick; while a slow one
runs, others go to a further child, up to `most`. A child that ended is replaced by a new one with the next request.
"""

import atexit
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Mapping
from typing import Any

from splitlearn.runtime import programs
from splitlearn.runtime.sandbox_child import HEADER_BYTES, as_bytes, as_message

WALL_S = 60.0
"""The longest that a request may take, the start of its child included. The limit that counts is of CPU time."""
_MOST_REPLY_BYTES = 64 << 20


class SandboxError(Exception):
    """A request went beyond a limit, or ended its child. The message is the end of a sentence that says how."""


class Sandbox:
    """At most `most` children that run the module `program`. Any thread may use it."""

    def __init__(self, program: str, most: int = 4) -> None:
        self._program = program
        self._most, self._started = most, 0
        self._places, self._lock = threading.BoundedSemaphore(most), threading.Lock()
        self._idle: list[_Child] = []
        atexit.register(self.close)
        os.register_at_fork(after_in_child=self._forget)

    def ask(self, request: Mapping[str, Any], cpu_s: float) -> dict[str, Any]:
        """The reply to `request`, which may take `cpu_s` of CPU time. Raises SandboxError."""
        with self._places:
            child = self._take() or self._start()
            try:
                reply = child.ask({**request, "cpu_s": cpu_s}, cpu_s)
            except BaseException:
                child.kill()
                raise
            if reply.get("last"):
                child.kill()
            else:
                self._give_back(child)
            return reply

    def prepare(self) -> None:
        """Start a child unless there is one, without waiting for it: its imports take a tenth of a second."""
        with self._places:
            self._give_back(self._take() or self._start())

    def close(self) -> None:
        """End the children that are idle."""
        with self._lock:
            children, self._idle = self._idle, []
        for child in children:
            child.kill()

    def _start(self) -> "_Child":
        with self._lock:
            self._started += 1
            number = self._started
        return _Child(self._program, number)

    def _take(self) -> "_Child | None":
        """The oldest idle child: it has most of what readers need."""
        with self._lock:
            while self._idle:
                child = self._idle.pop(0)
                if child.runs():
                    return child
                child.kill()
        return None

    def _give_back(self, child: "_Child") -> None:
        with self._lock:
            self._idle = sorted([*self._idle, child], key=lambda each: each.number)

    def _forget(self) -> None:
        """In a fork of this process: the children are the parent's."""
        self._places, self._lock = threading.BoundedSemaphore(self._most), threading.Lock()
        for child in self._idle:
            child.socket.close()
        self._idle = []


class _Child:
    """A process and this end of its socket."""

    def __init__(self, program: str, number: int) -> None:
        self.number = number
        self.socket, theirs = socket.socketpair()
        with theirs:
            try:
                # A session of its own: what a terminal sends to this process's group, such as Ctrl-C, is not for it.
                self._process = subprocess.Popen(
                    programs.command(program), stdin=theirs.fileno(), env=programs.environment(), start_new_session=True
                )
            except OSError as error:
                self.socket.close()
                raise SandboxError(f"cannot be run: no process can be started for it ({error.strerror})") from error

    def runs(self) -> bool:
        return self._process.poll() is None

    def kill(self) -> None:
        self.socket.close()
        self._process.kill()
        self._process.wait()

    def ask(self, request: Mapping[str, Any], cpu_s: float) -> dict[str, Any]:
        """The reply. Raises SandboxError; the child is of no use then."""
        until = time.monotonic() + WALL_S
        data = as_bytes(request)
        try:
            self.socket.settimeout(WALL_S)
            self.socket.sendall(data)
            size = int.from_bytes(self._read(HEADER_BYTES, until))
            if size > _MOST_REPLY_BYTES + 16 * len(data):
                raise SandboxError("answers with too much")
            return as_message(self._read(size, until))
        except TimeoutError as error:
            raise SandboxError(f"takes more than {WALL_S:g} s") from error
        except (EOFError, BrokenPipeError, ConnectionResetError) as error:
            raise SandboxError(self._end(cpu_s)) from error

    def _read(self, size: int, until: float) -> bytes:
        found = bytearray()
        while len(found) < size:
            self.socket.settimeout(max(0.001, until - time.monotonic()))
            part = self.socket.recv(min(size - len(found), 1 << 20))
            if not part:
                raise EOFError
            found += part
        return bytes(found)

    def _end(self, cpu_s: float) -> str:
        code = self._process.wait()
        if code == -signal.SIGPROF:
            return f"takes more than {cpu_s:g} s of CPU time"
        return f"ends the process that runs it (exit status {code})"

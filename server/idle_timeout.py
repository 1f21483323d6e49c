"""Ends a call with DEADLINE_EXCEEDED if its client is silent for too long.

A call holds a thread, and a session holds KV memory. A client that sends nothing, or does not read its answers, must
not keep them. The server's own time for an answer does not count.
"""

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc

from splitlearn.runtime import private_apis
from splitlearn.runtime.watchdog import Watchdog

LOOK_S = 0.25
NEVER = float("inf")
Send = Callable[[bytes | None], None]
"""Sends an answer of a call, or with None its status."""


class IdleTimeout:
    """Watches calls: a client has `open_s` to send its first message, and `idle_s` to send the next one or to read an
    answer."""

    def __init__(self, open_s: float, idle_s: float) -> None:
        self.open_s, self.idle_s = open_s, idle_s
        self._watchdog = Watchdog(LOOK_S)

    def watch(self, context: grpc.ServicerContext, timed_out: Callable[[str], None], send: Send) -> "WatchedCall":
        """Watch a call until it ends; `send` sends its answers. A timeout calls `timed_out` with the cause,
        "not_opened" or "idle"."""
        call = WatchedCall(self, context, timed_out, send)
        self._watchdog.watch(call)
        if not context.add_callback(lambda: self._watchdog.drop(call)):
            self._watchdog.drop(call)
        return call


class WatchedCall:
    """A call whose client must send its next message by `read_by` and read the current answer by `written_by`.

    Both are seconds of time.monotonic(). `opened`: the first message has arrived. `in_parts`: a step is incomplete; all
    its parts share the time of one message. `timed_out` may be replaced.
    """

    def __init__(
        self, limits: IdleTimeout, context: grpc.ServicerContext, timed_out: Callable[[str], None], send: Send
    ) -> None:
        self._limits, self.timed_out = limits, timed_out
        self._context: Any = context
        self._send, self._sending = send, threading.Lock()
        self._reading, self._pause_s, self._late = False, limits.idle_s, self._silent(limits.idle_s, "idle_s")
        self.opened, self.in_parts = False, False
        self.read_by, self.written_by = time.monotonic() + limits.open_s, NEVER

    def due_s(self) -> float:
        """The earlier of `read_by` and `written_by`."""
        return min(self.read_by, self.written_by)

    def requests(self, requests: Iterator[bytes]) -> Iterator[bytes]:
        """Pass the client's messages on, each under its deadline."""
        left_s = self._limits.open_s
        while True:
            if self.opened and not self.in_parts:
                left_s = self._pause_s
            began = time.monotonic()
            if self.opened:
                self.read_by, self._reading = began + left_s, True
            try:
                message = next(requests, None)
            finally:
                self.read_by, self._reading = NEVER, False
            if message is None:
                return
            left_s -= time.monotonic() - began
            self.opened = True
            yield message

    def send(self, answer: bytes) -> None:
        """Send an answer, which the client must read within `idle_s`. Any thread may call it."""
        with self._sending:
            self.written_by = time.monotonic() + self._limits.idle_s
            self._send(answer)
            self.written_by = NEVER

    def wait_for(self, pause_s: float, late: str | None = None) -> None:
        """Let pauses between messages be `pause_s` long from now on, the present one, too. `late` is what the client is
        told after a longer one. Any thread may call it."""
        self._pause_s, self._late = pause_s, late or self._silent(pause_s, "idle_s")
        if self._reading:
            self.read_by = time.monotonic() + pause_s

    def overdue(self) -> None:
        """End the call because its client was silent for too long."""
        self._end(self._late if self.opened else self._silent(self._limits.open_s, "open_s"))

    def give_up(self) -> None:
        """End the call before its first message, since another call needs its thread."""
        self._end("the client has sent no message yet, and another call needs its thread")

    @staticmethod
    def _silent(seconds: float, setting: str) -> str:
        return f"the client was silent for {seconds:g} s (server.{setting})"

    def _end(self, details: str) -> None:
        self.timed_out("idle" if self.opened else "not_opened")
        private_apis.end_call(self._context, grpc.StatusCode.DEADLINE_EXCEEDED, details)

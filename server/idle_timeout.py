"""Ends calls whose client is silent for too long, with a status that says so.

A call holds a thread, and a session KV memory. A client that sends no message, or does not take its answers, must not
keep them. Time that the server itself takes for an answer does not count.
"""

import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc

from splitlearn.runtime import private_apis
from splitlearn.runtime.watchdog import Watchdog

LOOK_S = 0.25
NEVER = float("inf")


class IdleTimeout:
    """Watches calls: `open_s` for the first message; `idle_s` for each later one, and for an answer to be taken."""

    def __init__(self, open_s: float, idle_s: float) -> None:
        self.open_s, self.idle_s = open_s, idle_s
        self._watchdog = Watchdog(LOOK_S)

    def watch(self, context: grpc.ServicerContext, timed_out: Callable[[str], None]) -> "WatchedCall":
        """Watch a call until it ends. `timed_out` is told the cause, "not_opened" or "idle"."""
        call = WatchedCall(self, context, timed_out)
        self._watchdog.watch(call)
        if not context.add_callback(lambda: self._watchdog.drop(call)):
            self._watchdog.drop(call)
        return call


class WatchedCall:
    """One call, whose client must have sent something by `read_by` and taken something by `written_by`.

    `opened`: its first message is there. `in_parts`: more parts of a step are to come; all of them must come within the
    time of one message. `timed_out` may be replaced.
    """

    def __init__(self, limits: IdleTimeout, context: grpc.ServicerContext, timed_out: Callable[[str], None]) -> None:
        self._limits, self.timed_out = limits, timed_out
        self._context: Any = context
        self.opened, self.in_parts = False, False
        self.read_by, self.written_by = time.monotonic() + limits.open_s, NEVER

    def due_s(self) -> float:
        """The earlier of the two."""
        return min(self.read_by, self.written_by)

    def requests(self, requests: Iterator[bytes]) -> Iterator[bytes]:
        """The same messages, each with its deadline."""
        left_s = self._limits.open_s
        while True:
            if self.opened and not self.in_parts:
                left_s = self._limits.idle_s
            began = time.monotonic()
            if self.opened:
                self.read_by = began + left_s
            try:
                message = next(requests, None)
            finally:
                self.read_by = NEVER
            if message is None:
                return
            left_s -= time.monotonic() - began
            self.opened = True
            yield message

    def answers(self, answers: Iterator[bytes]) -> Iterator[bytes]:
        """The same messages, each to be taken within `idle_s`."""
        for answer in answers:
            self.written_by = time.monotonic() + self._limits.idle_s
            yield answer
            self.written_by = NEVER

    def overdue(self) -> None:
        """End the call: its client was silent for too long."""
        limits = self._limits
        waited = f"{limits.idle_s:g} s (server.idle_s)" if self.opened else f"{limits.open_s:g} s (server.open_s)"
        self._end(f"nothing was heard of the client for {waited}")

    def give_up(self) -> None:
        """End the call, whose first message has not come: another call needs its thread."""
        self._end("the client sent no message yet, and other calls need the place")

    def _end(self, details: str) -> None:
        """End the call with DEADLINE_EXCEEDED."""
        self.timed_out("idle" if self.opened else "not_opened")
        private_apis.end_call(self._context, grpc.StatusCode.DEADLINE_EXCEEDED, details)

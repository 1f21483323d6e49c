"""Ends calls whose client is silent for too long, with a status that says so.

A call holds a thread, and a session KV memory: one that sends no message, brings no step, or does not take its answers
must not keep them. What the server itself takes for an answer does not count.
"""

import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc

from splitlearn.runtime import private_apis
from splitlearn.runtime.watchdog import Watchdog

LOOK_S = 0.25
NEVER = float("inf")


class Patience:
    """Watches calls: `open_s` for the first message, `idle_s` for each after it and for an answer to be taken."""

    def __init__(self, open_s: float, idle_s: float) -> None:
        self.open_s, self.idle_s = open_s, idle_s
        self._watchdog = Watchdog(LOOK_S)

    def watch(self, context: grpc.ServicerContext, late: Callable[[str], None]) -> "Call":
        """Watch a call until it ends; `late` is told not_opened or idle when its client is too late."""
        call = Call(self, context, late)
        self._watchdog.watch(call)
        if not context.add_callback(lambda: self._watchdog.drop(call)):
            self._watchdog.drop(call)
        return call


class Call:
    """One call. `read_by` and `written_by` are the moments by which its client must have sent, and taken, something.

    `opened` is true once its first message is there, for which it is waited from its beginning on. `late` may be set.
    `in_parts` is true while more parts of a step are to come: all of them must come within the time of one message.
    """

    def __init__(self, patience: Patience, context: grpc.ServicerContext, late: Callable[[str], None]) -> None:
        self._patience, self.late = patience, late
        self._context: Any = context
        self.opened, self.in_parts = False, False
        self.read_by, self.written_by = time.monotonic() + patience.open_s, NEVER

    def due_s(self) -> float:
        """Whichever of the two comes first."""
        return min(self.read_by, self.written_by)

    def requests(self, requests: Iterator[bytes]) -> Iterator[bytes]:
        """The same messages, each waited for only so long."""
        left_s = self._patience.open_s
        while True:
            if self.opened and not self.in_parts:
                left_s = self._patience.idle_s
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
        """The same messages, each to be taken within so long."""
        for answer in answers:
            self.written_by = time.monotonic() + self._patience.idle_s
            yield answer
            self.written_by = NEVER

    def overdue(self) -> None:
        """End the call: its client was waited for as long as it may be."""
        limits = self._patience
        waited = f"{limits.idle_s:g} s (server.idle_s)" if self.opened else f"{limits.open_s:g} s (server.open_s)"
        self._end(f"nothing was heard of the client for {waited}")

    def give_up(self) -> None:
        """End the call, whose first message is not there yet: its place is needed."""
        self._end("the client sent no message yet, and other calls need the place")

    def _end(self, said: str) -> None:
        """End the call with DEADLINE_EXCEEDED."""
        self.late("idle" if self.opened else "not_opened")
        private_apis.end_call(self._context, grpc.StatusCode.DEADLINE_EXCEEDED, said)

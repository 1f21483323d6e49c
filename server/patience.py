"""Ends calls whose client is silent for too long, with a status that says so.

A session holds a thread and KV memory: one that sends no Open, brings no step, or does not take its answers must not
keep them. What the server itself takes for an answer does not count.
"""

import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc

from splitlearn.watchdog import Watchdog

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
    """One call. `read_by` and `written_by` are the moments by which its client must have sent, and taken, something."""

    def __init__(self, patience: Patience, context: grpc.ServicerContext, late: Callable[[str], None]) -> None:
        self._patience, self._late = patience, late
        self._context: Any = context
        self._opened = False
        self.read_by = self.written_by = NEVER

    def due_s(self) -> float:
        """Whichever of the two comes first."""
        return min(self.read_by, self.written_by)

    def requests(self, requests: Iterator[bytes]) -> Iterator[bytes]:
        """The same messages, each waited for only so long."""
        wait_s = self._patience.open_s
        while True:
            self.read_by = time.monotonic() + wait_s
            try:
                message = next(requests, None)
            finally:
                self.read_by = NEVER
            if message is None:
                return
            self._opened = True
            yield message
            wait_s = self._patience.idle_s

    def answers(self, answers: Iterator[bytes]) -> Iterator[bytes]:
        """The same messages, each to be taken within so long."""
        for answer in answers:
            self.written_by = time.monotonic() + self._patience.idle_s
            yield answer
            self.written_by = NEVER

    def overdue(self) -> None:
        """End the call with DEADLINE_EXCEEDED.

        Of gRPC's public ways to end a call, one is for the handler's own thread, which is the one that waits here, and
        the other gives no reason.
        """
        limits = self._patience
        waited = f"{limits.idle_s:g} s (server.idle_s)" if self._opened else f"{limits.open_s:g} s (server.open_s)"
        said = f"nothing was heard of the client for {waited}"
        self._late("idle" if self._opened else "not_opened")
        self._context._rpc_event.call.cancel(grpc.StatusCode.DEADLINE_EXCEEDED.value[0], said)

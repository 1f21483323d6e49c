"""Logs and counts one call of Session: its messages, its steps and how it ended.

A message is counted after it was passed on, so that no client waits for the counting.
"""

import itertools
import logging
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from urllib.parse import unquote

import grpc
import prometheus_client

from server.monitoring import logs
from server.monitoring.metrics import End, Metrics, TokenKind, cause_of
from splitlearn.errors import SplitlearnError
from splitlearn.wire.status import code_of

log = logging.getLogger(__name__)
_numbers = itertools.count(1)


class CallLog:
    """The log of one call. The end is logged once, with the last cause that was set."""

    def __init__(self, metrics: Metrics, context: grpc.ServicerContext) -> None:
        self._metrics, self._context = metrics, context
        self._labels = {"session": next(_numbers), "peer": peer(context)}
        self._lock = threading.Lock()
        self._opened: float | None = None
        self._proxied = False
        self._ended = False
        self._end: End = "gone"
        self._cause: str | None = None
        self._counts = Counter(tokens_in=0, tokens_out=0, bytes_in=0, bytes_out=0)

    def received(self, requests: Iterator[bytes]) -> Iterator[bytes]:
        """Pass the client's messages on and count them."""
        yield from self._counted(requests, "bytes_in", self._metrics.received_bytes)
        self._end = "done"  # the client has closed its side

    def sent(self, answers: Iterator[bytes]) -> Iterator[bytes]:
        """Pass the server's messages on and count them."""
        yield from self._counted(answers, "bytes_out", self._metrics.sent_bytes)

    def _counted(self, messages: Iterator[bytes], name: str, metric: prometheus_client.Counter) -> Iterator[bytes]:
        for message in messages:
            yield message
            self._counts[name] += len(message)
            metric.inc(len(message))

    def opened(self, waited_s: float) -> None:
        """Record that the session was admitted, after it had waited for `waited_s`."""
        self._opened = time.perf_counter()
        self._metrics.opened(waited_s)
        logs.info(log, "session opened", **self._labels, waited_ms=round(waited_s * 1e3))

    def proxied(self, answers: Iterator[bytes]) -> Iterator[bytes]:
        """Pass a variant's answers on. The variant counts the session's tokens itself."""
        for answer in answers:
            if self._opened is None:
                self._opened, self._proxied = time.perf_counter(), True
                logs.info(log, "session proxied", **self._labels)
            yield answer

    def stepped(self, kinds: Mapping[TokenKind, int], tokens: int, answered: int, waited_s: float) -> None:
        """Record a computed step of `tokens`, of which `answered` positions were sent back."""
        self._metrics.stepped(kinds, waited_s)
        self._counts["tokens_in"] += tokens
        self._counts["tokens_out"] += answered

    def refused(self, error: SplitlearnError) -> None:
        """Record that the call fails with `error`, unless the client has gone already."""
        if not self._context.is_active():
            return
        cause, code = cause_of(error), code_of(error).name
        if cause == "failed":
            logs.failed(log, "session failed", error, **self._labels, code=code)
            self._refuse("failed", cause, code)
        else:
            self._refuse("refused", cause, code)

    def timed_out(self, cause: str) -> None:
        """Record that the client was silent for too long."""
        self._refuse("refused", cause, "DEADLINE_EXCEEDED")

    def _refuse(self, end: End, cause: str, code: str) -> None:
        self._end, self._cause = end, cause
        self._metrics.refused(cause, code)
        if end == "refused":
            logs.refused(log, **self._labels, cause=cause, code=code)

    def end(self) -> None:
        """Record the end of the call. Further calls do nothing."""
        with self._lock:
            already, self._ended = self._ended, True
        if already or self._opened is None:
            return
        fields: dict[str, object] = {"lasted_ms": round((time.perf_counter() - self._opened) * 1e3), **self._counts}
        if self._proxied:
            del fields["tokens_in"], fields["tokens_out"]
        else:
            self._metrics.closed(self._end)
            fields["end"] = self._end
        if self._cause:
            fields["cause"] = self._cause
        logs.info(log, "session closed", **self._labels, **fields)


def peer(context: grpc.ServicerContext) -> str:
    """The client's address without its port."""
    kind, _, address = unquote(context.peer()).partition(":")
    return address.rpartition(":")[0].strip("[]") if kind in ("ipv4", "ipv6") else kind

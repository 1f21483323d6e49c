"""One call of Session, as it is counted and logged: what came, what went, and how it ended.

Counting waits until an answer is on its way, so that no client waits for it.
"""

import itertools
import logging
import threading
import time
from collections.abc import Iterator
from urllib.parse import unquote

import grpc

from server.monitoring import logs
from server.monitoring.metrics import End, Kind, Metrics, cause_of
from splitlearn.errors import SplitlearnError
from splitlearn.wire.status import code_of

log = logging.getLogger(__name__)
_numbers = itertools.count(1)


class Visit:
    """A call that is under way. It ends once, with the first word that is said of its end."""

    def __init__(self, metrics: Metrics, context: grpc.ServicerContext) -> None:
        self._metrics, self._context = metrics, context
        self._number, self._peer = next(_numbers), peer(context)
        self._lock = threading.Lock()
        self._opened: float | None = None
        self._over = False
        self._elsewhere = False
        self._end: End = "gone"
        self._cause: str | None = None
        self._length = self._tokens_in = self._tokens_out = self._bytes_in = self._bytes_out = 0

    def received(self, requests: Iterator[bytes]) -> Iterator[bytes]:
        """The same messages, counted."""
        for message in requests:
            yield message
            self._bytes_in += len(message)
            self._metrics.received_bytes.inc(len(message))
        self._end = "done"  # the client says that it sends no more

    def sent(self, answers: Iterator[bytes]) -> Iterator[bytes]:
        """The same messages, counted."""
        for message in answers:
            yield message
            self._bytes_out += len(message)
            self._metrics.sent_bytes.inc(len(message))

    def opened(self, waited_s: float) -> None:
        """The session was let in."""
        self._opened = time.perf_counter()
        self._metrics.opened(waited_s)
        logs.tell(log, "session opened", **self._who, waited_ms=round(waited_s * 1e3))

    def handed_on(self, answers: Iterator[bytes]) -> Iterator[bytes]:
        """The same messages, from another server of this machine, which counts the session."""
        for answer in answers:
            if self._opened is None:
                self._opened, self._elsewhere = time.perf_counter(), True
                logs.tell(log, "session handed on", **self._who)
            yield answer

    def branched(self, tokens: int) -> None:
        """The session begins with `tokens` of another one's."""
        self._length = tokens

    def stepped(self, tokens: int, answered: int, recomputes: bool, waited_s: float) -> None:
        """A step of `tokens` is computed, of which the client wants `answered`.

        What it does not want it had before, from a trunk that it lost; and a session without a cache brings all its
        tokens again in each step.
        """
        known = min(self._length, tokens) if recomputes else tokens - answered
        kind: Kind = "decode" if self._length or known else "prompt"
        self._metrics.stepped({"replay": known, kind: tokens - known} if known else {kind: tokens}, waited_s)
        self._length = tokens if recomputes else self._length + tokens
        self._tokens_in += tokens
        self._tokens_out += answered

    def refused(self, error: SplitlearnError) -> None:
        """What the client asked for or sent is refused, or failed; unless the client is there no more to hear it."""
        if not self._context.is_active():
            return
        cause = cause_of(error)
        self._end, self._cause = ("failed" if cause == "failed" else "refused"), cause
        code = code_of(error).name
        self._metrics.refused(cause, code)
        if cause == "failed":
            logs.failed(log, "session failed", error, **self._who, code=code)
        else:
            logs.refused(log, **self._who, cause=cause, code=code)

    def silent(self, cause: str) -> None:
        """The client was waited for in vain."""
        self._end, self._cause = "refused", cause
        self._metrics.refused(cause)
        logs.refused(log, **self._who, cause=cause, code="DEADLINE_EXCEEDED")

    def over(self) -> None:
        """The call has ended; said again, it changes nothing."""
        with self._lock:
            before, self._over = self._over, True
        if before or self._opened is None:
            return
        fields: dict[str, object] = {"lasted_ms": round((time.perf_counter() - self._opened) * 1e3)}
        if not self._elsewhere:
            self._metrics.closed(self._end)
            fields |= {"end": self._end, "tokens_in": self._tokens_in, "tokens_out": self._tokens_out}
        if self._cause:
            fields["cause"] = self._cause
        logs.tell(log, "session closed", **self._who, **fields, bytes_in=self._bytes_in, bytes_out=self._bytes_out)

    @property
    def _who(self) -> dict[str, object]:
        return {"session": self._number, "peer": self._peer}


def peer(context: grpc.ServicerContext) -> str:
    """The client's address without its port."""
    kind, _, address = unquote(context.peer()).partition(":")
    return address.rpartition(":")[0].strip("[]") if kind in ("ipv4", "ipv6") else kind

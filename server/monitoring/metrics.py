"""What this server counts, in Prometheus' terms, in a registry of its own (docs/server-metrics.md lists it).

Counters and histograms are written where something happens, in about a microsecond each; gauges are read when somebody
asks. Labels are words from fixed sets: nothing that a client sends becomes part of a name or a label.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Info,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)

from splitlearn.errors import InputError, SplitlearnError, TrunkDenied, TrunkFull, TrunkRefused, TrunkUnavailable

PREFIX = "splitlearn_trunk_"
End = Literal["done", "gone", "refused", "failed"]
ENDS: dict[End, str] = {
    "done": "its client ended it",
    "gone": "its client broke off or was lost",
    "refused": "its client sent something wrong, or was silent for too long",
    "failed": "this server broke",
}
# Each cause of a refusal: the gRPC code that the client sees, and what it means.
REFUSALS: dict[str, tuple[str, str]] = {
    "denied": ("UNAUTHENTICATED", "no valid token was shown"),
    "token_sessions": ("RESOURCE_EXHAUSTED", "the token has as many sessions open as it may"),
    "token_rate": ("RESOURCE_EXHAUSTED", "a step is over the token's rate"),
    "mismatch": ("FAILED_PRECONDITION", "the client asks for another model, range, dtype or protocol, or for a flag"),
    "queue_full": ("RESOURCE_EXHAUSTED", "there is no room, and the queue is full"),
    "queue_timeout": ("RESOURCE_EXHAUSTED", "a session waited in the queue for as long as its client allows"),
    "variants_full": (
        "RESOURCE_EXHAUSTED",
        "no place, memory or time for a server with other load and process flags",
    ),
    "calls_full": ("RESOURCE_EXHAUSTED", "the limit of calls at once is reached, of the client or of all"),
    "draining": ("UNAVAILABLE", "this server is shutting down"),
    "branch_lost": ("ABORTED", "the session that another is to fork is gone"),
    "step_late": ("DEADLINE_EXCEEDED", "a step waited for longer than its client allows"),
    "not_opened": ("DEADLINE_EXCEEDED", "a call's first message did not come in time, or others needed its place"),
    "idle": ("DEADLINE_EXCEEDED", "a session's client was silent for too long"),
    "length": ("INVALID_ARGUMENT", "a session asks for more tokens than the limit"),
    "flags": ("INVALID_ARGUMENT", "flags that do not exist or exclude each other"),
    "message": ("INVALID_ARGUMENT", "a message that cannot be read, or of another kind than expected"),
    "tensor": ("INVALID_ARGUMENT", "a tensor of the wrong dtype, shape or size, or with a NaN or an Inf"),
    "position": ("INVALID_ARGUMENT", "a step that does not follow, or goes over the session's length"),
    "other": ("INVALID_ARGUMENT", "any other value that cannot be used"),
    "failed": ("INTERNAL", "this server broke"),
}
_BY_FIELD = {"max_length": "length", **{name: name for name in ("flags", "message", "tensor", "position")}}
TokenKind = Literal["prompt", "decode", "replay"]
KINDS: tuple[TokenKind, ...] = ("prompt", "decode", "replay")
# From half a millisecond to ten seconds, each half as much again as the one before.
DURATIONS = [round(5e-4 * 1.5**n, 6) for n in range(25)]
WAITS = [0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0]
SIZES = [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 128, 256, 512]
GAUGES = {
    "sessions": "Sessions that are open.",
    "sessions_limit": "Sessions that may be open at once.",
    "sessions_waiting": "Sessions that wait for room.",
    "sessions_waiting_limit": "Sessions that may wait for room.",
    "sessions_proxied": "Sessions proxied to servers with other load and process flags.",
    "steps_waiting": "Steps of open sessions that wait for a forward.",
    "kv_blocks_used": "Blocks of KV memory that sessions have.",
    "kv_blocks": "Blocks of KV memory.",
}
# One more series for each counter, with the time when it began, that nothing here reads.
disable_created_metrics()  # type: ignore[no-untyped-call]


class Metrics:
    """One server's counts."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self._build = Info(f"{PREFIX}build", "What is served, and by which versions.", registry=self.registry)
        self._opened = self._counter("sessions_opened", "Sessions that were admitted.")
        self._closed = self._counter("sessions_closed", "Sessions that ended, by cause.", "cause")
        self._refusals = self._counter("refusals", "Calls and sessions that were refused.", "code", "cause")
        self._tokens = self._counter("tokens", "Tokens computed; a replay's are those known to its client.", "kind")
        self.received_bytes = self._counter("received_bytes", "Bytes of sessions' messages from clients.")
        self.sent_bytes = self._counter("sent_bytes", "Bytes of sessions' messages to clients.")
        self._session_wait = self._histogram("session_wait_seconds", "How long sessions waited for admission.", WAITS)
        self._step_wait = self._histogram("step_wait_seconds", "How long steps waited for their forwards.", DURATIONS)
        self._forward = self._histogram("forward_seconds", "How long forwards took.", DURATIONS)
        self._batch = self._histogram("forward_sessions", "Sessions that shared a forward.", SIZES)
        # Every series exists from the start: otherwise Prometheus does not see its first count as an increase.
        self._by_end = {end: self._closed.labels(end) for end in ENDS}
        for cause, (code, _) in REFUSALS.items():
            self._refusals.labels(code, cause)
        self._by_kind = {kind: self._tokens.labels(kind) for kind in KINDS}

    def _counter(self, name: str, said: str, *labels: str) -> Counter:
        return Counter(PREFIX + name, said, labels, registry=self.registry)

    def _histogram(self, name: str, said: str, buckets: Sequence[float]) -> Histogram:
        return Histogram(PREFIX + name, said, buckets=buckets, registry=self.registry)

    def show(self, read: Mapping[str, Callable[[], float]], build: Mapping[str, str]) -> None:
        """Connect each of GAUGES to a function that reads it, and set the build info."""
        for name, said in GAUGES.items():
            Gauge(PREFIX + name, said, registry=self.registry).set_function(read[name])
        self._build.info(dict(build))

    def forward(self, sessions: int, seconds: float) -> None:
        """A forward of so many sessions took so long."""
        self._forward.observe(seconds)
        self._batch.observe(sessions)

    def opened(self, waited_s: float) -> None:
        """A session was admitted."""
        self._opened.inc()
        self._session_wait.observe(waited_s)

    def stepped(self, tokens: Mapping[TokenKind, int], waited_s: float) -> None:
        """A session's step is answered."""
        for kind, count in tokens.items():
            self._by_kind[kind].inc(count)
        self._step_wait.observe(waited_s)

    def closed(self, end: End) -> None:
        """An admitted session has ended."""
        self._by_end[end].inc()

    def refused(self, cause: str, code: str = "") -> None:
        """Something was refused for one of REFUSALS; `code` where it is not the usual one."""
        self._refusals.labels(code or REFUSALS[cause][0], cause).inc()

    def text(self) -> str:
        """All metrics, in Prometheus' text format."""
        return generate_latest(self.registry).decode()


def cause_of(error: SplitlearnError) -> str:
    """Which of REFUSALS `error` is."""
    if isinstance(error, InputError):
        return _BY_FIELD.get(error.field.partition(".")[0].partition(":")[0], "other")
    if isinstance(error, TrunkDenied | TrunkRefused):
        return "denied" if isinstance(error, TrunkDenied) else "mismatch"
    if isinstance(error, TrunkFull | TrunkUnavailable):
        return error.cause if error.cause in REFUSALS else "other"
    return "failed"

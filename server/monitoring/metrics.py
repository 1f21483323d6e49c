"""The server's Prometheus metrics, in a registry of their own (docs/server-metrics.md lists them).

Counters and histograms are updated where an event happens, in about a microsecond each. Gauges are read when metrics
are collected. Labels come from fixed sets: nothing that a client sends becomes part of a name or a label.
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

from server.step_times import StepTimes
from splitlearn.errors import (
    InputError,
    SplitlearnError,
    TrunkDenied,
    TrunkError,
    TrunkFull,
    TrunkRefused,
    TrunkUnavailable,
)

PREFIX = "splitlearn_trunk_"
End = Literal["done", "gone", "refused", "failed"]
ENDS: dict[End, str] = {
    "done": "the client ended it",
    "gone": "the client cancelled it or was lost",
    "refused": "the client sent an invalid message or was silent for too long, or another server of its chain was lost",
    "failed": "an error in this server",
}
# Each cause of a refusal: the gRPC code that the client sees, and what it means.
REFUSALS: dict[str, tuple[str, str]] = {
    "denied": ("UNAUTHENTICATED", "the call has no valid token"),
    "token_sessions": ("RESOURCE_EXHAUSTED", "the token's limit of open sessions is reached"),
    "token_rate": ("RESOURCE_EXHAUSTED", "a step is over the token's rate"),
    "mismatch": ("FAILED_PRECONDITION", "another model, range, dtype or protocol, or a flag that is unavailable"),
    "queue_full": ("RESOURCE_EXHAUSTED", "there is no room, and the queue is full"),
    "queue_timeout": ("RESOURCE_EXHAUSTED", "a session's own timeout in the queue ran out"),
    "variants_full": (
        "RESOURCE_EXHAUSTED",
        "no place, memory or time for a server with other load and process flags",
    ),
    "calls_full": ("RESOURCE_EXHAUSTED", "the limit of concurrent calls is reached, for the client or in total"),
    "draining": ("UNAVAILABLE", "this server is shutting down"),
    "branch_lost": ("ABORTED", "the session to fork is gone"),
    "forward": ("FAILED_PRECONDITION", "answers were to go to a server that server.forward_to does not list"),
    "feed": ("ABORTED", "a feed of a session that is gone or has a feed already"),
    "feed_lost": ("UNAVAILABLE", "the server before in a chain ended a session's feed, or was lost"),
    "next_server": ("UNAVAILABLE", "the next server in a chain refused a session's feed, failed or was lost"),
    "step_late": ("DEADLINE_EXCEEDED", "a step waited longer than its client's timeout"),
    "not_opened": ("DEADLINE_EXCEEDED", "a call's first message was late, or another call needed its thread"),
    "idle": ("DEADLINE_EXCEEDED", "a session's client or its feed was silent for too long"),
    "length": ("INVALID_ARGUMENT", "a session of more tokens than the limit"),
    "flags": ("INVALID_ARGUMENT", "flags that do not exist or exclude each other"),
    "message": ("INVALID_ARGUMENT", "a malformed message, or one of an unexpected kind"),
    "tensor": ("INVALID_ARGUMENT", "a tensor of the wrong dtype, shape or size, or with a NaN or an Inf"),
    "position": ("INVALID_ARGUMENT", "a step at an unexpected position, or beyond the session's length"),
    "other": ("INVALID_ARGUMENT", "any other invalid value"),
    "failed": ("INTERNAL", "an error in this server"),
}
_BY_FIELD = {"max_length": "length", **{name: name for name in ("flags", "message", "tensor", "position")}}
TokenKind = Literal["prompt", "decode", "replay"]
KINDS: tuple[TokenKind, ...] = ("prompt", "decode", "replay")
# Bounds of buckets in seconds: 0.5 ms to 8.4 s, each 1.5 times the one before.
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
# Otherwise each counter has a second series, with its time of creation, which nothing here reads.
disable_created_metrics()  # type: ignore[no-untyped-call]


class Metrics:
    """The metrics of one server."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.step_times = StepTimes()
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

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(PREFIX + name, text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: Sequence[float]) -> Histogram:
        return Histogram(PREFIX + name, text, buckets=buckets, registry=self.registry)

    def show(self, read: Mapping[str, Callable[[], float]], build: Mapping[str, str]) -> None:
        """Connect each of GAUGES to a function that reads it, and set the build info."""
        for name, text in GAUGES.items():
            Gauge(PREFIX + name, text, registry=self.registry).set_function(read[name])
        self._build.info(dict(build))

    def forward(self, sessions: int, tokens: int, seconds: float) -> None:
        """Record a forward, its number of sessions, their tokens and its duration."""
        self.step_times.note(sessions, tokens, seconds)
        self._forward.observe(seconds)
        self._batch.observe(sessions)

    def opened(self, waited_s: float) -> None:
        """Record an admitted session."""
        self._opened.inc()
        self._session_wait.observe(waited_s)

    def stepped(self, tokens: Mapping[TokenKind, int], waited_s: float) -> None:
        """Record an answered step of a session."""
        for kind, count in tokens.items():
            self._by_kind[kind].inc(count)
        self._step_wait.observe(waited_s)

    def closed(self, end: End) -> None:
        """Record the end of an admitted session."""
        self._by_end[end].inc()

    def refused(self, cause: str, code: str = "") -> None:
        """Record a refusal. `cause` is a key of REFUSALS; `code` replaces its usual code."""
        self._refusals.labels(code or REFUSALS[cause][0], cause).inc()

    def text(self) -> str:
        """All metrics, in Prometheus' text format."""
        return generate_latest(self.registry).decode()


def cause_of(error: SplitlearnError) -> str:
    """The key of REFUSALS for `error`."""
    if isinstance(error, InputError):
        return _BY_FIELD.get(error.field.partition(".")[0].partition(":")[0], "other")
    if isinstance(error, TrunkError) and error.cause in REFUSALS:
        return error.cause
    if isinstance(error, TrunkDenied | TrunkRefused):
        return "denied" if isinstance(error, TrunkDenied) else "mismatch"
    return "other" if isinstance(error, TrunkFull | TrunkUnavailable) else "failed"

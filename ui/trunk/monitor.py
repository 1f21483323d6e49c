"""Snapshots of the trunk over the last two minutes, and the figures computed from them, for the Server tab."""

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from prometheus_client.parser import text_string_to_metric_families

from splitlearn.arms.runs import Runs
from splitlearn.client.hop import Hop
from splitlearn.client.probe import Snapshot, TrunkProbe
from splitlearn.errors import SplitlearnError
from splitlearn.wire.channel import Credentials

PREFIX = "splitlearn_trunk_"
HISTORY_S = 120.0
# Window of rates and percentiles: one second has too few steps.
WINDOW_S = 5.0
# Open pages share a snapshot that is no older.
FRESH_S = 0.7
Series = tuple[str, tuple[tuple[str, str], ...]]


@dataclass(frozen=True)
class Figures:
    """The trunk at one moment. `now` and `rates` have series by name and values of labels, with `_` between. Rates,
    means and percentiles are over the last `over_s`: about WINDOW_S, and after a pause all of it; None if nothing
    happened."""

    at: float
    now: Mapping[str, float]
    refusals: Mapping[tuple[str, str], float]
    over_s: float = 0.0
    rates: Mapping[str, float] = field(default_factory=dict)
    batch: float | None = None
    step_p50_s: float | None = None
    step_p95_s: float | None = None


@dataclass(frozen=True)
class ServerView:
    """What to show of one server: the last snapshot and the figures so far, oldest first; or the error."""

    snapshot: Snapshot | None = None
    figures: tuple[Figures, ...] = ()
    error: str = ""


class Monitor:
    """Takes snapshots of the trunk of `runs`, of a chain those of each server. `measuring` says whether a run is timed,
    which a snapshot would disturb."""

    def __init__(self, runs: Runs, measuring: Callable[[], bool]) -> None:
        self.measuring = measuring
        self._runs = runs
        self._lock = threading.Lock()
        self._taken_at = float("-inf")
        self._servers: list[_Server] = []
        self._shown: tuple[ServerView, ...] = (ServerView(),)

    def see(self) -> tuple[ServerView, ...]:
        """A new snapshot of each server, or the last ones if they are fresh."""
        with self._lock:
            if time.monotonic() - self._taken_at >= FRESH_S:
                self._shown = self._see()
                self._taken_at = time.monotonic()
            return self._shown

    def close(self) -> None:
        """Close the connections to the trunk."""
        with self._lock:
            for server in self._servers:
                server.close()

    def _see(self) -> tuple[ServerView, ...]:
        try:
            hops = self._runs.hops()
        except SplitlearnError as error:
            return (ServerView(error=str(error)),)
        while len(self._servers) < len(hops):
            self._servers.append(_Server(hops[len(self._servers)].credentials))
        return tuple(server.see(hop) for server, hop in zip(self._servers, hops, strict=True))


class _Server:
    """The snapshots of one server."""

    def __init__(self, credentials: Credentials) -> None:
        self._probe = TrunkProbe(credentials)
        self._shown = ServerView()
        self._samples: deque[tuple[float, Mapping[Series, float]]] = deque()

    def see(self, hop: Hop) -> ServerView:
        """A new snapshot of the first server of `hop` that answers."""
        self._shown = self._see(hop)
        return self._shown

    def close(self) -> None:
        """Close the connection."""
        self._probe.close()

    def _see(self, hop: Hop) -> ServerView:
        try:
            snapshot = self._probe.snapshot(hop.listed())
        except SplitlearnError as error:
            self._samples.clear()
            return ServerView(error=str(error))
        sample, before = parse(snapshot.metrics), self._shown
        if self._samples and (_restarted(self._samples[-1][1], sample) or _address(before) != snapshot.address):
            self._samples.clear()
        figures = before.figures if self._samples else ()
        while len(self._samples) > 1 and self._samples[1][0] <= snapshot.at - WINDOW_S:
            self._samples.popleft()
        self._samples.append((snapshot.at, sample))
        recent = tuple(each for each in figures if each.at > snapshot.at - HISTORY_S)
        return ServerView(snapshot, (*recent, between(*self._samples[0], snapshot.at, sample)))


def parse(text: str) -> dict[Series, float]:
    """The series of a Prometheus text, by name and labels."""
    families = text_string_to_metric_families(text)
    return {
        (sample.name.removeprefix(PREFIX), tuple(sorted(sample.labels.items()))): sample.value
        for family in families
        for sample in family.samples
    }


def between(then: float, before: Mapping[Series, float], at: float, sample: Mapping[Series, float]) -> Figures:
    """The figures of `sample`, taken at time `at`, with rates since `before`, taken at time `then`."""
    grown = {series: value - before.get(series, 0.0) for series, value in sample.items()}
    forwards, passed_s = grown.get(("forward_sessions_count", ()), 0.0), at - then
    totals = {"_".join((name, *(value for _, value in labels))): (name, labels) for name, labels in sample}
    return Figures(
        at=at,
        now={name: sample[series] for name, series in totals.items()},
        refusals={
            (dict(labels)["cause"], dict(labels)["code"]): value
            for (name, labels), value in sample.items()
            if name == "refusals_total"
        },
        over_s=passed_s,
        rates={name: grown[series] / passed_s for name, series in totals.items() if passed_s > 0},
        batch=grown[("forward_sessions_sum", ())] / forwards if forwards else None,
        step_p50_s=quantile(grown, "forward_seconds", 0.5),
        step_p95_s=quantile(grown, "forward_seconds", 0.95),
    )


def quantile(grown: Mapping[Series, float], name: str, share: float) -> float | None:
    """The `share` quantile of a histogram, interpolated linearly within a bucket."""
    found = [(float(dict(labels)["le"]), count) for (of, labels), count in grown.items() if of == f"{name}_bucket"]
    buckets = sorted(found)
    if not buckets or not buckets[-1][1]:
        return None
    target, low, below = share * buckets[-1][1], 0.0, 0.0
    for high, count in buckets:
        if count >= target and high != float("inf"):
            return low + (high - low) * (target - below) / max(count - below, 1e-9)
        low, below = (low if high == float("inf") else high), count
    return low


def _address(shown: ServerView) -> str:
    return shown.snapshot.address if shown.snapshot else ""


def _restarted(before: Mapping[Series, float], sample: Mapping[Series, float]) -> bool:
    """Whether the server process is a new one: a total is smaller than before."""
    return any(
        name.endswith("_total") and sample.get((name, labels), 0.0) < value for (name, labels), value in before.items()
    )

"""The figures of a load test; docs/loadtest.md defines each."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from splitlearn.loadtest.driver import Measurement, Outcome
from splitlearn.loadtest.plan import Levels
from splitlearn.reporting.percentile import percentile

PERCENTILES = {"p50_s": 0.5, "p90_s": 0.9, "p95_s": 0.95, "p99_s": 0.99}


@dataclass(frozen=True)
class Spread:
    """A distribution of `n` times in seconds. A percentile is None if n values are too few to bound it."""

    n: int
    mean_s: float | None
    p50_s: float | None
    p90_s: float | None
    p95_s: float | None
    p99_s: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """The distribution of `values`, which may be empty."""
        found = {name: percentile(values, q) for name, q in PERCENTILES.items()}
        return cls(len(values), fmean(values) if values else None, **found)


@dataclass(frozen=True)
class Summary:
    """Counts of requests, and rates per second over `duration_s`, the time in which requests arrived.

    Rates count what came within that time: tokens, answers that ended, answers that met both levels. `goodput_share` is
    the share of all requests. `reasons` counts the errors of unanswered requests, with numbers as `#`.
    """

    duration_s: float
    offered: int
    done: int
    rejected: int
    failed: int
    incomplete: int
    reasons: dict[str, int]
    ttft: Spread
    tpot: Spread
    tps_system: float
    requests_per_s: float
    goodput_per_s: float
    goodput_share: float | None
    busy: float

    @classmethod
    def of(cls, measurement: Measurement, levels: Levels) -> "Summary":
        """The figures of a load under service levels."""
        outcomes, seconds = measurement.outcomes, measurement.duration_s
        states = Counter(outcome.state for outcome in outcomes)
        good = [outcome for outcome in outcomes if met(outcome, levels)]
        tokens = sum(at <= seconds for outcome in outcomes for at in outcome.token_s)
        return cls(
            duration_s=seconds,
            offered=len(outcomes),
            done=states["done"],
            rejected=states["rejected"],
            failed=states["failed"],
            incomplete=states["incomplete"],
            reasons=_reasons(outcomes),
            ttft=Spread.of([outcome.ttft_s for outcome in outcomes if outcome.ttft_s is not None]),
            tpot=Spread.of([outcome.tpot_s for outcome in outcomes if outcome.tpot_s is not None]),
            tps_system=tokens / seconds,
            requests_per_s=sum(_within(outcome, seconds) for outcome in outcomes if outcome.state == "done") / seconds,
            goodput_per_s=sum(_within(outcome, seconds) for outcome in good) / seconds,
            goodput_share=len(good) / len(outcomes) if outcomes else None,
            busy=measurement.busy,
        )


def met(outcome: Outcome, levels: Levels) -> bool:
    """Whether the answer is complete and met both levels."""
    if outcome.state != "done" or outcome.ttft_s is None:
        return False
    return outcome.ttft_s <= levels.ttft_s and (outcome.tpot_s or 0.0) <= levels.tpot_s


def _within(outcome: Outcome, seconds: float) -> bool:
    """Whether the last token came within the time in which requests arrived."""
    return outcome.token_s[-1] <= seconds


def _reasons(outcomes: Sequence[Outcome]) -> dict[str, int]:
    """The errors, most frequent first. Errors that differ only in numbers are one reason."""
    reasons = Counter(re.sub(r"\d+(\.\d+)?", "#", outcome.reason) for outcome in outcomes if outcome.reason)
    return dict(reasons.most_common())

"""The figures of a load test; docs/loadtest.md defines each."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean

from splitlearn.loadtest.driver import Measurement, Outcome
from splitlearn.loadtest.plan import Levels
from splitlearn.reporting.percentile import percentile

NUMBER = r"(?<!HTTP )(?<![\d.])\d+(\.\d+)?"
"""A number in an error, and no HTTP status."""
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
    the share of all requests. `reasons` counts the errors of unanswered requests, with numbers as `#`. `itl` is between
    tokens, or between chunks of text: `tokens` of all answers came in so many `chunks`. `tps_request` is their mean.
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
    itl: Spread
    e2el: Spread
    tokens: int
    chunks: int
    tps_request: float | None
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
        done = [outcome for outcome in outcomes if outcome.state == "done"]
        speeds = [outcome.tokens / outcome.e2el_s for outcome in done if outcome.e2el_s]
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
            itl=Spread.of([later - earlier for outcome in done for earlier, later in pairwise(outcome.token_s)]),
            e2el=Spread.of([outcome.e2el_s for outcome in done if outcome.e2el_s is not None]),
            tokens=sum(outcome.tokens for outcome in done),
            chunks=sum(len(outcome.token_s) for outcome in done),
            tps_request=fmean(speeds) if speeds else None,
            tps_system=sum(_tokens_within(outcome, seconds) for outcome in outcomes) / seconds,
            requests_per_s=sum(_within(outcome, seconds) for outcome in done) / seconds,
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
    return outcome.last_s is not None and outcome.last_s <= seconds


def _tokens_within(outcome: Outcome, seconds: float) -> float:
    """The tokens that came within the time. Those of a chunk are as many as of any other of its answer."""
    came = sum(at <= seconds for at in outcome.token_s)
    return came and came * outcome.tokens / len(outcome.token_s)


def _reasons(outcomes: Sequence[Outcome]) -> dict[str, int]:
    """The errors, most frequent first. Errors that differ only in numbers are one reason."""
    reasons = Counter(re.sub(NUMBER, "#", outcome.reason) for outcome in outcomes if outcome.reason)
    return dict(reasons.most_common())

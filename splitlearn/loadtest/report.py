"""Exports of a load test: JSON, a CSV of its requests, and one self-contained HTML file."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from splitlearn.loadtest import charts
from splitlearn.loadtest.driver import Measurement
from splitlearn.loadtest.plan import LoadTest
from splitlearn.loadtest.summary import Spread, Summary
from splitlearn.reporting.files import csv, write_texts
from splitlearn.reporting.page import chart_html, render

TEMPLATE = Path(__file__).with_name("report.html.jinja")
BUSY = 0.8
"""Above this share of a core, this process itself may be the bottleneck."""


@dataclass(frozen=True)
class LoadTestResult:
    """The results of a load test. `command` repeats it."""

    load: LoadTest
    prompt_tokens: tuple[int, ...]
    measurement: Measurement
    summary: Summary
    model: str
    command: str
    environment: dict[str, Any]


def as_json(findings: LoadTestResult) -> dict[str, Any]:
    """Everything but the single requests. Times are in seconds."""
    load = asdict(findings.load)
    return {
        "model": findings.model,
        "loop": _loop(findings.load),
        "asked": {**load, "prompts": len(findings.load.prompts), "prompt_tokens": list(findings.prompt_tokens)},
        "summary": asdict(findings.summary),
        "command": findings.command,
        "environment": findings.environment,
    }


def write_exports(findings: LoadTestResult, folder: Path) -> None:
    """Write loadtest.json, requests.csv and report.html into `folder`; create it if needed."""
    texts = {
        "loadtest.json": json.dumps(as_json(findings), indent=1, allow_nan=False) + "\n",
        "requests.csv": _requests(findings),
        "report.html": html(findings),
    }
    write_texts(folder, texts)


def html(findings: LoadTestResult) -> str:
    """The report as one HTML page. Text from outside is escaped."""
    load, measurement = findings.load, findings.measurement
    figures = [
        *charts.distributions(measurement, load.levels),
        charts.requests(measurement),
        charts.throughput(measurement),
    ]
    return render(
        TEMPLATE,
        title=f"Load: {findings.model}",
        about=about(findings),
        notes=notes(findings.summary),
        times=times(findings.summary),
        counts=counts(findings),
        reasons=findings.summary.reasons,
        charts=chart_html(figures),
        command=findings.command,
        environment=json.dumps(findings.environment, indent=2),
    )


def about(findings: LoadTestResult) -> str:
    """One sentence about the test."""
    load, tokens = findings.load, findings.prompt_tokens
    kind = "replaying" if load.replay else "real"
    return (
        f"{_loop(load)}, {load.clients} {kind} client{'s' * (load.clients != 1)}, "
        f"{findings.summary.duration_s:.0f} s, {len(tokens)} prompts of {min(tokens)} to {max(tokens)} tokens, "
        f"answers of up to {load.max_new_tokens}, seed {load.seed}."
    )


def notes(summary: Summary) -> list[str]:
    """What a reader must know before believing the figures."""
    found = []
    if summary.busy > BUSY:
        found.append(
            f"The clients' process had {summary.busy:.0%} of a core busy: the figures may be its own, not the trunk's."
        )
    if summary.rejected + summary.failed + summary.incomplete:
        found.append("TTFT and TPOT are of the requests that were answered; the others are only counted.")
    return found


def times(summary: Summary) -> list[tuple[str, ...]]:
    """A row of heads, then rows of TTFT and TPOT. A cell is empty if there are too few values."""

    def row(name: str, spread: Spread) -> tuple[str, ...]:
        values = (spread.mean_s, spread.p50_s, spread.p90_s, spread.p95_s, spread.p99_s)
        return (name, str(spread.n), *("" if value is None else f"{value * 1e3:.0f} ms" for value in values))

    heads = ("", "n", "mean", "p50", "p90", "p95", "p99")
    return [heads, row("TTFT", summary.ttft), row("TPOT", summary.tpot)]


def counts(findings: LoadTestResult) -> list[tuple[str, str]]:
    """Names and values of all figures that are not distributions."""
    found, levels = findings.summary, findings.load.levels
    share = "" if found.goodput_share is None else f", {found.goodput_share:.1%} of all"
    goodput = f"{found.goodput_per_s:.2f} requests/s{share}"
    return [
        ("TPS (system)", f"{found.tps_system:.1f} tokens/s"),
        ("answered", f"{found.requests_per_s:.2f} requests/s"),
        (f"goodput (TTFT {levels.ttft_s:g} s, TPOT {levels.tpot_s:g} s)", goodput),
        ("requests", str(found.offered)),
        ("done", str(found.done)),
        ("rejected", str(found.rejected)),
        ("failed", str(found.failed)),
        ("incomplete", str(found.incomplete)),
    ]


def _loop(load: LoadTest) -> str:
    return "closed-loop" if load.rate is None else f"open-loop at {load.rate:g} requests/s"


def _requests(findings: LoadTestResult) -> str:
    """A CSV line for each request, in the order of arrival. Times are seconds after the start."""
    rows = [
        {
            "client": outcome.client,
            "prompt": outcome.job.prompt,
            "new_tokens": outcome.job.new_tokens,
            "arrived_s": outcome.arrived_s,
            "begun_s": outcome.begun_s,
            "ended_s": outcome.ended_s,
            "state": outcome.state,
            "tokens": len(outcome.token_s),
            "ttft_s": outcome.ttft_s,
            "tpot_s": outcome.tpot_s,
            "reason": outcome.reason,
        }
        for outcome in findings.measurement.outcomes
    ]
    return csv(pd.DataFrame(rows))

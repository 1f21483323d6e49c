"""Exports of a load test: JSON, a CSV of its requests, and one self-contained HTML file."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from splitlearn.loadtest import charts
from splitlearn.loadtest.driver import Measurement
from splitlearn.loadtest.plan import LoadTest
from splitlearn.loadtest.summary import Spread, Summary
from splitlearn.loadtest.trace import TraceLine, written
from splitlearn.reporting.files import csv, write_texts
from splitlearn.reporting.page import chart_html, render

TEMPLATE = Path(__file__).with_name("report.html.jinja")
BUSY = 0.8
"""Above this share of a core, this process itself may be the bottleneck."""


@dataclass(frozen=True)
class LoadTestResult:
    """The results of a load test. `clients` says of what kind they were; `command` repeats it."""

    load: LoadTest
    clients: str
    prompt_tokens: tuple[int, ...]
    measurement: Measurement
    summary: Summary
    model: str
    command: str
    environment: dict[str, Any]


def as_json(findings: LoadTestResult) -> dict[str, Any]:
    """Everything but the single requests. Times are in seconds."""
    asked = findings.load
    load = {
        **asdict(replace(asked, trace=())),
        "prompt_words": asked.prompt_words and str(asked.prompt_words),
        "answers": str(asked.answer_lengths),
        "trace": len(asked.trace),
    }
    return {
        "model": findings.model,
        "loop": _loop(asked),
        "clients": findings.clients,
        "asked": {**load, "prompts": len(asked.prompts), "prompt_tokens": list(findings.prompt_tokens)},
        "summary": asdict(findings.summary),
        "command": findings.command,
        "environment": findings.environment,
    }


def write_exports(findings: LoadTestResult, folder: Path) -> None:
    """Write loadtest.json, requests.csv, report.html and trace.jsonl into `folder`; create it if needed."""
    texts = {
        "loadtest.json": json.dumps(as_json(findings), indent=1, allow_nan=False) + "\n",
        "requests.csv": _requests(findings),
        "report.html": html(findings),
    }
    if findings.load.turns == 1:  # what later turns say, they say to answers that another server does not give
        texts["trace.jsonl"] = written(_trace(findings))
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
    lengths = f" of {' to '.join(map(str, sorted({min(tokens), max(tokens)})))} tokens" if tokens else ""
    return (
        f"{_loop(load)}, {load.clients} client{'s' * (load.clients != 1)} ({findings.clients}), "
        f"{findings.summary.duration_s:.0f} s, {_prompts(load)}{lengths}, "
        f"answers of up to {load.longest_answer}, seed {load.seed}."
    )


def _prompts(load: LoadTest) -> str:
    """Which prompts there were."""
    prefix = f"a shared prefix of {load.prefix_words} words, " if load.prefix_words else ""
    turns = f"{load.turns} turns, " if load.turns > 1 else ""
    if load.trace:
        return "its prompts"
    kind = f"{len(load.prompts)} prompts" if load.prompt_words is None else f"prompts of {load.prompt_words} words"
    return f"{prefix}{turns}{kind}"


def notes(summary: Summary) -> list[str]:
    """What a reader must know before believing the figures."""
    found = []
    if summary.busy > BUSY:
        found.append(
            f"The clients' process had {summary.busy:.0%} of a core busy: the figures may be its own, not the server's."
        )
    if summary.tokens != summary.chunks:
        counted = f"{summary.tokens} tokens came in {summary.chunks} chunks"
        found.append(f"ITL is the time between chunks of text, not between tokens: {counted}.")
    if summary.rejected + summary.failed + summary.incomplete:
        found.append("TTFT and TPOT are of the requests that were answered; the others are only counted.")
    return found


def times(summary: Summary) -> list[tuple[str, ...]]:
    """A row of heads, then rows of TTFT, TPOT, ITL and E2EL. A cell is empty if there are too few values."""

    def row(name: str, spread: Spread) -> tuple[str, ...]:
        values = (spread.mean_s, spread.p50_s, spread.p90_s, spread.p95_s, spread.p99_s)
        return (name, str(spread.n), *("" if value is None else f"{value * 1e3:.1f} ms" for value in values))

    heads = ("", "n", "mean", "p50", "p90", "p95", "p99")
    itl = "ITL" if summary.tokens == summary.chunks else "ITL (chunks)"
    rows = (("TTFT", summary.ttft), ("TPOT", summary.tpot), (itl, summary.itl), ("E2EL", summary.e2el))
    return [heads, *(row(name, spread) for name, spread in rows)]


def counts(findings: LoadTestResult) -> list[tuple[str, str]]:
    """Names and values of all figures that are not distributions."""
    found, levels = findings.summary, findings.load.levels
    share = "" if found.goodput_share is None else f", {found.goodput_share:.1%} of all"
    goodput = f"{found.goodput_per_s:.2f} requests/s{share}"
    return [
        ("TPS (request), mean", "" if found.tps_request is None else f"{found.tps_request:.1f} tokens/s"),
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
    if load.trace:
        return f"a trace of {len(load.trace)} requests"
    return "closed-loop" if load.rate is None else f"open-loop at {load.rate:g} requests/s"


def _trace(findings: LoadTestResult) -> Iterator[TraceLine]:
    """The requests as they arrived."""
    load = findings.load
    for outcome in findings.measurement.outcomes:
        number, at_s = outcome.job.prompt, round(outcome.arrived_s, 6)
        if load.trace:
            yield replace(load.trace[number], at_s=at_s)
        else:
            text = load.text(number)
            yield TraceLine(at_s, len(text.split()), outcome.job.new_tokens, text=text)


def _requests(findings: LoadTestResult) -> str:
    """A CSV line for each request, in the order of arrival. Times are seconds after the start."""
    rows = [
        {
            "client": outcome.client,
            "prompt": outcome.job.prompt,
            "turn": outcome.job.turn,
            "new_tokens": outcome.job.new_tokens,
            "arrived_s": outcome.arrived_s,
            "begun_s": outcome.begun_s,
            "ended_s": outcome.ended_s,
            "state": outcome.state,
            "tokens": outcome.tokens,
            "chunks": len(outcome.token_s),
            "ttft_s": outcome.ttft_s,
            "tpot_s": outcome.tpot_s,
            "e2el_s": outcome.e2el_s,
            "prompt_tokens": outcome.end and outcome.end.prompt_tokens,
            "server_ttft_s": outcome.end and outcome.end.server_ttft_s,
            "server_tpot_s": outcome.end and outcome.end.server_tpot_s,
            "reason": outcome.reason,
        }
        for outcome in findings.measurement.outcomes
    ]
    return csv(pd.DataFrame(rows))

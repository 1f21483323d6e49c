"""Exports: a comparison as one self-contained HTML file, its times as CSV, and the history as CSV and JSON."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from splitlearn.arms.compare import KINDS, Pairs
from splitlearn.metrics import LEDGER_ORDER
from splitlearn.reporting.files import csv
from splitlearn.reporting.page import render
from ui.compare import time, view
from ui.compare.session import ComparisonView
from ui.history.record import Entry, Spread
from ui.history.view import both
from ui.theme import PAGE

TEMPLATE = Path(__file__).with_name("share.html.jinja")


def page(shown: ComparisonView, entry: Entry, command: str, environment: Mapping[str, Any]) -> str:
    """The comparison as one HTML file. All texts are escaped; only the page's own functions add HTML."""
    pairs = shown.pairs
    assert pairs is not None
    full, split = both(entry.full.answer, entry.split.answer)
    return render(
        TEMPLATE,
        plotly=False,
        title=f"Full and split: {entry.model}",
        when=f"{entry.when:%Y-%m-%d %H:%M:%S} UTC",
        look=PAGE,
        result=view.result(shown, entry.flags),
        time=time.picture(pairs),
        figures=[(name, view.FIGURES[name][0], *_figures(pairs, name)) for name in view.FIGURES],
        answers=[("Full", full), ("Split", split)],
        settings=entry.choices,
        command=command,
        environment=json.dumps(environment, indent=2, default=str),
    )


def times(pairs: Pairs) -> str:
    """The data of the time charts as CSV: a row for each step of each run, in milliseconds."""
    rows = []
    for kind in KINDS:
        for run, report in enumerate(pairs.of(kind), 1):
            before, token = 0.0, 1
            for step in report.metrics.steps:
                parts = {f"{name}_ms": 1e3 * step.ledger.get(name, 0.0) for name in LEDGER_ORDER}
                spent = {"at_ms": 1e3 * step.time_s, "took_ms": 1e3 * (step.time_s - before)}
                rows.append({"arm": kind, "run": run, "token": token, "tokens": len(step.token_ids), **spent, **parts})
                before, token = step.time_s, token + len(step.token_ids)
    return csv(pd.DataFrame(rows))


def history_csv(entries: Sequence[Entry]) -> str:
    """A row for each comparison. Cells that a spreadsheet would take for formulas are escaped."""
    return csv(pd.DataFrame([_row(each) for each in entries]))


def history_json(entries: Sequence[Entry]) -> str:
    """All entries as JSON."""
    return json.dumps([each.model_dump(mode="json") for each in entries], indent=1, allow_nan=False) + "\n"


def _figures(pairs: Pairs, name: str) -> tuple[str, str]:
    figure = view.FIGURES[name][1]
    return figure(pairs.typical("full").metrics), figure(pairs.typical("split").metrics)


def _row(entry: Entry) -> dict[str, object]:
    figures: dict[str, object] = {
        f"{kind}_{name}": getattr(getattr(entry, kind), name) for name in ("ttft_s", "tpot_s", "tps") for kind in KINDS
    }
    ratios = _spread("ttft", entry.ttft) | _spread("tpot", entry.tpot)
    chosen = {name.lower().replace(" ", "_").replace("-", "_"): value for name, value in entry.choices.items()}
    same = entry.differs_at is None
    answers = {f"{kind}_answer": "".join(getattr(entry, kind).answer) for kind in KINDS}
    return {
        "when": entry.when.isoformat(),
        **chosen,
        **figures,
        **ratios,
        "identical": same,
        **answers,
        "command": entry.command,
    }


def _spread(name: str, found: Spread | None) -> dict[str, float | None]:
    return {
        f"{name}_ratio{end}": None if found is None else getattr(found, part)
        for end, part in (("", "mean"), ("_least", "least"), ("_most", "most"))
    }

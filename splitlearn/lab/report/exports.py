"""Exports of an experiment: JSON, CSV, one self-contained HTML file, Markdown, and a comparison of two experiments."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from splitlearn.arms.compare import KINDS
from splitlearn.lab.analysis.findings import METRICS, Findings
from splitlearn.lab.analysis.flags_table import flags_table
from splitlearn.lab.environment import differences
from splitlearn.lab.report import charts, data, tables
from splitlearn.reporting.charts import PART_COLOURS
from splitlearn.reporting.files import csv, write_texts
from splitlearn.reporting.page import chart_html, render

TEMPLATE = Path(__file__).with_name("report.html.jinja")


def write_exports(findings: Findings, folder: Path) -> list[Path]:
    """Write results.json, flags.csv, verdicts.csv, pairs.csv, trials.csv, report.html and report.md into `folder`.

    Creates the folder if needed. Returns the paths.
    """
    texts = {
        "results.json": json.dumps(data.as_json(findings), indent=1, allow_nan=False) + "\n",
        "flags.csv": flags_table(findings).as_csv(),
        "verdicts.csv": csv(data.verdicts(findings)),
        "pairs.csv": csv(data.pairs(findings)),
        "trials.csv": csv(data.trials(findings)),
        "report.html": html(findings),
        "report.md": markdown(findings),
    }
    return write_texts(folder, texts)


def html(findings: Findings) -> str:
    """The report as one self-contained HTML page. Text from outside is escaped."""
    setup = findings.setup
    return render(
        TEMPLATE,
        title=f"Experiment: {setup.model}",
        summary=_summary(findings),
        status=_status(findings),
        method=_method(findings),
        warnings=tables.warnings(findings),
        verdicts=tables.verdicts(findings),
        controls=tables.controls(findings),
        work=tables.work(findings),
        arms=tables.arms(findings),
        claims=tables.claims(findings),
        left_out=tables.left_out(findings),
        forests=chart_html([charts.forest(findings, kind, metric) for metric in METRICS for kind in KINDS]),
        dots=chart_html([charts.dots(findings, kind, metric) for metric in METRICS for kind in KINDS]),
        ledgers=chart_html([charts.breakdown(findings, kind) for kind in KINDS]),
        key=[(word, PART_COLOURS[word]) for word in charts.words(findings.arms)],
        command=setup.command,
        prompts=setup.prompts,
        environment=json.dumps(setup.environment, indent=2),
        notes=json.dumps(findings.notes, indent=2),
    )


def markdown(findings: Findings) -> str:
    """The report as a page for docs/results."""
    parts = [
        f"# What each flag does: {tables.plain(findings.setup.model)}",
        f"{_summary(findings)} {_status(findings)}",
        _method(findings),
        *(f"**{tables.plain(warning)}**" for warning in tables.warnings(findings)),
        "## Verdicts",
        tables.markdown_table(tables.verdicts(findings)),
        _folded("The baseline against itself (A/A)", tables.controls(findings)),
        "## Did both sides do the same work?",
        tables.markdown_table(tables.work(findings)),
        "## Arms",
        "Medians over n runs; percentiles only where there are enough values (72 for p95, 368 for p99).",
        tables.markdown_table(tables.arms(findings)),
        _folded("What was published of the earlier system", tables.claims(findings)),
        "## How to repeat it",
        f"```\n{findings.setup.command}\n```",
        "## Environment",
        f"```json\n{json.dumps(findings.setup.environment, indent=2)}\n```",
    ]
    return "\n\n".join(parts) + "\n"


def compare_two(one: Findings, other: Findings) -> str:
    """Both verdict tables side by side, as Markdown, below a warning that names other differences."""
    differing = [*differences(one.setup.environment, other.setup.environment), *_other_settings(one, other)]
    named = "\n".join(f"- {tables.plain(difference)}" for difference in differing)
    warning = f"WARNING: the two experiments differ in more than chance; compare their figures with care.\n\n{named}"
    names = "\n".join(f"{letter}: {_code(found.setup.command)}" for letter, found in (("A", one), ("B", other)))
    table = tables.markdown_table(tables.side_by_side(one.rows, other.rows))
    same = "Both ran in the same environment with the same settings."
    return "\n\n".join([names, warning if differing else same, table]) + "\n"


def _folded(name: str, table: tables.Table) -> str:
    return f"<details><summary>{name}</summary>\n\n{tables.markdown_table(table)}\n\n</details>"


def _code(text: str) -> str:
    """`text` as a code span of Markdown, between more backticks than it has in a row."""
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    space = " " if "`" in text else ""
    return f"{fence}{space}{' '.join(text.split())}{space}{fence}"


def _other_settings(one: Findings, other: Findings) -> Iterator[str]:
    """The differences between two setups."""
    for name in ("model", "design", "flags", "prompts", "max_new_tokens", "delta"):
        values: tuple[Any, Any] = (getattr(one.setup, name), getattr(other.setup, name))
        if values[0] == values[1]:
            continue
        if name in ("flags", "prompts"):
            yield f"{name} are not the same"
        else:
            yield f"{name}: {values[0]} against {values[1]}"


def _summary(findings: Findings) -> str:
    setup = findings.setup
    return (
        f"Design {setup.design!r}: {len(setup.plan.arms)} arms, n = {findings.blocks} whole blocks,"
        f" {setup.max_new_tokens} tokens a run, {len(setup.prompts)} prompt{'s' * (len(setup.prompts) != 1)},"
        f" seed {setup.seed}."
    )


def _status(findings: Findings) -> str:
    ended = (
        f"Ended: {findings.finished}." if findings.finished else "It has not finished: these are the figures so far."
    )
    turns = len(findings.left_out)
    slopes = [
        f"{kind} {drift.per_pair ** (findings.blocks - 1) - 1:+.2%} (p = {drift.p_value:.2g})"
        for kind, drift in findings.drift.items()
        if drift is not None
    ]
    drift = f" Drift of the baseline's TPOT from first to last block: {', '.join(slopes)}." if slopes else ""
    return f"{ended} Turns of blocks that do not count: {turns}.{drift}"


def _method(findings: Findings) -> str:
    return (
        "A ratio is time with the flag / time without, over the two runs of one block, so below 1 the flag makes it"
        f" faster. No measurable effect: the interval lies within {findings.setup.delta:.1%} of 1. Intervals are of the"
        " geometric mean ratio, from paired t on log ratios, and Holm-corrected over all flags asked, for each metric"
        " by itself. A/A is the baseline against itself: the noise floor."
    )

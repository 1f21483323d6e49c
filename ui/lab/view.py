"""The Lab tab's view of an experiment, as HTML. It has the tables of the report."""

import json
from collections.abc import Callable, Mapping
from html import escape

from splitlearn.arms.compare import KINDS
from splitlearn.lab.analysis.findings import Findings
from splitlearn.lab.analysis.pairing import ArmFigures
from splitlearn.lab.job import JobStatus
from splitlearn.lab.report import charts, tables
from splitlearn.reporting.charts import PART_COLOURS
from ui.format import MISSING, rate, seconds, size
from ui.html import head_row, table

MOST_WARNINGS = 3
METHOD = (
    "Ratios are time with the flag / time without, so below 1 the flag makes it faster. Each has its interval and "
    "its number of pairs n. A/A is the baseline against itself, the noise floor."
)
BESIDE = (
    "Medians over the whole blocks. TPS (request) is that of the median TTFT and TPOT. Added memory of split is that "
    "of client and trunk; arms that differ only in session flags share a trunk process, and so its peak."
)


def progress(status: JobStatus) -> str:
    """The progress of an experiment, as a bar and in words."""
    state = status.progress
    total = state.elapsed_s + (state.remaining_s or 0.0) if state else 0.0
    # No animated bar: it would draw while a run is timed.
    value = state.elapsed_s / total if state and state.remaining_s is not None and total else 0.0
    if status.ended:
        value, text = 1.0 if status.findings and status.findings.finished else value, f"Ended: {status.ended}"
    elif state:
        dropped = f"; {state.discarded}" if state.discarded else ""
        text = f"Measuring: {state.phase}; {state.blocks} pairs, {state.runs} runs so far; {_left(state.remaining_s)}"
        text += dropped
    else:
        text = "Measuring: getting ready"
    return (
        f'<div class="sl-progress"><progress value="{value:.3f}" max="1" aria-label="Elapsed time"></progress>'
        f'<span role="status">{escape(status.folder.name)}. {escape(text)}.</span></div>'
    )


def so_far(findings: Findings) -> str:
    """The verdicts of a running experiment. It is short, since it is drawn between two runs."""
    return f"<h2>Verdicts so far</h2>{_table(tables.verdicts(findings), 'Verdicts')}"


def report(findings: Findings) -> str:
    """The findings: verdicts first, then the figures of each arm, full beside split."""
    setup = findings.setup
    ended = f"Ended: {findings.finished}." if findings.finished else "Not finished: these are the figures so far."
    prompts = f"{len(setup.prompts)} prompt{'s' * (len(setup.prompts) != 1)}"
    what = (
        f"{setup.model}, design {setup.design}: {len(setup.plan.arms)} arms, n = {findings.blocks} whole "
        f"blocks, {setup.max_new_tokens} tokens a run, {prompts}. {ended}"
    )
    return (
        f'<h2>Verdicts</h2><p>{escape(what)}</p><p class="sl-small">{METHOD}</p>{_warnings(findings)}'
        f"{_table(tables.verdicts(findings), 'Verdicts')}"
        f'<h2>Full and split side by side</h2><p class="sl-small">{BESIDE}</p>{_beside(findings)}'
    )


def details(findings: Findings) -> str:
    """How to repeat the experiment, and the data behind the verdicts, folded."""
    setup = findings.setup
    environment = escape(json.dumps(setup.environment, indent=2))
    prompts = "".join(f"<pre>{escape(prompt)}</pre>" for prompt in setup.prompts)
    return (
        f"<h2>How to repeat it</h2><pre>{escape(setup.command)}</pre>"
        + _folded("The baseline against itself (A/A)", _table(tables.controls(findings), "Check"))
        + _folded("Arms: percentiles, service level, time unattributed", _table(tables.arms(findings), "Arms"))
        + _folded("Did both sides do the same work?", _table(tables.work(findings), "Same work"))
        + _folded("What was published of the earlier system", _table(tables.claims(findings), "Claims"))
        + _folded("Blocks that do not count", _table(tables.left_out(findings), "Blocks that do not count"))
        + _folded("Environment", f'<pre tabindex="0">{environment}</pre>')
        + _folded("Prompts", prompts)
    )


def breakdown_key(findings: Findings) -> str:
    """The legend of the time breakdown."""
    parts = "".join(
        f'<li><span class="sl-swatch" style="background:{PART_COLOURS[word]}"></span>{word}</li>'
        for word in charts.words(findings.arms)
    )
    return f'<h2>Where the time went</h2><ul class="sl-key">{parts}</ul>'


def _warnings(findings: Findings) -> str:
    """Warnings about the verdicts. More than MOST_WARNINGS are folded, so that the verdicts stay near the top."""
    found = tables.warnings(findings)
    listed = "".join(f'<p class="sl-differ">{escape(warning)}</p>' for warning in found)
    return _folded(f"{len(found)} warnings", listed) if len(found) > MOST_WARNINGS else listed


def _beside(findings: Findings) -> str:
    """A row for each arm, full beside split in each column."""
    tokens = findings.setup.max_new_tokens
    columns: Mapping[str, Callable[[ArmFigures], str]] = {
        "Load": lambda arm: seconds(arm.load_s),
        "Added memory": lambda arm: size(arm.added_bytes),
        "TTFT": lambda arm: seconds(arm.ttft_s),
        "TPOT": lambda arm: seconds(arm.tpot_s),
        "TPS (request)": lambda arm: rate(tokens / (arm.ttft_s + (tokens - 1) * (arm.tpot_s or 0.0))),
        "Service level": lambda arm: "met" if arm.meets_ttft and arm.meets_decode_tps else "not met",
    }
    arms: dict[str, dict[str, ArmFigures]] = {}
    for arm in findings.arms:
        arms.setdefault(arm.arm.replace(f", {arm.kind}", ""), {})[arm.kind] = arm
    groups = "".join(f'<th scope="colgroup" colspan="2">{name}</th>' for name in columns)
    sides = "".join(f'<th scope="col">{kind}</th>' for kind in KINDS) * len(columns)
    head = f'<tr><th scope="col" rowspan="2">Arm</th><th scope="col" rowspan="2">n</th>{groups}</tr><tr>{sides}</tr>'
    rows = [
        [
            escape(name),
            str(min(arm.runs for arm in by_kind.values())),
            *(written(by_kind[kind]) if kind in by_kind else MISSING for written in columns.values() for kind in KINDS),
        ]
        for name, by_kind in arms.items()
    ]
    return f'<div class="sl-measured">{table(head, rows, "Full and split")}</div>'


def _table(found: tables.Table, name: str) -> str:
    head = head_row(*(escape(column) for column in found.head))
    return table(head, ([_cell(cell) for cell in row] for row in found.rows), name)


def _cell(cell: tables.Cell) -> str:
    if not cell.style:
        return escape(cell.text)
    names = " ".join(f"sl-cell-{word}" for word in cell.style.split())
    return f'<div class="{names}">{escape(cell.text)}</div>'


def _folded(name: str, inner: str) -> str:
    return f"<details><summary>{name}</summary>{inner}</details>"


def _left(remaining_s: float | None) -> str:
    if remaining_s is None:
        return "remaining time not known yet"
    return f"about {remaining_s / 60:.0f} min left" if remaining_s >= 90 else f"about {remaining_s:.0f} s left"

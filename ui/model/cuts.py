"""Cuts as HTML: the advice, the figures of the chosen cut, and the Pareto front."""

import time
from html import escape

from splitlearn.models.plan import SplitPlan
from splitlearn.planning.costs import CutCost
from splitlearn.planning.measure import REPEATS, TOKENS, CutRun
from splitlearn.planning.report import CutReport
from splitlearn.runtime.progress import Step
from ui import html
from ui.format import MISSING, ratio, seconds, size
from ui.model.pareto import distinct

EMPTY = (
    "Press “Measure this machine” to see whether splitting helps here, where to cut, and TPOT and memory of every cut. "
    f"Full and split run {REPEATS} times each, {TOKENS} tokens a run: half a minute, and more while something still "
    "loads."
)


def empty() -> str:
    """The text shown before anything was measured."""
    return f'<section class="sl-result" aria-label="Advice">{html.small(EMPTY)}</section>'


def advice(report: CutReport, words: str, at_s: float, other_words: bool) -> str:
    """The two sentences of advice, and the measurement behind them. `words` are its flags; `other_words` is whether
    other flags are chosen now."""
    how = (
        f"Predicted from runs with the flags {words} at {time.strftime('%H:%M', time.localtime(at_s))}, over the link: "
        f"{report.link.summary}; memory for {report.context:,} tokens."
    )
    now = " The flags chosen now are others: measure again for them." if other_words else ""
    return (
        f'<section class="sl-result sl-advice" aria-label="Advice"><p>{escape(report.advice.does_it_help)}</p>'
        f"<p>{escape(report.advice.where_to_cut)}</p>{html.small(how + now)}</section>"
    )


def chosen(report: CutReport, plan: SplitPlan, short: CutCost) -> str:
    """A table of the chosen cut beside the cut in use. If the chosen cut was run, also its measurement beside `short`,
    the prediction at the run's context."""
    cost, now = report.cost(plan.start, plan.end), report.cost(report.plan.start, report.plan.end)
    run = next((run for run in report.measured if (run.start, run.end) == (plan.start, plan.end)), None)
    heads, rows = [f"in use, {_range(now)}", f"chosen, {_range(cost)}"], list(ROWS)
    beside: dict[str, tuple[str, ...]] = {name: (_shown(name, now), _shown(name, cost)) for name in rows}
    if run is not None:
        heads += [f"for {report.rates.context} tokens", "measured", "measured / predicted"]
        beside = {name: (*cells, *_measured(name, short, run)) for name, cells in beside.items()}
    return html.table(
        html.head_row("Figure", *heads), [(name, *beside[name]) for name in rows], "Figures of the chosen cut"
    )


def front(report: CutReport) -> str:
    """A folded table of the Pareto front. Cuts with equal figures have one row."""
    pareto = {(cost.start, cost.end) for cost in report.front}
    groups = [group for group in distinct(report.costs).values() if any((c.start, c.end) in pareto for c in group)]
    rows = [(_range(group[0]), *(_shown(name, group[0]) for name in ROWS)) for group in groups]
    inner = html.table(html.head_row("Trunk layers", *ROWS), rows, "Pareto-optimal cuts")
    return html.folded(f"Pareto-optimal cuts: {len(rows)}", inner)


def progress(step: Step) -> str:
    """The progress of a measurement."""
    label = escape(step.label)
    if not step.total:
        return f'<div class="sl-progress"><span>{label}</span></div>'
    bar = f'<progress value="{step.done:g}" max="{step.total:g}" aria-label="Progress"></progress>'
    return f'<div class="sl-progress"><span>{label}: {step.done:g} of {step.total:g} runs</span>{bar}</div>'


def turn(place: int) -> str:
    """What a visitor waits for: her place in the queue, or that her run begins (place 0)."""
    text = f"Another run is in progress. You are number {place} in the queue." if place else "Starting"
    return progress(Step(text))


def note(text: str) -> str:
    """One line on what happened."""
    return f'<div class="sl-note">{escape(text)}</div>' if text else ""


ROWS = {
    "TPOT": ("tpot_s", seconds),
    "TTFT": ("ttft_s", seconds),
    "Client memory": ("client_memory_bytes", size),
    "Trunk memory": ("trunk_memory_bytes", size),
    "Trunk KV cache": ("trunk_kv_bytes", size),
    "Bytes up, a token": ("bytes_up", size),
    "Bytes down, a token": ("bytes_down", size),
    "Client computes": ("client_compute_share", lambda share: f"{share:.0%}"),
}
"""The figures of a cut: the field of CutCost and CutRun, and its format."""


def _measured(name: str, short: CutCost, run: CutRun) -> tuple[str, str, str]:
    field, written = ROWS[name]
    measured, predicted = getattr(run, field, None), getattr(short, field)
    return written(predicted), MISSING if measured is None else written(measured), ratio(measured, predicted)


def _shown(name: str, cost: CutCost) -> str:
    field, written = ROWS[name]
    return written(getattr(cost, field))


def _range(cost: CutCost) -> str:
    return f"[{cost.start}, {cost.end})"

"""Which cut to choose, as HTML: the advice, the figures of the chosen cut, and the cuts that nothing beats."""

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
    "Here will be: whether splitting helps on these machines, where to cut, and TPOT and memory of every cut at once. "
    f"Press “Measure this machine”: full and split run {REPEATS} times each, {TOKENS} tokens a run. That is half a "
    "minute, and more while something is still loaded. A comparison of three runs on the Answers tab does, too."
)


def empty() -> str:
    """What stands there before anything was measured."""
    return f'<section class="sl-result" aria-label="Advice">{html.small(EMPTY)}</section>'


def advice(report: CutReport, words: str, at_s: float, other_words: bool) -> str:
    """Two sentences, and what they rest on. `words` are the flags of the measurement, `other_words` whether the flags
    chosen now are others."""
    said = report.advice
    how = (
        f"Predicted from runs with the flags {words} at {time.strftime('%H:%M', time.localtime(at_s))}, over the link: "
        f"{report.link.summary}; memory for {report.context:,} tokens."
    )
    now = " The flags chosen now are others: measure again for them." if other_words else ""
    return (
        f'<section class="sl-result sl-advice" aria-label="Advice"><p>{escape(said.does_it_help)}</p>'
        f"<p>{escape(said.where_to_cut)}</p>{html.small(how + now)}</section>"
    )


def chosen(report: CutReport, plan: SplitPlan, short: CutCost) -> str:
    """The chosen cut beside the one that is compared now. Once it was run: what was measured beside `short`, its
    prediction for as few tokens as the run had."""
    cost, now = report.cost(plan.start, plan.end), report.cost(report.plan.start, report.plan.end)
    run = next((run for run in report.measured if (run.start, run.end) == (plan.start, plan.end)), None)
    heads, rows = [f"compared now, {_range(now)}", f"chosen, {_range(cost)}"], list(ROWS)
    beside: dict[str, tuple[str, ...]] = {name: (_shown(name, now), _shown(name, cost)) for name in rows}
    if run is not None:
        heads += [f"for {report.rates.context} tokens", "measured", "measured / predicted"]
        beside = {name: (*cells, *_measured(name, short, run)) for name, cells in beside.items()}
    return html.table(
        html.head_row("Figure", *heads), [(name, *beside[name]) for name in rows], "Figures of the chosen cut"
    )


def front(report: CutReport) -> str:
    """The cuts that nothing beats, one of each that cost the same, as a table that opens."""
    kept = {(cost.start, cost.end) for cost in report.front}
    groups = [group for group in distinct(report.costs).values() if any((c.start, c.end) in kept for c in group)]
    rows = [(_range(group[0]), *(_shown(name, group[0]) for name in ROWS)) for group in groups]
    inner = html.table(html.head_row("Trunk layers", *ROWS), rows, "Cuts that nothing beats")
    return html.folded(f"Cuts that nothing beats, as a table: {len(rows)}", inner)


def progress(step: Step) -> str:
    """How far a measurement is."""
    label = escape(step.label)
    if not step.total:
        return f'<div class="sl-progress"><span>{label}</span></div>'
    bar = f'<progress value="{step.done:g}" max="{step.total:g}" aria-label="Progress"></progress>'
    return f'<div class="sl-progress"><span>{label}: {step.done:g} of {step.total:g} runs</span>{bar}</div>'


def turn(place: int) -> str:
    """What somebody who has just asked for something waits for: her place in the line, 0 for none before her."""
    said = f"Another visitor's run is under way. You are number {place} in line." if place else "Beginning"
    return progress(Step(said))


def said(text: str) -> str:
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
"""The figures of a cut: the fields of CutCost and of CutRun, and how they are written."""


def _measured(name: str, short: CutCost, run: CutRun) -> tuple[str, str, str]:
    field, shown = ROWS[name]
    found, predicted = getattr(run, field, None), getattr(short, field)
    return shown(predicted), MISSING if found is None else shown(found), ratio(found, predicted)


def _shown(name: str, cost: CutCost) -> str:
    field, shown = ROWS[name]
    return shown(getattr(cost, field))


def _range(cost: CutCost) -> str:
    return f"[{cost.start}, {cost.end})"

"""The charts of an experiment, as plotly figures: intervals, raw pairs, and where the time went.

Backgrounds are transparent, for light and dark pages. Ratios lie on a log axis as wide as the data.
"""

import math
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from splitlearn.events import Kind
from splitlearn.lab.analysis.findings import METRIC_NAMES, Evidence, Findings, Metric, Row
from splitlearn.lab.analysis.pairing import ArmFigures
from splitlearn.metrics import LEDGER_ORDER
from splitlearn.reporting.charts import PART_COLOURS, new_figure

DELTA_BAND = "rgba(0,158,115,0.20)"
NOISE_BAND = "rgba(213,94,0,0.55)"
# Two pairs can give an interval of many powers of ten: it is drawn up to here.
WIDEST = 100.0
MOST_TICKS = 7
# The likeliest to be kept first.
TICKS = (1.0, 0.5, 2.0, 0.1, 10.0, 0.01, 100.0, 0.8, 1.25, 0.9, 1.1, 0.2, 5.0, 0.02, 50.0, 0.05, 20.0, 0.95, 1.05)
# A bar longer than LONGEST_BAR times the median is cut off, with CUT and its length beside it.
LONGEST_BAR = 2.0
CUT = "// "
DOT = "#3d8fd1"
# Okabe and Ito's palette, for the colour-blind and for light and dark pages; the verdict is there in words, too.
VERDICT_COLOURS: Mapping[str, str] = {"faster": "#009e73", "slower": "#d55e00", "FAILED": "#cc3311"}
OTHER_COLOUR = "#808890"


def forest(findings: Findings, kind: Kind, metric: Metric) -> Any:
    """The interval of each question, with the band of no effect (filled) and the noise floor (dashed)."""
    rows = [row for row in findings.rows if row.question.kind == kind and row.metric == metric and row.effect]
    axis = _axis([end for row in rows if row.effect for end in (row.effect.low, row.effect.high)], findings)
    title = f"{METRIC_NAMES[metric]}, {kind}: ratio with / without, n = {findings.blocks} blocks"
    figure = _ratio_figure(title, [row.question.flag for row in rows], axis)
    for row in rows:
        _interval(figure, row)
    _bands(figure, findings, rows)
    return figure


def dots(findings: Findings, kind: Kind, metric: Metric) -> Any:
    """The ratio of each pair; hover for its block."""
    compared = [found for found in findings.evidence.values() if found.question.kind == kind and found.compared(metric)]
    ratios = [one / other for found in compared for _, one, other in found.compared(metric)]
    axis = _axis(ratios, findings)
    title = f"{METRIC_NAMES[metric]}, {kind}: each of {findings.blocks} blocks"
    figure = _ratio_figure(title, [found.question.flag for found in compared], axis)
    for found in compared:
        _dots(figure, found, metric)
    _bands(figure, findings, [])
    return figure


def breakdown(findings: Findings, kind: Kind) -> Any:
    """The time breakdown of each arm in milliseconds per token after the first; the sum is beside the bar."""
    arms = [arm for arm in findings.arms if arm.kind == kind and arm.ledger]
    names = [_short(arm) for arm in arms]
    totals = [sum(arm.ledger.values()) * 1e3 for arm in arms]
    longest = LONGEST_BAR * median(totals or [1.0])
    shares = [min(1.0, longest / total) for total in totals]
    figure = _rows(f"{kind}: ms per token after the first, mean of {findings.blocks} runs", names)
    for word in words(arms):
        values = [arm.ledger.get(word, 0.0) * 1e3 for arm in arms]
        figure.add_bar(
            x=[value * part for value, part in zip(values, shares, strict=True)],
            y=names,
            customdata=values,
            name=word,
            orientation="h",
            marker={"color": PART_COLOURS[word], "line": {"width": 0}},
            hovertemplate=f"%{{y}}, {word}: %{{customdata:.3f}} ms per token<extra></extra>",
        )
    for name, total, part in zip(names, totals, shares, strict=True):
        text = f"{CUT if part < 1 else ''}{total:.1f}"
        figure.add_annotation(text=text, x=total * part, y=name, xanchor="left", showarrow=False, font={"size": 11})
    figure.update_layout(barmode="stack")
    edge = max((total * part for total, part in zip(totals, shares, strict=True)), default=1.0)
    figure.update_xaxes(range=[0, edge * 1.6], tickangle=0, nticks=5)
    return figure


def words(arms: Sequence[ArmFigures]) -> list[str]:
    """The parts of the time breakdown that any of `arms` has, in the order of a step."""
    return [word for word in LEDGER_ORDER if any(word in arm.ledger for arm in arms)]


def _interval(figure: Any, row: Row) -> None:
    effect = row.effect
    if effect is None:
        return
    low, high = max(effect.low, 1 / WIDEST), min(effect.high, WIDEST)
    colour = VERDICT_COLOURS.get(row.verdict, OTHER_COLOUR)
    text = f"{effect.ratio:.3f} [{effect.low:.3f}, {effect.high:.3f}], n = {effect.pairs} pairs"
    figure.add_scatter(
        x=[effect.ratio],
        y=[row.question.flag],
        mode="markers",
        marker={"size": 10, "color": colour},
        error_x={
            "type": "data",
            "symmetric": False,
            "array": [max(0.0, high - effect.ratio)],
            "arrayminus": [max(0.0, effect.ratio - low)],
            "color": colour,
            "thickness": 2,
        },
        hovertemplate=f"%{{y}}: {text}<extra></extra>",
    )


def _dots(figure: Any, found: Evidence, metric: Metric) -> None:
    pairs = found.compared(metric)
    figure.add_scatter(
        x=[one / other for _, one, other in pairs],
        y=[found.question.flag] * len(pairs),
        mode="markers",
        marker={"size": 8, "opacity": 0.55, "color": DOT},
        customdata=[block for block, _, _ in pairs],
        hovertemplate="%{y}, block %{customdata}: ratio %{x:.3f}<extra></extra>",
    )


def _bands(figure: Any, findings: Findings, rows: Sequence[Row]) -> None:
    """Draw the band of no effect, the A/A interval, and the line at 1."""
    delta = findings.setup.delta
    figure.add_vrect(x0=1 / (1 + delta), x1=1 + delta, fillcolor=DELTA_BAND, line_width=0, layer="below")
    noise = next((row.noise for row in rows if row.noise), None)
    for end in (noise.low, noise.high) if noise else ():
        figure.add_vline(x=end, line={"color": NOISE_BAND, "dash": "dash", "width": 1.5})
    figure.add_vline(x=1, line={"color": "rgba(128,128,128,0.9)", "width": 1})


def _axis(values: Sequence[float], findings: Findings) -> tuple[float, float]:
    """The lowest and highest ratio that the axis shows: all values, and twice the band of no effect."""
    least = 1 + 2 * findings.setup.delta
    low, high = min([*values, 1 / least]), max([*values, least])
    return max(low, 1 / WIDEST) / 1.03, min(high, WIDEST) * 1.03


def _ratio_figure(title: str, names: Sequence[str], axis: tuple[float, float]) -> Any:
    figure = _rows(title, names)
    low, high = (math.log10(end) for end in axis)
    ticks = list[float]()
    for tick in (tick for tick in TICKS if low <= math.log10(tick) <= high):
        if all(abs(math.log10(tick / other)) >= (high - low) / MOST_TICKS for other in ticks):
            ticks.append(tick)
    texts = [f"{tick:g}" for tick in ticks]
    figure.update_xaxes(type="log", range=[low, high], tickvals=ticks, ticktext=texts, tickangle=0)
    return figure


def _rows(title: str, names: Sequence[str]) -> Any:
    """A figure with a row for each name, the first on top."""
    figure = new_figure(title, height=78 + 26 * max(1, len(names)))
    figure.update_yaxes(showgrid=False, autorange="reversed", categoryorder="array", categoryarray=list(names))
    return figure


def _short(arm: ArmFigures) -> str:
    """The arm's name without its kind, which the title has."""
    return arm.arm.replace(f", {arm.kind}", "")

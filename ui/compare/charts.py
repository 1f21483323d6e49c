"""Where the time of a decoded token went: a stacked bar for each arm, from the ledger."""

from typing import Any

import plotly.graph_objects as go

from splitlearn.arms.runs import ArmReport
from splitlearn.lab.report.charts import LEDGER_COLOURS
from splitlearn.metrics import LEDGER_ORDER
from ui.compare import view

TITLE = "Time per token after the first, ms"


def ledger(full: ArmReport, split: ArmReport) -> Any:
    """Milliseconds per token after the first, by where they went; the two bars share one axis from zero."""
    figure = go.Figure()
    for name in LEDGER_ORDER:
        values = [_milliseconds(report, name) for report in (split, full)]
        if any(values):
            figure.add_bar(
                x=values,
                y=["split", "full"],
                name=name,
                orientation="h",
                marker_color=LEDGER_COLOURS[name],
                hovertemplate=f"{name}: %{{x:.2f}} ms<extra></extra>",
            )
    figure.update_layout(
        barmode="stack",
        height=170,
        showlegend=False,
        title={"text": TITLE, "font": {"size": 14}, "x": 0.01},
        margin={"l": 8, "r": 8, "t": 34, "b": 8},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        xaxis={"gridcolor": "rgba(128,128,128,0.35)", "automargin": True},
        yaxis={"automargin": True},
    )
    return figure


def legend(full: ArmReport, split: ArmReport) -> str:
    """The colours of the bars, with their figures: a line for each part of the ledger."""
    rows = []
    for name in LEDGER_ORDER:
        values = [_milliseconds(report, name) for report in (full, split)]
        if any(values):
            swatch = f'<span class="sl-swatch" style="background:{LEDGER_COLOURS[name]}"></span>{name}'
            rows.append((swatch, *(f"{value:.2f} ms" if value else "" for value in values)))
    return view.table(view.head_row("Part", "full", "split"), rows, TITLE)


def _milliseconds(report: ArmReport, name: str) -> float:
    metrics = report.metrics
    return metrics.decode_ledger.get(name, 0.0) / max(1, metrics.n_tokens - 1) * 1e3

"""Where the time of a decoded token went: a stacked bar for each arm, from the ledger."""

from typing import Any

from splitlearn.arms.runs import ArmReport
from splitlearn.metrics import LEDGER_ORDER
from splitlearn.reporting.charts import PART_COLOURS, new_figure
from ui.compare import view

TITLE = "Time per token after the first, ms"


def ledger(full: ArmReport, split: ArmReport) -> Any:
    """Milliseconds per token after the first, by where they went; the two bars share one axis from zero."""
    figure = new_figure(TITLE, height=170)
    for name in LEDGER_ORDER:
        values = [_milliseconds(report, name) for report in (split, full)]
        if any(values):
            figure.add_bar(
                x=values,
                y=["split", "full"],
                name=name,
                orientation="h",
                marker_color=PART_COLOURS[name],
                hovertemplate=f"{name}: %{{x:.2f}} ms<extra></extra>",
            )
    figure.update_layout(barmode="stack")
    return figure


def legend(full: ArmReport, split: ArmReport) -> str:
    """The colours of the bars, with their figures: a line for each part of the ledger."""
    rows = []
    for name in LEDGER_ORDER:
        values = [_milliseconds(report, name) for report in (full, split)]
        if any(values):
            swatch = f'<span class="sl-swatch" style="background:{PART_COLOURS[name]}"></span>{name}'
            rows.append((swatch, *(f"{value:.2f} ms" if value else "" for value in values)))
    return view.table(view.head_row("Part", "full", "split"), rows, TITLE)


def _milliseconds(report: ArmReport, name: str) -> float:
    metrics = report.metrics
    return metrics.decode_ledger.get(name, 0.0) / max(1, metrics.n_tokens - 1) * 1e3

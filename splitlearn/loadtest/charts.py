"""The charts of a load test, as plotly figures: how TTFT and TPOT are distributed, each request, tokens over time."""

from collections.abc import Mapping, Sequence
from typing import Any

from splitlearn.loadtest.driver import Measured, Outcome, State
from splitlearn.loadtest.plan import Levels
from splitlearn.reporting.charts import new_figure

# Okabe and Ito's palette; the symbol tells them apart, too.
COLOURS: Mapping[State, str] = {
    **{"done": "#0072b2", "rejected": "#d55e00", "failed": "#cc3311", "incomplete": "#808890"}
}
SYMBOLS: Mapping[State, str] = {**{"done": "circle", "rejected": "x", "failed": "diamond", "incomplete": "triangle-up"}}
BINS = 60
HEIGHT = 320
UNDER: Mapping[str, Any] = {"orientation": "h", "y": -0.25}
"""Where a legend lies: under its chart."""


def distributions(measured: Measured, levels: Levels) -> list[Any]:
    """For TTFT and TPOT: the share of requests at or below each time, with the service level as a dashed line."""
    found = (
        ("TTFT", [outcome.ttft_s for outcome in measured.outcomes], levels.ttft_s),
        ("TPOT", [outcome.tpot_s for outcome in measured.outcomes], levels.tpot_s),
    )
    return [_share(name, [value for value in values if value is not None], level) for name, values, level in found]


def requests(measured: Measured) -> Any:
    """Each request at its arrival: its TTFT if it was begun to be answered, otherwise when it was given up."""
    figure = _figure("each request: ms to the first token, or to the refusal", "arrival, s", UNDER)
    for state, colour in COLOURS.items():
        chosen = [outcome for outcome in measured.outcomes if outcome.state == state]
        if chosen:
            figure.add_scatter(
                x=[outcome.arrived_s for outcome in chosen],
                y=[_shown(outcome) * 1e3 for outcome in chosen],
                mode="markers",
                name=f"{state} ({len(chosen)})",
                marker={"color": colour, "symbol": SYMBOLS[state], "size": 7, "opacity": 0.7},
                hovertemplate="arrived at %{x:.2f} s: %{y:.0f} ms<extra>" + state + "</extra>",
            )
    return figure


def throughput(measured: Measured) -> Any:
    """Tokens per second of all clients together, over time."""
    width = measured.duration_s / BINS
    counts = [0] * BINS
    for at in (at for outcome in measured.outcomes for at in outcome.token_s if at < measured.duration_s):
        counts[min(BINS - 1, int(at / width))] += 1
    middles = [(index + 0.5) * width for index in range(BINS)]
    figure = _figure("TPS (system) over time", "s")
    figure.add_scatter(x=middles, y=[count / width for count in counts], mode="lines", line={"color": COLOURS["done"]})
    figure.update_yaxes(rangemode="tozero")
    return figure


def _share(name: str, values: Sequence[float], level: float) -> Any:
    ordered = sorted(value * 1e3 for value in values)
    figure = _figure(f"{name}: share of {len(values)} requests within so many ms", "ms")
    figure.add_scatter(
        x=ordered,
        y=[(index + 1) / len(ordered) for index in range(len(ordered))],
        mode="lines",
        line={"color": COLOURS["done"], "shape": "hv"},
        hovertemplate="%{y:.1%} within %{x:.0f} ms<extra></extra>",
    )
    figure.add_vline(x=level * 1e3, line={"color": COLOURS["rejected"], "dash": "dash", "width": 1.5})
    figure.update_yaxes(range=[0, 1.02], tickformat=".0%")
    figure.update_xaxes(type="log", dtick="D1")
    return figure


def _shown(outcome: Outcome) -> float:
    return outcome.ttft_s if outcome.ttft_s is not None else outcome.ended_s - outcome.arrived_s


def _figure(title: str, below: str, legend: Mapping[str, Any] | None = None) -> Any:
    figure = new_figure(title, HEIGHT, legend)
    figure.update_xaxes(title={"text": below})
    return figure

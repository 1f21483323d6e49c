"""Charts of a load test, as plotly figures: distributions of TTFT and TPOT, each request, tokens over time."""

from collections.abc import Mapping, Sequence
from typing import Any

from splitlearn.loadtest.driver import Measurement, Outcome, State
from splitlearn.loadtest.plan import Levels
from splitlearn.reporting.charts import new_figure

# Okabe and Ito's palette. Each state has its own symbol, too.
COLOURS: Mapping[State, str] = {
    **{"done": "#0072b2", "rejected": "#d55e00", "failed": "#cc3311", "incomplete": "#808890"}
}
SYMBOLS: Mapping[State, str] = {**{"done": "circle", "rejected": "x", "failed": "diamond", "incomplete": "triangle-up"}}
BINS = 60
HEIGHT = 320
UNDER: Mapping[str, Any] = {"orientation": "h", "y": -0.25}
"""Puts a legend under its chart."""


def distributions(measurement: Measurement, levels: Levels) -> list[Any]:
    """The share of requests at or below each TTFT and each TPOT; a dashed line is the service level."""
    found = (
        ("TTFT", [outcome.ttft_s for outcome in measurement.outcomes], levels.ttft_s),
        ("TPOT", [outcome.tpot_s for outcome in measurement.outcomes], levels.tpot_s),
    )
    return [_share(name, [value for value in values if value is not None], level) for name, values, level in found]


def requests(measurement: Measurement) -> Any:
    """Each request at its arrival: its TTFT, or the time until it ended without a token."""
    figure = _figure("each request: ms to the first token, or to the refusal", "arrival, s", UNDER)
    for state, colour in COLOURS.items():
        chosen = [outcome for outcome in measurement.outcomes if outcome.state == state]
        if chosen:
            figure.add_scatter(
                x=[outcome.arrived_s for outcome in chosen],
                y=[_time_s(outcome) * 1e3 for outcome in chosen],
                mode="markers",
                name=f"{state} ({len(chosen)})",
                marker={"color": colour, "symbol": SYMBOLS[state], "size": 7, "opacity": 0.7},
                hovertemplate="arrived at %{x:.2f} s: %{y:.0f} ms<extra>" + state + "</extra>",
            )
    return figure


def throughput(measurement: Measurement) -> Any:
    """Tokens per second of all clients together, over time."""
    width = measurement.duration_s / BINS
    counts = [0.0] * BINS
    for outcome in measurement.outcomes:
        for at in (at for at in outcome.token_s if at < measurement.duration_s):
            counts[min(BINS - 1, int(at / width))] += outcome.tokens / len(outcome.token_s)
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


def _time_s(outcome: Outcome) -> float:
    return outcome.ttft_s if outcome.ttft_s is not None else outcome.ended_s - outcome.arrived_s


def _figure(title: str, below: str, legend: Mapping[str, Any] | None = None) -> Any:
    figure = new_figure(title, HEIGHT, legend)
    figure.update_xaxes(title={"text": below})
    return figure

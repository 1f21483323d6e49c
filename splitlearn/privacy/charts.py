"""The chart of a sweep, as a plotly figure: recall against the depth of the cut."""

from collections.abc import Sequence
from typing import Any

from splitlearn.privacy.picture import BASELINE, COLOURS
from splitlearn.privacy.summary import Line
from splitlearn.reporting.charts import new_figure

DASHES, SYMBOLS = ("solid", "dash", "dot", "dashdot"), ("circle", "square", "diamond", "cross")
"""One for each defence, and for whether it is known."""


def depth(lines: Sequence[Line]) -> Any:
    """The share of prompt tokens that each attack recovers, with its 95% interval, by the layers before the trunk."""
    shown = [line for line in lines if line.prompt is not None and line.cut]
    attacks, defences = (list(dict.fromkeys(getattr(line, name) for line in shown)) for name in ("attack", "against"))
    figure = new_figure("Prompt tokens recovered, %", 340, {"orientation": "h", "y": -0.2})
    for number, attack in enumerate(attacks):
        for at, against in enumerate(defences):
            own = sorted((line for line in shown if (line.attack, line.against) == (attack, against)), key=_cut)
            if own:
                style = (COLOURS[number % len(COLOURS)], DASHES[at % len(DASHES)], SYMBOLS[at % len(SYMBOLS)])
                figure.add_scatter(name=f"attack {attack}, {against}", **_points(own), **_styled(*style))
    for line in lines:
        if line.prompt is not None and not line.cut:
            dash = {"color": BASELINE, "dash": "dot", "width": 1}
            figure.add_hline(y=100 * line.prompt.value, line=dash, annotation_text=f"{line.attack}, no states")
    cuts = sorted({line.cut for line in shown})
    figure.update_xaxes(title="layers at the client before the trunk", type="log", tickvals=cuts, ticktext=cuts)
    figure.update_yaxes(range=[-3, 103])
    return figure


def _cut(line: Line) -> int:
    return line.cut


def _points(own: Sequence[Line]) -> dict[str, Any]:
    shares = [line.prompt for line in own if line.prompt is not None]
    return {
        "x": [line.cut for line in own],
        "y": [100 * share.value for share in shares],
        "error_y": {
            "type": "data",
            "array": [100 * (share.high - share.value) for share in shares],
            "arrayminus": [100 * (share.value - share.low) for share in shares],
            "thickness": 1,
        },
        "hovertemplate": "%{y:.1f}% behind %{x} layers",
    }


def _styled(colour: str, dash: str, symbol: str) -> dict[str, Any]:
    return {"mode": "lines+markers", "line": {"color": colour, "dash": dash}, "marker": {"symbol": symbol, "size": 8}}

"""The look that all charts share, as plotly's settings. Backgrounds are transparent: a page may be light or dark."""

from collections.abc import Mapping
from typing import Any

import plotly.graph_objects as go

GRID = "rgba(128,128,128,0.35)"
# Okabe and Ito's palette where it lasts: readers who see colours differently, and both themes, can tell these apart.
PART_COLOURS: Mapping[str, str] = {
    **{"tokenise": "#8c8c8c", "open": "#b0b0b0", "draft": "#44aa99", "model": "#0072b2"},
    **{"bottom": "#56b4e9", "encode": "#f0e442"},
    **{"wire": "#d55e00", "queue": "#999933", "trunk": "#009e73", "decode": "#e69f00"},
    **{"recover": "#cc3311", "top": "#5a7fd0"},
    **{"sample": "#cc79a7", "emit": "#882255", "unattributed": "#a0a0a0"},
}
"""The colour of each part of a time breakdown (`splitlearn.metrics.LEDGER_ORDER`)."""


def new_figure(title: str, height: int, legend: Mapping[str, Any] | None = None) -> Any:
    """An empty plotly figure, `height` pixels high. `legend` is where its legend lies; without one it has none."""
    figure = go.Figure()
    figure.update_layout(
        height=height,
        showlegend=legend is not None,
        legend=dict(legend or {}),
        title={"text": title, "font": {"size": 13}, "x": 0.01},
        font={"family": "system-ui, sans-serif", "size": 12},
        margin={"l": 8, "r": 12, "t": 34, "b": 8},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
    )
    figure.update_xaxes(gridcolor=GRID, zeroline=False, automargin=True, fixedrange=True)
    figure.update_yaxes(gridcolor=GRID, zerolinecolor=GRID, automargin=True, fixedrange=True)
    return figure

"""A report as one HTML file that needs nothing beside it. Text from outside is escaped."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import plotly.io
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from plotly.offline import get_plotlyjs

SHELL = Path(__file__).parent


def render(template: Path, *, plotly: bool = True, **values: Any) -> str:
    """The page that `template` makes of `values`. It extends page.html.jinja (blocks: style, header, main).

    With `plotly` it has plotly's script, 4.8 MB.
    """
    environment = Environment(
        loader=FileSystemLoader([template.parent, SHELL]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    return environment.get_template(template.name).render(plotly_js=get_plotlyjs() if plotly else "", **values)


def chart_html(figures: Sequence[Any]) -> list[str]:
    """Each plotly figure as a part of a page that has plotly's script."""
    return [
        plotly.io.to_html(
            figure,
            include_plotlyjs=False,
            full_html=False,
            default_height=f"{figure.layout.height}px",
            config={"responsive": True, "displayModeBar": False},
        )
        for figure in figures
    ]

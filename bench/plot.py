"""Draw the ratios of a results table: a point with its interval for each row, and a line at 1."""

import re
from collections.abc import Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

import matplotlib

matplotlib.use("svg")

from matplotlib import pyplot  # noqa: E402  (after the choice of the backend)
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.ticker import MaxNLocator, NullLocator, StrMethodFormatter  # noqa: E402

# A cell with a ratio (str of splitlearn.lab.stats.Effect), and the unit in the head of a column of times.
RATIO = re.compile(r"([\d.]+) \[([\d.]+), ([\d.]+)\], \d+ pairs")
TIMES = re.compile(r", m?s\b")
WIDTH, LABELS, HEADING, ROW = 4.0, 3.0, 1.0, 0.28
"""Inches: width of a column of ratios and of the row names, height of the margins and of a row."""
LETTERS = 44
"""Letters on one line of a row's name."""
Rows = Sequence[dict[str, Any]]


def draw(path: Path, rows: Rows) -> bool:
    """Write an SVG of the columns of `rows` that have ratios. Returns False, and writes nothing, if none has."""
    columns = [head for head in rows[0] if RATIO.fullmatch(str(rows[0][head]))]
    if not columns:
        return False
    pyplot.rcParams.update({"svg.hashsalt": path.stem, "svg.fonttype": "none", "font.size": 9})
    naming = _naming(rows)
    names = [_name(row, naming) for row in rows]
    lines = max(name.count("\n") + 1 for name in names)
    size = LABELS + WIDTH * len(columns), HEADING + ROW * lines * len(rows)
    figure, axes = pyplot.subplots(1, len(columns), sharey=True, squeeze=False, figsize=size, layout="constrained")
    for axis, head in zip(axes[0], columns, strict=True):
        _intervals(axis, head, [str(row[head]) for row in rows])
    axes[0][0].set_yticks(range(len(rows)), names)
    axes[0][0].set_ylabel(", ".join(naming))
    axes[0][0].invert_yaxis()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
    return True


def _intervals(axis: Axes, head: str, cells: Sequence[str]) -> None:
    found = {at: RATIO.fullmatch(cell) for at, cell in enumerate(cells)}
    for at, match in found.items():
        if match is not None:
            ratio, low, high = map(float, match.groups())
            axis.errorbar(ratio, at, xerr=[[ratio - low], [high - ratio]], fmt="o", color="#0072b2", markersize=4)
    axis.axvline(1, color="#808080", linewidth=1)
    axis.set(xscale="log", title=head)
    axis.xaxis.set_major_locator(MaxNLocator(6))  # a short logarithmic axis may have no power of ten but 1
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.grid(axis="x", color="#e0e0e0", linewidth=0.5)


def _naming(rows: Rows) -> list[str]:
    """The columns that name a row: those before the first one of times or ratios."""
    heads = list(rows[0])
    ends = (at for at, head in enumerate(heads) if TIMES.search(head) or RATIO.fullmatch(str(rows[0][head])))
    return heads[: next(ends, 0)]


def _name(row: dict[str, Any], heads: Sequence[str]) -> str:
    return fill(re.sub(r",(?=\S)", ", ", ", ".join(str(row[head]) for head in heads)), LETTERS)

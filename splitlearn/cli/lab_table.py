"""The flags table on a terminal."""

from collections.abc import Sequence

from splitlearn.lab.analysis.flags_table import ArmCells, FlagRow, Ratio
from splitlearn.runtime.console import PlainTable


def flags_rows(rows: Sequence[FlagRow]) -> PlainTable:
    """A line for each row and kind of arm."""
    table = PlainTable("flags", "arm", "n", "TTFT ms", "TPOT ms", "TPS", "TTFT ratio", "TPOT ratio", "verdicts")
    for row in rows:
        for kind, cells in row.cells.items():
            table.add_row(row.name, kind, *_figures(cells))
    return table


def _figures(cells: ArmCells) -> tuple[str, ...]:
    if cells.unavailable:
        return "", "", "", "", "", "", f"unavailable: {cells.unavailable}"
    count = "first pass" if cells.first_pass and cells.n else str(cells.n or "")
    verdicts = [
        f"{name}: {found.verdict}" for name, found in (("TTFT", cells.ttft_ratio), ("TPOT", cells.tpot_ratio)) if found
    ]
    return (
        count,
        _milliseconds(cells.ttft_s),
        _milliseconds(cells.tpot_s),
        "" if cells.tps is None else f"{cells.tps:.1f}",
        _ratio(cells.ttft_ratio),
        _ratio(cells.tpot_ratio),
        "\n".join(verdicts),
    )


def _milliseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e3:.1f}"


def _ratio(found: Ratio | None) -> str:
    if found is None or found.ratio is None:
        return ""
    interval = " [{:.2f}, {:.2f}]".format(*found.interval) if found.interval else ""
    return f"{found.ratio:.2f}{interval}"

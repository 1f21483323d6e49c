"""The flags table as HTML: the effect of each flag, full beside split. The figures come from `flags_table`."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape

from splitlearn.events import KINDS, Kind
from splitlearn.lab.analysis.flags_table import ArmCells, FlagRow, FlagsTable, Ratio
from splitlearn.metrics import LEDGER_ORDER
from ui.format import MISSING
from ui.html import folded, head_row, small, table, term

EMPTY = (
    "Press Compare flags to see what leaving out each flag costs, in full and in split. The first figures come within "
    "seconds and get more precise until you press Stop."
)
NOWHERE = "does not act here"
ONE_RUN = (
    "Each row has one run so far, so its ratio may be chance: how far, the controls below show. It gets an interval "
    "once the runs repeat."
)
FIRST_RUN = "first run only"
WIDTH, HEIGHT = 72, 14
LEAST_SPAN = math.log(1.25)  # the axis shows at least 0.8 to 1.25
ORDERS = [("As listed", "listed"), ("Largest effect on TPOT first", "effect")]
RATIO_OF = {
    "without": "time without the flag / time with all flags; above 1, the flag helps",
    "alone": "time with this flag alone / time without it; below 1, the flag helps",
    "ladder": "time with the flags up to this one / time with those before",
}


def plain(value: float | None) -> str:
    """A figure in three digits. Its unit is in the column's head."""
    if value is None:
        return MISSING
    return f"{value:.{0 if value >= 99.95 else 1 if value >= 9.995 else 2}f}"


RATIOS = {
    "TPOT ratio": "Geometric mean of the pairs with its interval; the axis is logarithmic, the line is 1",
    "Verdict on TPOT": "Verdict of the pairs so far",
    "TTFT ratio": "Geometric mean of the pairs with its interval",
}
COLUMNS: Mapping[str, tuple[str, Callable[[ArmCells], str]]] = {
    "TTFT, ms": ("Time to first token, median", lambda cells: plain(_times(cells.ttft_s, 1e3))),
    "TPOT, ms": ("Time per output token after the first, median", lambda cells: plain(_times(cells.tpot_s, 1e3))),
    "TPS, tokens/s": (
        "Tokens per second of the whole request. Those after the first are 1 / TPOT.",
        lambda cells: plain(cells.tps),
    ),
    "Load, s": ("Time to load the weights", lambda cells: plain(cells.load_s)),
    "Added, MB": (
        "Peak memory beyond the imports; for split, client plus trunk",
        lambda cells: plain(_times(cells.added_bytes, 1e-6)),
    ),
    "n": (
        "Runs behind the medians; “first” is that of the first pass, which does not count",
        lambda cells: "first" if cells.first_pass else str(cells.n),
    ),
}


def section(found: FlagsTable | None, order: str = "listed") -> str:
    """The whole table; before the first figures, a text on what it will show."""
    if found is None:
        return f'<section class="sl-result" aria-label="Flags">{small(EMPTY)}</section>'
    rows = _ordered(found.rows, order)
    axis = _axis((*found.rows, *found.controls))
    what = f"{found.model}; ratios are {RATIO_OF[found.design]}. {found.blocks} whole blocks."
    controls = _table(found.controls, axis, "Controls") if found.controls else ""
    return (
        f'<section class="sl-result sl-flag-table" aria-label="Flags">{_summary(found)}'
        f"{_table(rows, axis, 'Flags, full and split')}"
        f"{small(what)}{small(_left_out(found))}{folded('Controls: identical arms', controls)}</section>"
    )


def changes(found: FlagsTable) -> str:
    """For each row the change in each part of a token's time, and the command that measures it beside its baseline."""
    rows = "".join(folded(row.name, _change(row)) for row in found.rows)
    return (
        "<h3>What each row changed in a token's time, and the command that measures it again beside its baseline</h3>"
        f"{rows}"
    )


def _summary(found: FlagsTable) -> str:
    """Which flags pay where, as far as that is decided; a warning while every row has one run."""
    flags = [row for row in found.rows if row.role == "flag"]
    faster = {kind: [row.flag for row in flags if _is_faster(row.cells.get(kind))] for kind in KINDS}
    full, split = faster["full"], faster["split"]
    lists = {
        "Faster in both arms": [flag for flag in split if flag in full],
        "Faster in split only": [flag for flag in split if flag not in full],
        "Faster in full only": [flag for flag in full if flag not in split],
        "Acts in split only": [row.flag for row in flags if set(row.cells) == {"split"}],
    }
    lines = [f"{what}: {', '.join(names)}." for what, names in lists.items() if names]
    if any(cells.first_pass for row in flags for cells in row.cells.values()):
        lines.insert(0, ONE_RUN)
    return "".join(map(small, lines))


def _is_faster(cells: ArmCells | None) -> bool:
    ratio = cells.tpot_ratio if cells else None
    return ratio is not None and ratio.decided and ratio.verdict == "faster"


def _left_out(found: FlagsTable) -> str:
    """The arms that cannot run, with their reasons."""
    cells = [cells for row in found.rows for cells in row.cells.values() if cells.unavailable]
    arms = [f"{each.arm} ({each.unavailable})" for each in cells]
    return f"Left out: {'; '.join(arms)}." if arms else ""


def _ordered(rows: Sequence[FlagRow], order: str) -> list[FlagRow]:
    """Baselines first; then the flags as listed, or the one whose ratio is farthest from 1."""
    if order != "effect":
        return list(rows)
    return sorted(rows, key=lambda row: -_effect(row) if row.role == "flag" else -math.inf)


def _effect(row: FlagRow) -> float:
    ratios = [cells.tpot_ratio.ratio for cells in row.cells.values() if cells.tpot_ratio and cells.tpot_ratio.ratio]
    return max((abs(math.log(ratio)) for ratio in ratios), default=0.0)


def _axis(rows: Iterable[FlagRow]) -> tuple[float, float]:
    """The ends of the shared log axis: as wide as the data, and including 1."""
    found = [cells.tpot_ratio for row in rows for cells in row.cells.values() if cells.tpot_ratio]
    ends = [at for each in found for at in (each.ratio, *(each.interval or ())) if at]
    logs = [math.log(at) for at in ends]
    return min([-LEAST_SPAN, *logs]), max([LEAST_SPAN, *logs])


def _table(rows: Iterable[FlagRow], axis: tuple[float, float], name: str) -> str:
    listed = [(_name(row), *_cells(row, axis)) for row in rows]
    return table(_head(name), listed, name)


def _head(where: str) -> str:
    """Two header rows: the name of each pair of columns, then full and split."""
    groups = "".join(f'<th scope="colgroup" colspan="2">{_column(group, where)}</th>' for group in (*RATIOS, *COLUMNS))
    kinds = "".join(f'<th scope="col">{kind}</th>' for kind in KINDS) * (len(RATIOS) + len(COLUMNS))
    return f'<tr><th scope="col" rowspan="2">Flags</th>{groups}</tr><tr>{kinds}</tr>'


def _column(group: str, where: str) -> str:
    return term(group, RATIOS.get(group) or COLUMNS[group][0], f"{where}-{group}")


def _name(row: FlagRow) -> str:
    return f'<span class="sl-row-{row.role}">{escape(row.name)}</span>'


def _cells(row: FlagRow, axis: tuple[float, float]) -> list[str]:
    written: list[Callable[[Kind, ArmCells], str]] = [
        lambda kind, cells: _bar(kind, cells.tpot_ratio, axis),
        lambda _, cells: _verdict(cells),
        lambda _, cells: _ratio(cells.ttft_ratio),
        *(_figure(figure) for _, figure in COLUMNS.values()),
    ]
    return [each(kind, row.cells[kind]) if kind in row.cells else NOWHERE for each in written for kind in KINDS]


def _figure(figure: Callable[[ArmCells], str]) -> Callable[[Kind, ArmCells], str]:
    return lambda _, cells: f'<span class="sl-figure">{escape(figure(cells))}</span>'


def _times(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor


def _verdict(cells: ArmCells) -> str:
    if cells.unavailable:
        return "unavailable"
    if cells.first_pass and cells.tpot_ratio:
        return FIRST_RUN
    return escape(cells.tpot_ratio.verdict) if cells.tpot_ratio else MISSING


def _ratio(found: Ratio | None) -> str:
    if found is None or found.ratio is None:
        return MISSING
    interval = "<small> {:.2f} to {:.2f}</small>".format(*found.interval) if found.interval else ""
    return f'<span class="sl-ratio">{found.ratio:.2f}\N{MULTIPLICATION SIGN}{interval}</span>'


def _bar(kind: Kind, found: Ratio | None, axis: tuple[float, float]) -> str:
    """A point with its interval on the log axis, and the figures."""
    if found is None or found.ratio is None:
        return MISSING

    def x(value: float) -> float:
        return 4 + (math.log(value) - axis[0]) / (axis[1] - axis[0]) * (WIDTH - 8)

    low, high = found.interval or (found.ratio, found.ratio)
    middle = HEIGHT / 2
    return (
        f'<svg class="sl-interval sl-of-{kind}" viewBox="0 0 {WIDTH} {HEIGHT}" aria-hidden="true">'
        f'<line class="sl-one" x1="{x(1):.1f}" x2="{x(1):.1f}" y1="0" y2="{HEIGHT}"/>'
        f'<line class="sl-range" x1="{x(low):.1f}" x2="{x(high):.1f}" y1="{middle}" y2="{middle}"/>'
        f'<circle cx="{x(found.ratio):.1f}" cy="{middle}" r="4"/></svg>{_ratio(found)}'
    )


def _change(row: FlagRow) -> str:
    """The change against the row that it is compared with, part by part, and the command."""
    parts = {kind: cells.breakdown_change_us or {} for kind, cells in row.cells.items()}
    names = [name for name in LEDGER_ORDER if any(name in of for of in parts.values())]
    rows = [(name, *(_microseconds(parts.get(kind, {}).get(name)) for kind in KINDS)) for name in names]
    changed = table(head_row("Part", *KINDS), rows, f"What {row.name} changed") if rows else ""
    return f"{changed}<pre>{escape(row.command)}</pre>"


def _microseconds(value: float | None) -> str:
    return MISSING if value is None else f"{value:+.0f} \N{MICRO SIGN}s"

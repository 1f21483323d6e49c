"""What the page shows of flags: badges, the matrix of flag by side, and the per-flag table."""

import math
from html import escape
from typing import Any

from splitlearn.flags import FLAGS, SIDES, Flag, Side
from splitlearn.lab.table import Snapshot
from splitlearn.selection import Availability, FlagSet
from ui.format import MISSING, rate, seconds, size
from ui.view import head_row, table

_MEASURED = {"Load": ("load_s", seconds), "Added memory": ("added_bytes", size), "TTFT": ("ttft_s", seconds)} | {
    "TPOT": ("tpot_s", seconds),
    "TPS (request)": ("tps", rate),
}


def about(flag: Flag, why_not: str | None) -> str:
    """The line under a flag's control: what it does, the sides that it acts on, its fidelity."""
    sides = "".join(f'<span class="sl-badge">{side}</span>' for side in SIDES if side in flag.sides)
    reason = f"<b>Unavailable: {escape(why_not)}.</b> " if why_not else ""
    fidelity = f'<span class="sl-badge sl-{flag.fidelity}">{flag.fidelity}</span>'
    return f'<p class="sl-small">{reason}{escape(flag.help)}</p>{sides}{fidelity}'


def matrix(known: Availability, applied: FlagSet) -> str:
    """Flag by side: applied, available, or unavailable and why."""
    rows = (
        (f"<code>{name}</code>", flag.fidelity, *(_cell(name, side, known, applied) for side in SIDES))
        for name, flag in FLAGS.items()
    )
    return table(head_row("Flag", "Fidelity", *SIDES), rows, "Flags by side")


def measured(snapshot: Snapshot) -> str:
    """The per-flag table as far as it is: a line for each row, full beside split in each column."""
    groups = "".join(f'<th scope="colgroup" colspan="2">{name}</th>' for name in _MEASURED)
    sides = '<th scope="col">full</th><th scope="col">split</th>' * len(_MEASURED)
    head = (
        f'<tr><th scope="col" rowspan="2">Row</th><th scope="col" rowspan="2">n</th>{groups}'
        f'<th scope="col" rowspan="2">Same tokens</th></tr><tr>{sides}</tr>'
    )
    rows = (_line(line) for line in snapshot.frame.to_dict("records"))
    return table(head, rows, "Per-flag table")


def progress(snapshot: Snapshot, repeats: int, state: str) -> str:
    """How far the table is, as a bar and in words."""
    each = max(1, snapshot.total // repeats)
    now = min(repeats, snapshot.done // each + 1)
    last = f"; last: {escape(snapshot.label)}" if snapshot.label else ""
    said = f"{state}: {snapshot.done} of {snapshot.total} runs, repeat {now} of {repeats}{last}"
    return (
        f'<div class="sl-progress"><progress value="{snapshot.done}" max="{snapshot.total}" '
        f'aria-label="Runs done"></progress><span role="status">{said}</span></div>'
    )


def _cell(name: str, side: Side, known: Availability, applied: FlagSet) -> str:
    reason = known[side][name]
    if reason:
        return f'<span class="sl-off">unavailable: {escape(reason)}</span>'
    texts = [text for text in applied.of(side) if text.partition("=")[0] == name]
    if not texts:
        return "available"
    choice = texts[0].partition("=")[2] or FLAGS[name].applied
    return '<b class="sl-on">applied</b>' + (f" ({escape(choice)})" if choice != "on" else "")


def _line(line: dict[Any, Any]) -> list[str]:
    cells = [
        written(_known(line[f"{kind}_{column}"]))
        for column, written in _MEASURED.values()
        for kind in ("full", "split")
    ]
    same = {True: "yes", False: "no"}.get(line["identical_tokens"], MISSING)
    reason = (
        f'<br><span class="sl-off">unavailable: {escape(line["unavailable"])}</span>' if line["unavailable"] else ""
    )
    return [escape(line["row"]) + reason, str(line["repeats"]), *cells, same]


def _known(value: Any) -> float | None:
    """pandas turns None into NaN in a column of numbers."""
    return None if value is None or math.isnan(value) else float(value)

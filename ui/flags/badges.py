"""Flags as HTML: help line with badges, and the matrix of flag by side."""

from collections.abc import Mapping
from html import escape

from splitlearn.flags.registry import FLAGS, SIDES, Flag, Side
from splitlearn.flags.selection import Availability, FlagSet
from ui.html import folded, head_row, table


def about(flag: Flag, why_not: str | None) -> str:
    """The line under a flag's control: its help, its sides and its fidelity."""
    sides = "".join(f'<span class="sl-badge">{side}</span>' for side in SIDES if side in flag.sides)
    reason = f"<b>Unavailable: {escape(why_not)}.</b> " if why_not else ""
    fidelity = f'<span class="sl-badge sl-{flag.fidelity}">{flag.fidelity}</span>'
    return f'<p class="sl-small">{reason}{escape(flag.help)}</p>{sides}{fidelity}'


def cannot(reasons: Mapping[str, str]) -> str:
    """A folded list of the flags that can act on no side here, with their reasons."""
    items = "".join(
        f"<li><div><b>{escape(FLAGS[name].label)}</b></div>{about(FLAGS[name], why)}</li>"
        for name, why in reasons.items()
    )
    return folded(f"Flags that cannot act here: {len(reasons)}", f"<ul>{items}</ul>" if items else "")


def matrix(known: Availability, applied: FlagSet) -> str:
    """A table of flag by side: applied, available, or why it is unavailable."""
    rows = (
        (f"<code>{name}</code>", flag.fidelity, *(_cell(name, side, known, applied) for side in SIDES))
        for name, flag in FLAGS.items()
    )
    return table(head_row("Flag", "Fidelity", *SIDES), rows, "Flags by side")


def _cell(name: str, side: Side, known: Availability, applied: FlagSet) -> str:
    reason = known[side][name]
    if reason:
        return f'<span class="sl-off">unavailable: {escape(reason)}</span>'
    texts = [text for text in applied.of(side) if text.partition("=")[0] == name]
    if not texts:
        return "available"
    choice = texts[0].partition("=")[2] or FLAGS[name].applied
    return '<b class="sl-on">applied</b>' + (f" ({escape(choice)})" if choice != "on" else "")

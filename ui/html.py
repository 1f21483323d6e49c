"""Pieces of HTML that every tab uses. Texts given to them are escaped here; what is called `cells` is HTML already."""

import re
from collections.abc import Iterable
from html import escape


def error(message: str) -> str:
    """The box that says what is wrong; empty when nothing is."""
    return f'<div class="sl-error" role="alert">{escape(message)}</div>' if message else ""


def note(message: str) -> str:
    """Something a visitor should know; empty when there is nothing."""
    linked = re.sub(r"https?://[^\s<]+", lambda url: f'<a href="{url[0]}">{url[0]}</a>', escape(message))
    return f'<div class="sl-note" role="status">{linked}</div>' if message else ""


def small(text: str) -> str:
    """A line in small letters."""
    return f'<p class="sl-small">{escape(text)}</p>' if text else ""


def term(name: str, definition: str, where: str) -> str:
    """A word with its definition, which shows under a pointer, a finger or the keyboard's focus.

    `where` tells apart the same word in two places of the page.
    """
    key = re.sub(r"\W+", "-", f"tip-{where}-{name}".lower())
    return (
        f'<span class="sl-term"><button type="button" aria-describedby="{key}">{escape(name)}</button>'
        f'<span role="tooltip" id="{key}">{escape(definition)}</span></span>'
    )


def tile(name: str, value: str, definition: str, where: str, style: str = "") -> str:
    """A figure with its name, whose definition is within reach. `value` is HTML."""
    return f'<div class="{style}"><dt>{term(name, definition, where)}</dt><dd>{value}</dd></div>'


def table(head: str, rows: Iterable[Iterable[str]], name: str) -> str:
    """A table that scrolls inside its own box; the first of each row's cells is its header. Cells are HTML."""
    body = "".join(
        f'<tr><th scope="row">{first}</th>{"".join(f"<td>{cell}</td>" for cell in rest)}</tr>' for first, *rest in rows
    )
    return (
        f'<div class="sl-scroll" tabindex="0" role="region" aria-label="{escape(name)}">'
        f'<table class="sl-table"><thead>{head}</thead><tbody>{body}</tbody></table></div>'
    )


def head_row(*cells: str) -> str:
    """One line of column headers."""
    listed = "".join(f'<th scope="col">{cell}</th>' for cell in cells)
    return f"<tr>{listed}</tr>"


def folded(name: str, inner: str, style: str = "") -> str:
    """`inner`, which is HTML, behind a line that opens it; empty when there is nothing to show."""
    return f'<details class="{style}"><summary>{escape(name)}</summary>{inner}</details>' if inner else ""

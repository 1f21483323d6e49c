"""HTML pieces for all tabs. Texts are escaped here, unless a docstring calls a parameter HTML."""

import re
from collections.abc import Iterable
from html import escape


def error(message: str) -> str:
    """An error box; empty without a message."""
    return f'<div class="sl-error" role="alert">{escape(message)}</div>' if message else ""


def note(message: str) -> str:
    """A note box, with links for addresses; empty without a message."""
    linked = re.sub(r"https?://[^\s<]+", lambda url: f'<a href="{url[0]}">{url[0]}</a>', escape(message))
    return f'<div class="sl-note" role="status">{linked}</div>' if message else ""


def status(text: str) -> str:
    """A live region. It is there before it has text, so that screen readers announce its changes."""
    return f'<p class="sl-status" role="status" aria-live="polite">{escape(text)}</p>'


def small(text: str) -> str:
    """A line in small letters."""
    return f'<p class="sl-small">{escape(text)}</p>' if text else ""


def term(name: str, definition: str, where: str) -> str:
    """A word with its definition as a tooltip for pointer, touch and keyboard.

    `where` makes its id unique if the word is on the page twice.
    """
    key = re.sub(r"\W+", "-", f"tip-{where}-{name}".lower())
    return (
        f'<span class="sl-term"><button type="button" aria-describedby="{key}">{escape(name)}</button>'
        f'<span role="tooltip" id="{key}">{escape(definition)}</span></span>'
    )


def tile(name: str, value: str, definition: str, where: str, style: str = "") -> str:
    """A figure with its name, which has a tooltip. `value` is HTML."""
    return f'<div class="{style}"><dt>{term(name, definition, where)}</dt><dd>{value}</dd></div>'


def table(head: str, rows: Iterable[Iterable[str]], name: str) -> str:
    """A table that scrolls in its own box. The first cell of a row is its header. Cells are HTML."""
    body = "".join(
        f'<tr><th scope="row">{first}</th>{"".join(f"<td>{cell}</td>" for cell in rest)}</tr>' for first, *rest in rows
    )
    return (
        f'<div class="sl-scroll" tabindex="0" role="region" aria-label="{escape(name)}">'
        f'<table class="sl-table"><thead>{head}</thead><tbody>{body}</tbody></table></div>'
    )


def head_row(*cells: str) -> str:
    """A row of column headers. Cells are HTML."""
    listed = "".join(f'<th scope="col">{cell}</th>' for cell in cells)
    return f"<tr>{listed}</tr>"


def folded(name: str, inner: str, style: str = "") -> str:
    """A collapsed block; empty without `inner`, which is HTML."""
    return f'<details class="{style}"><summary>{escape(name)}</summary>{inner}</details>' if inner else ""

"""Text output for people: the one place that knows of terminals, pipes and encodings.

Answers, prompts, names, paths and errors are other people's text, and are written as they are. Nothing in them is
markup or the name of an emoji. In a pipe or a file nothing is wrapped or cut. A character that the encoding lacks
becomes an escape. On a terminal, control characters become their pictures (ESC as U+241B), so text cannot move the
cursor, set a title or a clipboard. In pipes and files they stay.
"""

import os
import re
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TextIO

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

BROKEN_PIPE = 141
"""The exit status of a program whose reader has gone, as of one that SIGPIPE ends."""
WIDE = 100_000
STRICT = ("strict", "surrogateescape")
# All of C0 but tab, line feed and the CR before one; DEL; and C1, in which 0x9B begins sequences as ESC [ does.
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]|\r(?!\n)")


def console(*, stderr: bool = False) -> Console:
    """A console for tables and bars that interprets no markup; without a terminal, as wide as its content."""
    stream = _stream(stderr)
    terminal = _is_terminal(stream)
    width = None if terminal else WIDE
    return _Console(stderr=stderr, markup=False, emoji=False, highlight=False, soft_wrap=not terminal, width=width)


def say(text: str = "", *, end: str = "\n", stderr: bool = False) -> None:
    """Write `text` as it is. If stderr cannot be written, drop it: a lost message must not cost the result."""
    stream = _stream(stderr)
    if stream is None:
        return
    with suppress(*((OSError, ValueError) if stderr else ())):
        stream.write((visible(text) if _is_terminal(stream) else text) + end)
        stream.flush()


def visible(text: str) -> str:
    """`text` with a picture in the place of each control character, except tab and line feed."""
    return _CONTROL.sub(lambda found: _picture(ord(found[0])), text)


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Raise for stdout, where rich would end the program with status 1; `guarded` ends it. Ignore stderr."""
        if not self.stderr:
            raise BrokenPipeError


class PlainTable(Table):
    """A table whose cells are other people's text. Long cells fold; none is cut."""

    def __init__(self, *heads: str, **options: Any) -> None:
        super().__init__(**options)
        for head in heads:
            self.add_column(Text(head), overflow="fold")

    def add_row(self, *cells: RenderableType | None, **options: Any) -> None:
        """Add a row of strings, written as they are, or of rich's styled texts."""
        super().add_row(*(Text(_for_stdout(cell)) if isinstance(cell, str) else cell for cell in cells), **options)


def guarded(command: Callable[[], int]) -> int:
    """Run `command`, flush stdout, return the exit status: BROKEN_PIPE, silently, if the reader has gone."""
    try:
        try:
            return command()
        finally:
            if (out := _stream(stderr=False)) is not None:
                out.flush()
    except BrokenPipeError:
        with suppress(OSError, ValueError):  # so that the interpreter drops the rest of the buffer at its end
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE


def _stream(stderr: bool) -> TextIO | None:
    """stdout or stderr, None if the program has none. Sets it to escape what it cannot encode."""
    stream: Any = sys.stderr if stderr else sys.stdout
    if getattr(stream, "errors", None) in STRICT and hasattr(stream, "reconfigure"):
        stream.reconfigure(errors="backslashreplace")
    found: TextIO | None = stream
    return found


def _is_terminal(stream: TextIO | None) -> bool:
    try:
        return stream is not None and stream.isatty()
    except ValueError:  # closed
        return False


def _for_stdout(text: str) -> str:
    return visible(text) if _is_terminal(sys.stdout) else text


def _picture(code: int) -> str:
    if code < 0x20:
        return chr(0x2400 + code)
    return "\u2421" if code == 0x7F else f"\\x{code:02x}"

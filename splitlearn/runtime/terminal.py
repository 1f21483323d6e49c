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

BROKEN_PIPE = 141
"""The exit status of a program whose reader has gone, as of one that SIGPIPE ends."""
STRICT = ("strict", "surrogateescape")
# All of C0 but tab, line feed and the CR before one; DEL; and C1, in which 0x9B begins sequences as ESC [ does.
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]|\r(?!\n)")


def say(text: str = "", *, end: str = "\n", stderr: bool = False) -> None:
    """Write `text` as it is. If stderr cannot be written, drop it: a lost message must not cost the result."""
    stream = _stream(stderr)
    if stream is None:
        return
    with suppress(*((OSError, ValueError) if stderr else ())):
        stream.write((visible(text) if is_terminal(stderr=stderr) else text) + end)
        stream.flush()


def visible(text: str) -> str:
    """`text` with a picture in the place of each control character, except tab and line feed."""
    return _CONTROL.sub(lambda found: _picture(ord(found[0])), text)


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


def is_terminal(*, stderr: bool = False) -> bool:
    """Whether stdout, or stderr, is a terminal."""
    stream = _stream(stderr)
    try:
        return stream is not None and stream.isatty()
    except ValueError:  # closed
        return False


def _picture(code: int) -> str:
    if code < 0x20:
        return chr(0x2400 + code)
    return "\u2421" if code == 0x7F else f"\\x{code:02x}"

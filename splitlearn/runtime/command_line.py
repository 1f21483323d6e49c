"""Command lines, parsed by typer. What is wrong with one is said in one line, as every other error is.

A command's function turns its options into a `Job`, and `run` calls that: typer has a way of its own with Ctrl-C and
with a closed stdout, which is not to apply to work.
"""

import shutil
from collections.abc import Callable, Sequence
from typing import Any

import typer

from splitlearn.errors import InputError, SplitlearnError

Job = Callable[[], int | None]
WIDTH = 100


def program(**options: Any) -> typer.Typer:
    """A program without Rich's boxes, and without typer's tracebacks."""
    settings = {"terminal_width": min(WIDTH, shutil.get_terminal_size().columns)}  # click alone takes 50 at least
    return typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False, context_settings=settings, **options)


def run(app: typer.Typer, arguments: Sequence[str] | None, name: str) -> int:
    """Parse `arguments` (None: those of the process) and do what they ask. Returns the exit status.

    Raises SplitlearnError with one line for what cannot be parsed.
    """
    try:
        found = app(args=arguments, prog_name=name, standalone_mode=False)
    except typer.TyperException as error:
        said = " ".join(error.format_message().split()).removesuffix(".")
        said += "" if said.endswith("?") else ";"
        context = getattr(error, "ctx", None)  # of the command whose option is wrong
        command = context.command_path if context else name
        raise SplitlearnError(f"{said} `{command} --help` lists what there is.") from error
    except typer.Abort:
        raise KeyboardInterrupt from None
    status = found() if callable(found) else found
    return int(status or 0)


def whole(field: str) -> Callable[[str], int]:
    """A converter for an option: text that is no whole number is an InputError that names `field`."""
    return _number(field, int, "a whole number")


def real(field: str) -> Callable[[str], float]:
    """A converter for an option: text that is no number is an InputError that names `field`."""
    return _number(field, float, "a number")


def _number(field: str, kind: Callable[[str], Any], expected: str) -> Callable[[str], Any]:
    def convert(text: str) -> Any:
        try:
            return kind(text)
        except ValueError as error:
            raise InputError(field, text, expected) from error

    return convert

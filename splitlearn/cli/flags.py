"""`splitlearn flags`: which flags can be applied where."""

from typing import TYPE_CHECKING, Annotated

import typer

from splitlearn.cli import options
from splitlearn.runtime.command_line import Job

if TYPE_CHECKING:
    from splitlearn.config import Config

Markdown = Annotated[bool, typer.Option("--markdown", help="print docs/flags.md")]


def flags(markdown: Markdown = False, config: options.ConfigFile = None) -> Job:
    """List flags and where they can be applied."""
    settings = options.settings(config)
    return _print_page if markdown else lambda: _print_matrix(settings)


def _print_page() -> None:
    from splitlearn.flags import docs_page
    from splitlearn.runtime.terminal import say

    say(docs_page.markdown(), end="")


def _print_matrix(settings: "Config") -> None:
    from splitlearn.arms.runs import Runs
    from splitlearn.cli.tables import print_flags
    from splitlearn.flags.selection import parse
    from splitlearn.runtime.progress import on_console

    with on_console() as progress, Runs(settings, progress) as runs:
        # An embedded trunk would run here: there is no need to start one to know.
        known = runs.availability_here if settings.trunk.embedded else runs.availability()
        print_flags(known, parse(settings.flags, known))

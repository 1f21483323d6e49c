"""`splitlearn flags`: which flags can be applied where."""

import json
from typing import TYPE_CHECKING, Annotated

import typer

from splitlearn.cli import options
from splitlearn.errors import InputError
from splitlearn.runtime.command_line import Job

if TYPE_CHECKING:
    from splitlearn.config import Config

Markdown = Annotated[bool, typer.Option("--markdown", help="print docs/flags.md")]


def flags(markdown: Markdown = False, as_json: options.Json = False, config: options.ConfigFile = None) -> Job:
    """List flags and where they can be applied."""
    if markdown and as_json:
        raise InputError("argument", "--markdown", "it without --json")
    settings = options.settings(config)
    return _print_page if markdown else lambda: _print_matrix(settings, as_json)


def _print_page() -> None:
    from splitlearn.flags import docs_page
    from splitlearn.runtime.terminal import say

    say(docs_page.markdown(), end="")


def _print_matrix(settings: "Config", as_json: bool) -> None:
    from splitlearn.arms.runs import Runs
    from splitlearn.cli.tables import print_flags
    from splitlearn.flags import states
    from splitlearn.flags.selection import parse
    from splitlearn.planning.auto import without_figures
    from splitlearn.runtime.progress import on_console
    from splitlearn.runtime.terminal import say

    with on_console() as progress, Runs(settings, progress, without_figures) as runs:
        # An embedded trunk would run here: there is no need to start one to know.
        known = runs.availability_here if settings.trunk.embedded else runs.availability()
        applied = parse(settings.flags, known)
        if as_json:
            say(json.dumps(states.as_json(known, applied), indent=2))
        else:
            print_flags(known, applied)

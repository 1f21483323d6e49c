"""`splitlearn serve-trunk` and `splitlearn ui`: the server and the page, which are programs of their own."""

import os
import sys
from typing import Any

import typer
from typer.core import TyperGroup

from splitlearn.runtime import programs
from splitlearn.runtime.command_line import Job

PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
"""For typer: every option goes to the program, --help as well."""
APPS = {"serve-trunk": "server.__main__:app", "ui": "ui.app:app"}
"""Where the command lines of the two programs are defined."""


class Commands(TyperGroup):
    """The commands of `splitlearn`. For shell completion, those of the two programs are their own command lines."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:  # typer's types for these are private
        name, command, rest = super().resolve_command(ctx, args)
        if ctx.resilient_parsing and name in APPS:  # true for completion only
            command = typer.main.get_command(programs.own(APPS[name]))
        return name, command, rest


def serve_trunk(context: typer.Context) -> Job:
    """Serve the trunk (python -m server)."""
    return lambda: _become("server", context.args)


def ui(context: typer.Context) -> Job:
    """Open the page (python app.py)."""
    return lambda: _become("ui", context.args)


def _become(module: str, arguments: list[str]) -> None:
    """This process goes on as that program: one process, whose signals and terminal are its own."""
    sys.stdout.flush()
    os.execve(sys.executable, programs.command(module, *arguments), programs.environment())

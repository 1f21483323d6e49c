"""`splitlearn serve-trunk` and `splitlearn ui`: the server and the page, which are programs of their own."""

import os
import sys

import typer

from splitlearn.runtime import programs
from splitlearn.runtime.command_line import Job

ALL_OF_THEM = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
"""For typer: every option goes to the program, --help as well."""


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

"""The command line: `splitlearn COMMAND`, or `python -m splitlearn COMMAND`; a module of this package a command.

Results go to stdout, progress and errors to stderr. What cannot be done ends with status 2 and one line that says why.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

import splitlearn
from splitlearn.cli.attack import attack
from splitlearn.cli.compare import compare
from splitlearn.cli.export import export
from splitlearn.cli.flags import flags
from splitlearn.cli.lab import lab
from splitlearn.cli.loadtest import loadtest
from splitlearn.cli.models import app as models
from splitlearn.cli.models import fetch
from splitlearn.cli.parts import parts
from splitlearn.cli.plan import plan
from splitlearn.cli.programs import PASS_ON, Commands, serve_trunk, ui
from splitlearn.cli.report import report
from splitlearn.cli.serve import serve
from splitlearn.cli.token import token
from splitlearn.errors import SetupError, SplitlearnError
from splitlearn.runtime import collector, command_line, home
from splitlearn.runtime.terminal import guarded, say

NAME = "splitlearn"
COMPLETION = ("--install-completion", "--show-completion")
app = command_line.program(cls=Commands, help="Compare full and split inference of a causal language model.")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit status: 0, 2 for what could not be done as asked, 130 for Ctrl-C,
    141 where nobody reads what it writes."""
    home.settle()
    collector.rest_at_exit()
    return guarded(lambda: _run(arguments))


def _run(arguments: Sequence[str] | None) -> int:
    name = NAME if Path(sys.argv[0]).name == NAME else f"python -m {NAME}"
    first = next(iter(sys.argv[1:] if arguments is None else arguments), "")
    try:
        if name != NAME and first.startswith(COMPLETION):  # a shell would do so for every `python`
            raise SetupError(f"{first}: a shell can complete the command `{NAME}` alone, which `pip install .` gives.")
        return command_line.run(app, arguments, name)
    except BrokenPipeError:
        raise  # of stdout: `guarded` ends quietly
    except (SplitlearnError, OSError) as error:  # of the system: no space, no permission
        say(f"error: {error}", stderr=True)
        return 2
    except KeyboardInterrupt:
        return 130


def _print_version(asked: bool) -> None:
    if asked:
        say(f"{NAME} {splitlearn.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="print the version")
    ] = False,
) -> None:
    """What comes before the command."""


for _command in (compare, lab, report, loadtest, attack, serve, fetch, export, parts, plan, flags, token):
    app.command()(_command)
app.add_typer(models, name="models")
for _program in (serve_trunk, ui):
    app.command(add_help_option=False, context_settings=PASS_ON)(_program)

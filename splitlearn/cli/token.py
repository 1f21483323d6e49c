"""`splitlearn token`: a new token of a trunk server or of the endpoint of the OpenAI protocol."""

from functools import partial
from typing import Annotated

import typer

from splitlearn.runtime.command_line import Job
from splitlearn.runtime.terminal import say


def token(name: Annotated[str, typer.Argument(metavar="NAME", help="the client that will use it")]) -> Job:
    """Make a token or API key: print it once (stderr), and the entry for server.tokens or api.tokens (stdout)."""
    return partial(_make, name)


def _make(name: str) -> int:
    from splitlearn.access import tokens

    secret, entry = tokens.make(name)
    say(
        f"The token of {name}, shown once. A trunk's client reads it from the variable that trunk.token names; for a "
        f"client of `splitlearn serve` it is the API key:\n{secret}",
        stderr=True,
    )
    say(entry, end="")
    return 0

"""`python -m server --config config.yaml`: serve the trunk of the configured model.

The command line is parsed and the settings are checked here, before anything slow is imported.
"""

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from splitlearn.arms.ray_trunk import LOCAL
from splitlearn.cli.token import token
from splitlearn.errors import SplitlearnError
from splitlearn.runtime import command_line, proxies, ray_installed
from splitlearn.runtime.command_line import Job, whole
from splitlearn.runtime.terminal import guarded, say

if TYPE_CHECKING:
    from splitlearn.config import Config

NAME = "python -m server"
RAY = "--ray"


class Server(TyperGroup):
    """The program. `--ray` without an address has that of a Ray of its own: typer has no optional values."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:  # typer's type for the context is private
        """Parse the words of the command line."""
        if RAY in args:
            after = args.index(RAY) + 1
            if after == len(args) or args[after].startswith("-"):
                args.insert(after, LOCAL)
        return super().parse_args(ctx, args)


app = command_line.program(cls=Server, add_completion=False, invoke_without_command=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until a signal. Returns the exit status: 2 if the server cannot start, 141 if stdout is closed."""
    return guarded(lambda: _run(arguments))


def _run(arguments: Sequence[str] | None) -> int:
    try:
        return command_line.run(app, arguments, NAME)
    except BrokenPipeError:
        raise  # stdout is closed: `guarded` exits quietly
    except (SplitlearnError, OSError) as error:  # OSError: no space, no permission
        say(f"error: {error}", stderr=True)
        return 2
    except KeyboardInterrupt:  # before the server sets its signal handlers
        return 130


@app.callback()
def _serve_command(
    context: typer.Context,
    config: Annotated[
        Path | None, typer.Option(metavar="FILE", help="a config.yaml (default: every setting at its default)")
    ] = None,
    host: Annotated[str | None, typer.Option(metavar="HOST", help="overrides server.host")] = None,
    port: Annotated[
        int | None, typer.Option(metavar="PORT", parser=whole("port"), help="overrides server.port; 0 takes a free one")
    ] = None,
    metrics_host: Annotated[str | None, typer.Option(metavar="HOST", help="overrides server.metrics_host")] = None,
    metrics_port: Annotated[
        int | None, typer.Option(metavar="PORT", parser=whole("metrics_port"), help="overrides server.metrics_port")
    ] = None,
    allow_open: Annotated[
        bool | None,
        typer.Option(
            "--allow-open",
            help="listen beyond loopback without access control: everybody who reaches the port can use the trunk",
        ),
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(
            RAY,
            metavar="[ADDRESS]",
            help="trunk servers on Ray (docs/ray.md): on the cluster at ADDRESS, or without it on a Ray of their own",
        ),
    ] = None,
) -> Job | None:
    """Serve the trunk of the configured model."""
    if context.invoked_subcommand is not None:
        return None
    changes = {"host": host, "port": port, "metrics_host": metrics_host, "metrics_port": metrics_port}
    given = {name: value for name, value in {**changes, "allow_open": allow_open}.items() if value is not None}
    return partial(_serve, config, given, ray)


app.command()(token)


def _serve(path: Path | None, changes: dict[str, Any], ray: str | None) -> int:
    from server.auth.tls import Security

    settings = _settings(path, changes)
    proxies.settle()
    security = Security.of(settings.server)
    if ray is not None:
        ray_installed.check(RAY)
        from server.ray_trunks import program

        return program.serve(settings, ray)
    from server.program import serve  # takes seconds to import

    return serve(settings, security)


def _settings(path: Path | None, changes: dict[str, Any]) -> "Config":
    """The settings of the file, overridden by the command line."""
    from splitlearn import config

    settings = config.load(path)
    _ = settings.cut  # a server has one range
    return config.parse({**settings.model_dump(), "server": {**settings.server.model_dump(), **changes}})


if __name__ == "__main__":
    sys.exit(main())

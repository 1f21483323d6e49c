"""`splitlearn models` and `splitlearn fetch`: lists the catalogue and the cache, writes slices; fills the cache."""

import json
import re
from pathlib import Path
from typing import Annotated

import typer

from splitlearn.cli import options
from splitlearn.errors import InputError
from splitlearn.runtime import command_line
from splitlearn.runtime.command_line import Job

app = command_line.program(invoke_without_command=True)


@app.callback()
def models(context: typer.Context, as_json: options.Json = False, config: options.ConfigFile = None) -> Job | None:
    """List the catalogue, and what is cached; or pack some layers."""
    if context.invoked_subcommand is not None:
        return None
    settings = options.settings(config)

    def run() -> None:
        from splitlearn.checkpoints import catalogue
        from splitlearn.cli.tables import print_models
        from splitlearn.runtime.terminal import say

        if as_json:
            say(json.dumps(catalogue.as_json(settings.model), indent=2))
            return
        print_models(catalogue.catalogue_status(settings.model), catalogue.cache_folder(settings.model))

    return run


@app.command()
def pack(
    name: Annotated[str, typer.Argument(metavar="NAME", help="a model, named as in model.name")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="a new folder")],
    layers: Annotated[str, typer.Option(metavar="START:END", help="the layers [START, END), such as 2:15")],
    config: options.ConfigFile = None,
) -> Job:
    """Write some layers of a model into a folder, for a trunk server."""
    settings, (start, end) = options.settings(config), _layers(layers)

    def run() -> None:
        from splitlearn.checkpoints import catalogue
        from splitlearn.checkpoints.pack import pack
        from splitlearn.models.part import Part
        from splitlearn.runtime.progress import on_console
        from splitlearn.runtime.terminal import say

        def part(n_layers: int) -> Part:
            if not start < end <= n_layers:
                raise InputError("layers", layers, f"layers within 0:{n_layers}, at least one")
            return Part(((start, end),))

        with on_console() as progress:
            files = catalogue.prepare(settings.model.model_copy(update={"name": name}), progress, part=part)
            pack(files, part(files.n_layers), out, progress)
        say(str(out))

    return run


def _layers(text: str) -> tuple[int, int]:
    """START and END. Raises InputError."""
    found = re.fullmatch(r"(\d{1,6}):(\d{1,6})", text, re.ASCII)
    if not found:
        raise InputError("layers", text, "START:END, such as 2:15")
    return int(found[1]), int(found[2])


def fetch(config: options.ConfigFile = None) -> Job:
    """Fetch and convert the configured model."""
    settings = options.settings(config)

    def run() -> None:
        from splitlearn.checkpoints import catalogue
        from splitlearn.runtime.progress import on_console
        from splitlearn.runtime.terminal import say

        with on_console() as progress:
            folder = catalogue.prepare(settings.model, progress).folder
        say(str(folder))

    return run

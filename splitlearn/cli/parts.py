"""`splitlearn parts`: what the model is made of, and what each part of the split model holds."""

import json
from dataclasses import asdict
from typing import Annotated

import typer

from splitlearn.cli import options
from splitlearn.errors import InputError
from splitlearn.runtime.command_line import Job, whole

CONTEXT_WITHOUT_LIMIT = 2048

Context = Annotated[
    int | None,
    typer.Option(metavar="N", parser=whole("context"), help="tokens for KV bytes and FLOPs (default: all it holds)"),
]


def parts(context: Context = None, as_json: options.Json = False, config: options.ConfigFile = None) -> Job:
    """Show what the model is made of, and what client and trunk hold and exchange."""
    settings = options.settings(config)
    if context is not None and context < 1:
        raise InputError("context", context, "at least 1 token")

    def run() -> None:
        from splitlearn.checkpoints import catalogue
        from splitlearn.cli.parts_tables import print_anatomy, print_parts
        from splitlearn.models.plan import SplitPlan
        from splitlearn.planning import anatomy
        from splitlearn.runtime.progress import on_console
        from splitlearn.runtime.terminal import say

        with on_console() as progress:
            files = catalogue.prepare(settings.model, progress)
        plan = SplitPlan.of(settings.split.start, settings.split.end, files.n_layers)
        model = anatomy.read(files, settings.model.dtype)
        length = context or model.context or CONTEXT_WITHOUT_LIMIT
        found = anatomy.parts_of(model, plan, length)
        if as_json:
            said = {"anatomy": asdict(model), "context": length, "parts": [asdict(part) for part in found]}
            say(json.dumps(said, indent=2))
            return
        print_anatomy(model)
        print_parts(found, length)

    return run

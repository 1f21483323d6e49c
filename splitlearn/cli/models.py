"""`splitlearn models` and `splitlearn fetch`: lists the catalogue and the cache; fills the cache."""

import json

from splitlearn.cli import options
from splitlearn.runtime.command_line import Job


def models(as_json: options.Json = False, config: options.ConfigFile = None) -> Job:
    """List the catalogue, and what is cached."""
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

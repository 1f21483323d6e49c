"""`splitlearn parts`: what each part of the split model holds."""

from splitlearn.cli import options
from splitlearn.runtime.command_line import Job


def parts(as_json: options.Json = False, config: options.ConfigFile = None) -> Job:
    """Show what client and trunk hold and exchange."""
    settings = options.settings(config)

    def run() -> None:
        from splitlearn.checkpoints import catalogue
        from splitlearn.models.plan import SplitPlan
        from splitlearn.runtime.progress import on_console

        with on_console() as progress:
            files = catalogue.prepare(settings.model, progress)
        plan = SplitPlan.of(settings.split.start, settings.split.end, files.n_layers)
        from splitlearn.cli.tables import print_parts
        from splitlearn.models.sizes import parts
        from splitlearn.wire.codec import DTYPES

        print_parts(parts(files, plan, DTYPES[settings.model.dtype]), as_json)

    return run

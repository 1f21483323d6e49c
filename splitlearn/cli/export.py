"""`splitlearn export`: writes a model for use without this program."""

from pathlib import Path
from typing import Annotated

import typer

from splitlearn.cli import options
from splitlearn.runtime.command_line import Job


def export(
    name: Annotated[str, typer.Argument(metavar="NAME", help="a model, named as in model.name")],
    onnx: Annotated[Path, typer.Option("--onnx", metavar="OUT", help="a new folder, for ONNX Runtime")],
    config: options.ConfigFile = None,
) -> Job:
    """Write a model as files that ONNX Runtime runs without this program."""
    settings = options.settings(config)

    def run() -> None:
        from splitlearn.checkpoints import catalogue
        from splitlearn.engines import reasons
        from splitlearn.errors import SetupError
        from splitlearn.runtime.progress import on_console
        from splitlearn.runtime.terminal import say

        if reason := reasons.no_onnxruntime("cpu", "float32"):
            raise SetupError(f"--onnx: ONNX Runtime {reason}")
        from splitlearn.engines.onnx_package import write

        with on_console() as progress:
            write(catalogue.prepare(settings.model.model_copy(update={"name": name}), progress), onnx, progress)
        say(str(onnx))

    return run

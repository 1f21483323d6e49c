"""`catalogue.prepare` as a command: prints digest and source of the named model, or the error."""

from splitlearn.checkpoints import catalogue, convert
from splitlearn.config import ModelConfig
from splitlearn.errors import SplitlearnError
from splitlearn.runtime.progress import on_console


def main(arguments: list[str]) -> int:
    """Run the command. Returns the exit status."""
    try:
        with on_console() as progress:
            files = catalogue.prepare(ModelConfig(name=arguments[0]), progress)
        print(files.digest, files.source)
    except SplitlearnError as error:
        print(type(error).__name__, error)
    return 0


def converting(arguments: list[str]) -> int:
    """Run the command, and convert in this process: a child process would have to import torch first."""
    convert.convert_in_subprocess = convert.convert
    return main(arguments)

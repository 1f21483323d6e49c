"""`catalogue.prepare` as a command: prints digest and source of the model that is named, or the error."""

import sys

from splitlearn.checkpoints import catalogue, convert
from splitlearn.config import ModelConfig
from splitlearn.errors import SplitlearnError
from splitlearn.runtime.progress import on_console


def main(arguments: list[str]) -> int:
    """The command; its exit status."""
    try:
        with on_console() as progress:
            files = catalogue.prepare(ModelConfig(name=arguments[0]), progress)
        print(files.digest, files.source)
    except SplitlearnError as error:
        print(type(error).__name__, error)
    return 0


def converting(arguments: list[str]) -> int:
    """The command, in a process that converts by itself: the one that it would start imports torch first."""
    convert.convert_in_subprocess = convert.convert
    return main(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""An argument parser that reports a mistake in one line, as every other error."""

import argparse
from typing import NoReturn

from splitlearn.errors import SplitlearnError


class OneLineParser(argparse.ArgumentParser):
    """Raises SplitlearnError where argparse would print its usage and end the program."""

    def error(self, message: str) -> NoReturn:
        """Raise SplitlearnError with `message` and a pointer to `--help`."""
        raise SplitlearnError(f"{message}; `{self.prog} --help` lists what there is.")

"""The files of a report: a folder that can be written, CSV that no spreadsheet computes."""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from splitlearn.errors import InputError

FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")


def make_folder(folder: Path) -> None:
    """Make `folder`, if it is not there. Raises InputError where it cannot be made or written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise InputError("out", str(folder), f"a folder that can be written ({error.strerror})") from error


def write_texts(folder: Path, texts: Mapping[str, str]) -> list[Path]:
    """Write each text under its name into `folder`, which is made if it is not there. Gives the paths. Raises
    InputError as `make_folder` does."""
    make_folder(folder)
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8", errors="backslashreplace", newline="")
    return [folder / name for name in texts]


def csv(frame: pd.DataFrame) -> str:
    """`frame` as CSV. A text that a spreadsheet would compute gets an apostrophe in front."""
    return frame.map(_no_formula).to_csv(index=False)


def _no_formula(cell: Any) -> Any:
    return f"'{cell}" if isinstance(cell, str) and cell.lstrip(" ").startswith(FORMULA) else cell

"""What the modules of a folder were when they were imported."""

import hashlib
from functools import cache
from pathlib import Path


@cache
def digest(folder: Path) -> bytes:
    """Of all modules' text, as it was when this was asked first: what is imported later may be newer than what is in
    memory, in a process that others were forked from."""
    found = hashlib.sha256()
    for path in sorted(folder.glob("*.py")):
        if path.is_file():  # an editor's lock is a link to nothing
            found.update(path.read_bytes())
    return found.digest()

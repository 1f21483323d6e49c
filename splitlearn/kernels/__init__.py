"""Functions in machine code. Imports nothing of the project, so that cached machine code is valid until a kernel
changes."""

import hashlib
from functools import cache
from pathlib import Path


@cache
def digest(folder: Path) -> bytes:
    """A hash of the source of all modules in a folder, as it was at the first call."""
    found = hashlib.sha256()
    for path in sorted(folder.glob("*.py")):
        if path.is_file():  # an editor's lock is a link to nothing
            found.update(path.read_bytes())
    return found.digest()


# Computed at import: a process may import the kernels hours after their constants, and the files may have changed.
digest(Path(__file__).parent)

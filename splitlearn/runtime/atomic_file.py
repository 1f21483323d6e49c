"""Files that are replaced in one step, so that a reader never sees half of one."""

import tempfile
from pathlib import Path


def write(path: Path, text: str) -> None:
    """Write `text` to `path`. Raises OSError, and then leaves what was there.

    Every user of the machine may read the file: containers share the cache between users.
    """
    with tempfile.NamedTemporaryFile(
        "w", dir=path.parent, prefix=f".{path.name}", delete=False, encoding="utf-8"
    ) as draft:
        draft.write(text)
    try:
        Path(draft.name).chmod(0o644)  # a temporary file is its owner's alone
        Path(draft.name).replace(path)
    except OSError:
        Path(draft.name).unlink(missing_ok=True)
        raise

"""Files that are replaced in one step, so that a reader never sees half of one."""

import tempfile
from pathlib import Path


def write(path: Path, content: str | bytes) -> None:
    """Write `content` to `path`, text as UTF-8. Raises OSError, and then leaves what was there.

    Every user of the machine may read the file: containers share the cache between users.
    """
    draft = tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}", delete=False)  # noqa: SIM115
    try:
        with draft:
            draft.write(content.encode() if isinstance(content, str) else content)
        Path(draft.name).chmod(0o644)  # a temporary file is its owner's alone
        Path(draft.name).replace(path)
    except OSError:
        Path(draft.name).unlink(missing_ok=True)
        raise

"""A home folder and a user name for processes without them, as in a container with `--user 12345`.

Libraries ask for both on import: huggingface_hub and Gradio for their caches, torch's compiler for the user's name.
Without an answer they raise, or write into a folder called `~`.
"""

import atexit
import os
import shutil
import sys
import tempfile
from pathlib import Path

_NAMES = ("LOGNAME", "USER", "LNAME", "USERNAME")  # where getpass looks


def settle() -> None:
    """Set HOME and USER where they are unknown, for this process and its children.

    HOME is then a new folder, removed at the end of this process; a line warns that nothing is kept.
    """
    if not any(os.environ.get(name) for name in _NAMES) and _account() is None:
        os.environ["USER"] = f"uid{os.getuid()}"
    homes = (os.environ.get("HOME", ""), _account() or "")
    os.environ["HOME"] = next(filter(_is_home, homes), None) or _new()


def _is_home(text: str) -> bool:
    try:
        return Path(text).is_absolute() and Path(text).is_dir()
    except OSError:  # in a folder that this user may not enter
        return False


def _account() -> str | None:
    """This user's home folder by the system's list of users; None for a user who is not in it."""
    try:
        import pwd

        return pwd.getpwuid(os.getuid()).pw_dir
    except (ImportError, KeyError):
        return None


def _new() -> str:
    try:
        folder = tempfile.mkdtemp(prefix="splitlearn-home-")
    except OSError:  # no folder can be written: the code that needs one reports it
        return os.path.sep
    atexit.register(_remove, folder, os.getpid())
    print(
        "warning: this user has no home folder. What is kept between starts (converted weights, downloads, machine "
        f"code) is in {folder} and goes at the end; set HOME, or SPLITLEARN_CACHE, HF_HOME and NUMBA_CACHE_DIR.",
        file=sys.stderr,
    )
    return folder


def _remove(folder: str, maker: int) -> None:
    if os.getpid() == maker:  # not a fork of it
        shutil.rmtree(folder, ignore_errors=True)

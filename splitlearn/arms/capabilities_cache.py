"""A cache of capabilities, in a file of the cache folder: what was found before takes no child process.

    <cache>/v1/capabilities.json      the last MOST answers, each under a digest of all that it depends on

Only answers are stored, never errors. A damaged file is ignored and replaced.
"""

import hashlib
import json
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from splitlearn.arms import capabilities
from splitlearn.arms.capabilities import Capabilities, Question
from splitlearn.checkpoints.folder import ModelFiles
from splitlearn.flags.registry import Place
from splitlearn.runtime import atomic_file, installation
from splitlearn.runtime.progress import Progress, Step

NAME = "capabilities.json"
MOST = 64
MOST_BYTES = 1 << 20


@dataclass(frozen=True)
class _Contents:
    """What the file holds."""

    answers: dict[str, Capabilities]


def find(question: Question, folder: Path, progress: Progress) -> Capabilities:
    """The answer from the file in `folder`, else of a child process. Raises as `capabilities.ask`."""
    key, path = _key(question), folder / NAME
    answers = _read(path)
    if key in answers:
        return answers[key]
    progress(Step("Reading the model's tokenizer and settings"))
    found = capabilities.ask(question)
    kept = {name: answers[name] for name in list(answers)[1 - MOST :]}
    _write(path, _Contents({**kept, key: found}))
    return found


def _key(question: Question) -> str:
    """SHA-256 in hex of all that the answer depends on."""
    models = [_state(files) for files in (question.files, question.draft) if files is not None]
    own = (question.device, question.dtype, question.chat)
    state = (models, own, Place(question.device), installation.digest())
    return hashlib.sha256(repr(state).encode(errors="surrogateescape")).hexdigest()


def _state(files: ModelFiles) -> tuple[str, list[tuple[str, int, int]]]:
    """The model's digest, and name, size and mtime of each file: the digest says nothing of the tokenizer's."""
    found = ((path.relative_to(files.folder), path.stat()) for path in files.folder.rglob("*") if path.is_file())
    return files.digest, sorted((str(name), status.st_size, status.st_mtime_ns) for name, status in found)


def _read(path: Path) -> dict[str, Capabilities]:
    """What the file holds; nothing where it is missing, damaged or something else."""
    with suppress(OSError, ValidationError):
        if path.is_file() and path.stat().st_size <= MOST_BYTES:
            return _form().validate_json(path.read_bytes(), strict=True).answers
    return {}


def _write(path: Path, contents: _Contents) -> None:
    with suppress(OSError):  # without the file, each start asks a child process
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_file.write(path, json.dumps(asdict(contents), indent=2))


@cache
def _form() -> TypeAdapter[_Contents]:
    return TypeAdapter(_Contents)

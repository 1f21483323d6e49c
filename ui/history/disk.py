"""Comparisons of the page on this machine: a file of JSON lines, each the object of `compare --json`.

    <cache>/v1/history/comparisons.jsonl      newest last, readable by its owner only

Each object also has `when`, `asked` (the typed prompt) and `command`, which repeats it. The file keeps the newest
MOST_RECORDS and at most MOST_BYTES. It is untrusted input: an invalid line is skipped and counted.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from filelock import FileLock
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

FOLDER, NAME = "history", "comparisons.jsonl"
MOST_RECORDS = 200
MOST_BYTES = 16 << 20
MOST_LINE = 1 << 20
"""Bytes of one comparison. A longer one is not kept."""
Seconds = Annotated[float, Field(ge=0, lt=1e6)]


class _Part(BaseModel):
    """Validates only the keys that are shown, and ignores others."""

    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)


class Cut(_Part):
    """The trunk's layers."""

    start: int
    end: int
    n_layers: int


class Times(_Part):
    """Figures of the typical run of an arm."""

    ttft_s: Seconds
    tpot_s: Seconds | None
    tps: Seconds


class Spread(_Part):
    """split / full."""

    geometric_mean: Seconds
    n: int


class Ratios(_Part):
    """Ratios of the pairs."""

    ttft: Spread | None
    tpot: Spread | None


class Record(_Part):
    """A comparison as shown in the list."""

    when: AwareDatetime
    asked: str
    model: str
    split: Cut
    flags: tuple[str, ...]
    full: Times
    split_run: Times
    ratios: Ratios
    identical_tokens: bool


@dataclass(frozen=True)
class Earlier:
    """The comparisons of `path`, newest first, and its number of invalid lines."""

    path: Path
    records: tuple[Record, ...] = ()
    skipped: int = 0


class DiskHistory:
    """The file in the cache folder `cache`. Several programs may write it."""

    def __init__(self, cache: Path) -> None:
        self.path = cache / FOLDER / NAME

    def add(self, comparison: Mapping[str, Any]) -> None:
        """Append `comparison` and drop the oldest ones over the limits. Raises OSError."""
        line = json.dumps(comparison).encode() + b"\n"
        if len(line) > MOST_LINE:
            return
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with FileLock(f"{self.path}.lock", mode=0o600):
            before = self._lines()
            cut = bool(before) and not before[-1].endswith(b"\n")  # a program was killed while it wrote
            kept = _newest([*(before[:-1] if cut else before), line])
            if len(kept) <= len(before):
                _replace(self.path, b"".join(kept))
                return
            with os.fdopen(os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), "ab") as file:
                file.write(line)

    def read(self) -> Earlier:
        """Read the file. Returns no comparisons if it is missing or unreadable."""
        try:
            lines = self._lines()
        except OSError:
            lines = []
        found = [_record(line) for line in lines]
        records = sorted((each for each in found if each is not None), key=lambda each: each.when, reverse=True)
        return Earlier(self.path, tuple(records), len(found) - len(records))

    def _lines(self) -> list[bytes]:
        """The last lines of the file, in order. The first may be cut off if the file is too long."""
        if not self.path.is_file():  # missing, or a pipe or device
            return []
        with self.path.open("rb") as file:
            file.seek(max(0, self.path.stat().st_size - MOST_BYTES))
            return file.read(MOST_BYTES).splitlines(keepends=True)[-MOST_RECORDS:]


def _newest(lines: list[bytes]) -> list[bytes]:
    """As many of the last lines as the limits allow."""
    kept: list[bytes] = []
    room = MOST_BYTES
    for line in reversed(lines[-MOST_RECORDS:]):
        room -= len(line)
        if room < 0:
            break
        kept.append(line)
    return kept[::-1]


def _replace(path: Path, content: bytes) -> None:
    """Replace the file atomically, readable by its owner only."""
    draft = path.with_suffix(f".{os.getpid()}.partial")
    draft.unlink(missing_ok=True)
    with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(content)
    draft.replace(path)


def _record(line: bytes) -> Record | None:
    if len(line) > MOST_LINE:
        return None
    try:
        return Record.model_validate_json(line)
    except (ValidationError, ValueError, RecursionError):
        return None

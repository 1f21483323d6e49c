"""The results of a sweep in a file of JSON lines, one for each attack on each prompt. A killed sweep goes on.

    with Results.open(folder, header) as results:
        if key not in results: results.add(row)     # on the disk when it returns

The first line says what all have in common. A line that a kill left half written is dropped.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock, Timeout

from splitlearn.checkpoints.folder import ModelFiles
from splitlearn.errors import InputError, SetupError
from splitlearn.privacy.scores import Hits, Loss
from splitlearn.privacy.victims import Victim
from splitlearn.reporting.files import make_folder

FILE = "results.jsonl"
FORMAT = "splitlearn.attack.3"
Key = tuple[int, str, bool | None, str, int]
"""Cut, defence, whether the attacker knows it, attack, number of the prompt."""


@dataclass(frozen=True)
class Row:
    """An attack on one prompt. Of a baseline `cut` is 0 and `defence` empty. `knows`: whether the attacker knows the
    defence, None where that makes no difference. `seconds` is what the attack took, without what it learns once for a
    cut: `prepare_s`. `peak_rss_bytes` is the most memory of the process meanwhile, which has the victim's stages, too.
    `same` has the tokens of the answer that are those of the client without a defence. `loss` is what the split model
    makes of the prompt. `token_bytes` cross the wire for a token, both ways."""

    cut: int
    defence: str
    knows: bool | None
    attack: str
    number: int
    kind: str
    prompt: Hits
    answer: Hits
    seconds: float = 0.0
    prepare_s: float = 0.0
    peak_rss_bytes: int = 0
    same: Hits = Hits(0, 0)
    loss: Loss = Loss(0.0, 0)
    token_bytes: int = 0

    @property
    def key(self) -> Key:
        """What it is the result of."""
        return self.cut, self.defence, self.knows, self.attack, self.number

    @classmethod
    def of_json(cls, said: Mapping[str, Any]) -> "Row":
        """Raises TypeError and KeyError for what is no row."""
        plain = {each.name: said[each.name] for each in fields(cls)}
        hits = {name: Hits(**plain[name]) for name in ("prompt", "answer", "same")}
        return cls(**{**plain, **hits, "loss": Loss(**plain["loss"])})


def header_of(
    files: ModelFiles, dtype: str, end: int, answer_tokens: int, seed: int, victims: Sequence[Victim]
) -> dict[str, object]:
    """What all rows of a file have in common. `victims` has all prompts, of which a sweep may do the first few."""
    text = "\n".join(f"{victim.kind} {victim.prompt}" for victim in victims)
    return {
        "model": files.name,
        "digest": files.digest,
        "dtype": dtype,
        "end": end,
        "prompts_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "answer_tokens": answer_tokens,
        "seed": seed,
    }


def read(folder: Path) -> list[Row]:
    """The rows in `folder`, also while a sweep writes there; none where no sweep has begun. Raises InputError for
    another file."""
    path = folder / FILE
    return _parsed(path, _whole_lines(path.read_bytes()))[1] if path.exists() else []


class Results:
    """The rows so far, in a file or, with `path` None, in memory alone. Use it as a context."""

    def __init__(self, header: Mapping[str, Any], path: Path | None = None) -> None:
        self._rows: dict[Key, Row] = {}
        self._file: BinaryIO | None = None
        self._end = ExitStack()
        if path is not None:
            self._end.enter_context(_lock(path))
            try:
                self._file = self._end.enter_context(_opened(path, header, self._rows))
            except BaseException:
                self._end.close()
                raise

    @classmethod
    def open(cls, folder: Path | None, header: Mapping[str, Any]) -> "Results":
        """Begin or go on in `folder`; None is in memory alone. Raises InputError for results of something else, and
        SetupError while another program writes there."""
        if folder is None:
            return cls(header)
        make_folder(folder)
        return cls(header, folder / FILE)

    def __enter__(self) -> "Results":
        return self

    def __exit__(self, *_: object) -> None:
        self._end.close()

    def __contains__(self, key: Key) -> bool:
        return key in self._rows

    @property
    def rows(self) -> list[Row]:
        """All rows, in the order in which they came."""
        return list(self._rows.values())

    def add(self, row: Row) -> None:
        """Store a row."""
        if self._file is not None:
            self._file.write(_line(asdict(row)))
            self._file.flush()
            os.fsync(self._file.fileno())
        self._rows[row.key] = row


def _line(said: Mapping[str, Any]) -> bytes:
    return json.dumps(said, ensure_ascii=False).encode() + b"\n"


def _lock(path: Path) -> Any:
    lock = FileLock(f"{path}.lock")
    try:
        return lock.acquire(blocking=False)
    except Timeout:
        raise SetupError(f"Another program writes {path} now. Wait until it ends, or give another --out.") from None


def _opened(path: Path, header: Mapping[str, Any], rows: dict[Key, Row]) -> BinaryIO:
    """The file, open at its end, with its `rows` read."""
    file = path.open("r+b" if path.exists() else "x+b")
    whole = _whole_lines(file.read())
    file.truncate(len(whole))  # a half-written line
    file.seek(len(whole))
    wanted = {"format": FORMAT, **header}
    if not whole:
        file.write(_line(wanted))
        return file
    try:
        found, own = _parsed(path, whole)
    except InputError:
        file.close()
        raise
    rows.update({row.key: row for row in own})
    differing = [name for name, value in wanted.items() if found.get(name) != value]
    if differing:
        file.close()
        name = differing[0]
        expected = f"results with {name} {wanted[name]!r}, and these have {found.get(name)!r}; or another --out"
        raise InputError("out", str(path), expected)
    return file


def _whole_lines(data: bytes) -> bytes:
    """Without the line that a kill left half written."""
    return data[: data.rfind(b"\n") + 1]


def _parsed(path: Path, data: bytes) -> tuple[dict[str, Any], list[Row]]:
    """The first line, and the rows. Raises InputError."""
    lines = data.splitlines()
    try:
        found = dict(json.loads(lines[0])) if lines else {}
        return found, [Row.of_json(json.loads(line)) for line in lines[1:]]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError("out", str(path), f"a file that `splitlearn attack` wrote ({error})") from error

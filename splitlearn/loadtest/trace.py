"""Traces: who asked for how much at which time, a JSON object a line, as the Mooncake traces and aiperf have them.

    {"timestamp": 27482, "input_length": 6955, "output_length": 52, "hash_ids": [46, 47, 48]}

`timestamp` is in milliseconds. `input_length` is in tokens, which become as many words. Each of `hash_ids` is a block
of 512 tokens that is the same wherever its number is. `text_input` is the prompt itself. Other keys are ignored.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from splitlearn.errors import InputError
from splitlearn.loadtest.lengths import MAX_LENGTH
from splitlearn.loadtest.texts import BLOCK, words

MAX_LINES = 100_000
MAX_LINE_BYTES = 8 << 20
MAX_AT_S = 86_400.0
EXPECTED = 'a JSON object with "timestamp" in ms, "input_length" or "text_input", and "output_length", in tokens'


@dataclass(frozen=True)
class TraceLine:
    """A request of a trace: `at_s` after its first one, a prompt of `words` words, an answer of `new_tokens`."""

    at_s: float
    words: int
    new_tokens: int
    blocks: tuple[int, ...] = ()
    text: str | None = None

    def prompt(self, key: str, number: int) -> str:
        """The text of this request, which is number `number` of its trace; made up by `key` where it has none."""
        if self.text is not None:
            return self.text
        whole = [words(BLOCK, f"{key}/block/{block}") for block in self.blocks[: self.words // BLOCK]]
        rest = self.words - BLOCK * len(whole)
        last = self.blocks[len(whole)] if len(whole) < len(self.blocks) else None
        if rest:
            whole.append(words(rest, f"{key}/line/{number}" if last is None else f"{key}/block/{last}"))
        return " ".join(whole)

    def as_json(self) -> dict[str, Any]:
        """The object of its line in a file."""
        found: dict[str, Any] = {"timestamp": round(self.at_s * 1e3, 3), "input_length": self.words}
        found["output_length"] = self.new_tokens
        if self.blocks:
            found["hash_ids"] = list(self.blocks)
        return found if self.text is None else {**found, "text_input": self.text}


def read_trace(path: Path) -> tuple[TraceLine, ...]:
    """The requests of a file by their time, the first one at 0. Raises InputError, which names the line."""
    try:
        with path.open("rb") as file:
            found = sorted(
                _lines(path, iter(lambda: file.readline(MAX_LINE_BYTES + 1), b"")), key=lambda each: each.at_s
            )
    except OSError as error:
        raise InputError("trace", str(path), f"a readable file ({error.strerror})") from error
    if not found:
        raise InputError("trace", str(path), f"requests, one a line: {EXPECTED}")
    first = found[0].at_s
    return tuple(replace(each, at_s=round(each.at_s - first, 6)) for each in found)


def written(lines: Iterable[TraceLine]) -> str:
    """A trace as the text of a file."""
    return "".join(json.dumps(line.as_json()) + "\n" for line in lines)


def _lines(path: Path, lines: Iterator[bytes]) -> Iterator[TraceLine]:
    for number, line in enumerate(lines, 1):
        if number > MAX_LINES:
            raise InputError("trace", f"{path} with more than {MAX_LINES} lines", f"at most {MAX_LINES} requests")
        if line.strip():
            try:
                yield _parsed(json.loads(line) if len(line) <= MAX_LINE_BYTES else None)
            except (ValueError, TypeError, KeyError, RecursionError):
                raise InputError("trace", f"{path}, line {number}", EXPECTED) from None


def _parsed(found: Any) -> TraceLine:
    """The request in a line's object. Raises ValueError, TypeError or KeyError for anything else."""
    at_s, text = float(found["timestamp"]) / 1e3, found.get("text_input")
    if not 0 <= at_s <= MAX_AT_S or not (text is None or (isinstance(text, str) and text.strip())):
        raise ValueError
    count = _length(found["input_length"] if text is None else len(text.split()))
    blocks = tuple(_whole(each) for each in found.get("hash_ids") or ())
    return TraceLine(at_s, count, _length(found["output_length"]), blocks, text)


def _length(value: Any) -> int:
    found = _whole(value)
    if not 1 <= found <= MAX_LENGTH:
        raise ValueError
    return found


def _whole(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError
    return value

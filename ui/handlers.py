"""What the page does when a person acts: each function takes plain values and gives what is to be drawn."""

import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from splitlearn.errors import SplitlearnError
from splitlearn.lab import table
from splitlearn.lab.table import AskedKind, Snapshot
from splitlearn.runs import Runs
from splitlearn.selection import parse
from splitlearn.tokens import Tokens
from ui import choice, inputs, session
from ui.session import Shown, Stops

CSV_NAME = "splitlearn-flags.csv"
ASKED: tuple[AskedKind, ...] = ("without", "alone")


@dataclass(frozen=True)
class TableState:
    """The per-flag table at one moment. `csv` is its file, once the measuring has ended; `error` says why it broke."""

    snapshot: Snapshot | None
    repeats: int
    state: str
    csv: Path | None = None
    error: str = ""


class Handlers:
    """The page's actions on one `Runs`. Use as a context: it holds a folder for what is downloaded."""

    def __init__(self, runs: Runs) -> None:
        self.runs = runs
        self.stops = Stops()
        self._folder = tempfile.TemporaryDirectory(prefix="splitlearn-")

    def __enter__(self) -> "Handlers":
        return self

    def __exit__(self, *_: object) -> None:
        self.stops.stop_all()
        self._folder.cleanup()

    @cached_property
    def _tokens(self) -> Tokens:
        return Tokens.load(self.runs.files.folder, use_fast=True)

    def text_of(self, token: int) -> str:
        """The text of one token id."""
        return self._tokens.decode([token])

    def compare(self, typed: Mapping[str, object], words: str, visitor: str) -> Iterator[Shown]:
        """Run what was typed through both arms."""
        try:
            request = inputs.request(typed)
            flags = parse(words, choice.available(self.runs))
        except SplitlearnError as error:
            yield Shown(error=str(error))
            return
        with closing(session.compare(self.runs, flags, request, self.stops.signal(visitor))) as states:  # type: ignore[type-var]  # a generator
            yield from states

    def measure(
        self, typed: Mapping[str, object], words: str, kinds: list[str], repeats: object, visitor: str
    ) -> Iterator[TableState]:
        """Measure the per-flag table; whatever ends it, what is measured can be downloaded."""
        signal, last, count = self.stops.signal(visitor), None, 1
        try:
            count = inputs.repeats(repeats)
            flags = parse(words, choice.available(self.runs))
            rows = table.rows(flags, [kind for kind in ASKED if kind in kinds])
            steps = table.measure(self.runs, inputs.request(typed), rows, count, cancelled=signal)
            for last in steps:
                yield TableState(last, count, "Measuring")
        except SplitlearnError as error:
            yield TableState(last, count, "Broken off", self._save(last), str(error))
            return
        yield TableState(last, count, _ending(last, signal), self._save(last))

    def _save(self, snapshot: Snapshot | None) -> Path | None:
        """The table as CSV, in a folder of its own: two visitors may have one at the same time."""
        if snapshot is None or not snapshot.done:
            return None
        folder = Path(tempfile.mkdtemp(dir=self._folder.name))
        snapshot.frame.to_csv(folder / CSV_NAME, index=False)
        return folder / CSV_NAME


def _ending(snapshot: Snapshot | None, signal: threading.Event) -> str:
    return "Stopped" if signal.is_set() or snapshot is None else "Done"

"""What is made of a comparison that has ended: its line in the history, its files, its command."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from splitlearn.arms.compare import environment
from splitlearn.arms.runs import Runs
from splitlearn.errors import SplitlearnError
from splitlearn.reporting.files import write_texts
from ui import inputs
from ui.compare.command import command
from ui.compare.session import ComparisonView
from ui.history import record, share
from ui.history.record import Entry
from ui.visitors import Downloads

PAGE, TIMES = "comparison.html", "time.csv"
CSV, JSON = "history.csv", "history.json"


@dataclass(frozen=True)
class Finish:
    """A comparison that has ended, as it is kept and shared."""

    entry: Entry
    command: str
    files: Mapping[str, Path]


class Historian:
    """Makes lines of the history, and files in `downloads`. `options` are the program's own, such as --config."""

    def __init__(self, runs: Runs, downloads: Downloads, options: Sequence[str]) -> None:
        self.runs, self._downloads, self._options = runs, downloads, options

    def finish(self, shown: ComparisonView, typed: Mapping[str, object], words: str, visitor: str) -> Finish | None:
        """What is kept of `shown`; None where no pair was complete."""
        pairs = shown.pairs
        if pairs is None:
            return None
        request, link = inputs.request(typed), pairs.typical("split").link
        told = None if link == self.runs.link else str(link)
        repeat = command(request, words, shown.asked, told, self._options)
        made = record.entry(pairs, request, words, self.runs.files.name, self.runs.plan, str(link), repeat)
        texts = {PAGE: share.page(shown, made, repeat, self._environment()), TIMES: share.times(pairs)}
        return Finish(made, repeat, self._write(texts, f"{visitor} comparison"))

    def exports(self, entries: Sequence[Entry], visitor: str) -> Mapping[str, Path]:
        """The history as files."""
        texts = {CSV: share.history_csv(entries), JSON: share.history_json(entries)}
        return self._write(texts, f"{visitor} history")

    def leave(self, visitor: str) -> None:
        """The visitor has left: remove what is hers."""
        for what in ("comparison", "history"):
            self._downloads.forget(f"{visitor} {what}")

    def _write(self, texts: Mapping[str, str], key: str) -> dict[str, Path]:
        return {path.name: path for path in write_texts(self._downloads.fresh(key), texts)}

    def _environment(self) -> dict[str, Any]:
        try:
            return environment(self.runs)
        except SplitlearnError as error:  # the trunk went away after the last run
            return {"trunk": str(error)}

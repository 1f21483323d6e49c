"""What is made of a comparison that has ended: its line in the history, its files, its command."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from splitlearn.address import is_loopback
from splitlearn.arms.compare import Comparison, Pairs, environment
from splitlearn.arms.runs import Runs
from splitlearn.checkpoints import catalogue
from splitlearn.errors import SplitlearnError
from splitlearn.flags.selection import parse
from splitlearn.reporting.files import write_texts
from splitlearn.runtime.terminal import say
from ui import inputs
from ui.compare.command import command
from ui.compare.session import ComparisonView
from ui.flags import flag_words
from ui.history import record, share
from ui.history.disk import DiskHistory
from ui.history.record import Entry
from ui.visitors import Downloads

PAGE, TIMES = "comparison.html", "time.csv"
CSV, JSON = "history.csv", "history.json"


@dataclass(frozen=True)
class Finish:
    """A finished comparison: its line in the history, its command and its files."""

    entry: Entry
    command: str
    files: Mapping[str, Path]


class Historian:
    """Makes the lines and files of the history. `options` are those for the same settings, such as --config."""

    def __init__(self, runs: Runs, downloads: Downloads, options: Sequence[str]) -> None:
        self.runs, self._downloads, self._options = runs, downloads, options
        self.disk = DiskHistory(catalogue.cache_folder(runs.config.model))

    def keeps(self, owner: bool) -> bool:
        """Whether a visitor's comparisons are kept on disk. `owner` is whether she is the page's owner."""
        ui = self.runs.config.ui
        alone = is_loopback(ui.host) and not ui.share and not os.environ.get(ui.auth)
        return alone and owner if ui.history_file is None else ui.history_file

    def finish(
        self, shown: ComparisonView, typed: Mapping[str, object], words: str, visitor: str, owner: bool
    ) -> Finish | None:
        """Keep the comparison `shown`; None if no pair is complete. `owner` is whether the visitor is the page's
        owner."""
        pairs = shown.pairs
        if pairs is None:
            return None
        request, link = inputs.request(typed), pairs.typical("split").link
        other_link = None if link == self.runs.link else str(link)
        repeat = command(request, words, shown.n_pairs, other_link, self._options)
        made = record.entry(pairs, request, words, self.runs.files.name, self.runs.plan, str(link), repeat)
        around = self._environment()
        if self.keeps(owner):
            self._keep(shown, pairs, words, around, {"asked": request.text, "command": repeat})
        texts = {PAGE: share.page(shown, made, repeat, around), TIMES: share.times(pairs)}
        return Finish(made, repeat, self._write(texts, f"{visitor} comparison"))

    def _keep(
        self, shown: ComparisonView, pairs: Pairs, words: str, environment: dict[str, Any], extra: Mapping[str, str]
    ) -> None:
        """Append the comparison to the file. If that fails, only warn: the answer must not be lost."""
        runs, flags = self.runs, parse(words, flag_words.available(self.runs))
        found = Comparison(runs.files.name, runs.plan, flags, pairs, shown.others_cpu, environment, shown.logits)
        try:
            self.disk.add({"when": datetime.now(UTC).isoformat(), **extra, **found.as_json()})
        except OSError as error:
            say(f"warning: {self.disk.path} cannot be written ({error.strerror}).", stderr=True)

    def exports(self, entries: Sequence[Entry], visitor: str) -> Mapping[str, Path]:
        """Write the history as files."""
        texts = {CSV: share.history_csv(entries), JSON: share.history_json(entries)}
        return self._write(texts, f"{visitor} history")

    def leave(self, visitor: str) -> None:
        """Remove the files of a visitor who has left."""
        for what in ("comparison", "history"):
            self._downloads.forget(f"{visitor} {what}")

    def _write(self, texts: Mapping[str, str], key: str) -> dict[str, Path]:
        with self._downloads.fresh(key) as folder:
            return {path.name: path for path in write_texts(folder, texts)}

    def _environment(self) -> dict[str, Any]:
        try:
            return environment(self.runs)
        except SplitlearnError as error:  # the trunk went away after the last run
            return {"trunk": str(error)}

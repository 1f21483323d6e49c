"""A sweep in the background of a page: over cuts and defences, on the built-in prompts.

    job = SweepJob(runs, busy, options)
    job.start(plans, defences, prompts=8)      # goes on where the last one ended
    job.lines()                             # what it has found so far, also in another process

Its rows are in the cache folder: what was measured of a model stays, and `splitlearn attack --out` adds to the same. It
stands still between two attacks while something else is measured.
"""

import hashlib
import json
import shlex
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from splitlearn.arms.runs import Runs
from splitlearn.checkpoints.catalogue import cache_folder
from splitlearn.checkpoints.folder import ModelFiles
from splitlearn.errors import InputError, SetupError, as_error
from splitlearn.models.plan import SplitPlan
from splitlearn.privacy import live, results, victims
from splitlearn.privacy.results import Row
from splitlearn.privacy.summary import Line, summary
from splitlearn.runtime import process, programs
from splitlearn.runtime.background import Background
from splitlearn.runtime.progress import Step

POLL_S = 0.2
PAUSED = "Waiting while something else is measured"
RUNNING = "Another sweep is running. Its progress is shown here."


@dataclass(frozen=True)
class SweepRequest:
    """What to attack: the first `prompts` of the built-in ones, at the cut of each of `plans`, against each of
    `defences` (defences.py) alone."""

    files: ModelFiles
    dtype: str
    plans: tuple[SplitPlan, ...]
    defences: tuple[str, ...]
    prompts: int
    threads: int | None


@dataclass(frozen=True)
class SweepStatus:
    """A sweep at one moment. `ended` is "" while it runs, then how it ended; `error` is why it broke off. `command`
    repeats it."""

    folder: Path
    command: str
    step: Step = Step("Getting ready")
    ended: str = ""
    error: str = ""


class SweepJob(Background[SweepStatus]):
    """Sweeps of the model of `runs`, one at a time. `busy` says whether something else is measured. `options` are
    further options of the command that repeats a sweep, such as --config."""

    def __init__(self, runs: Runs, busy: Callable[[], bool], options: Sequence[str] = ()) -> None:
        super().__init__()
        self.runs, self._busy, self._options = runs, busy, tuple(options)
        self._lines: tuple[tuple[Row, ...], list[Line]] = ((), [])

    def start(self, plans: Sequence[SplitPlan], defences: Sequence[str], prompts: int) -> None:
        """Begin a sweep, or go on with one. Raises InputError for nothing to do, SetupError while another one runs."""
        most = len(victims.built_in())
        if not 1 <= prompts <= most:
            raise InputError("limit", prompts, f"1 to {most}, which is all that there are")
        if not defences:
            raise InputError("defences", "", "at least one; none is one, too")
        if self.running:
            raise SetupError(RUNNING)
        runs = self.runs
        asked = SweepRequest(runs.files, runs.dtype, (*plans,), (*defences,), prompts, runs.config.runs.threads)
        folder = self._folder(plans[0].end)
        first = SweepStatus(folder, self._command(asked, folder))
        self.begin(first, lambda stop: self._work(asked, first, stop), "sweep")

    def rows(self) -> list[Row]:
        """What sweeps have found of the model in use, as it is cut now. Raises InputError for a damaged file."""
        return results.read(self._folder(self.runs.plan.end))

    def lines(self) -> list[Line]:
        """What the rows say together. Raises as `rows`."""
        found = tuple(self.rows())
        if self._lines[0] != found:  # intervals take a second
            self._lines = found, summary(found)
        return self._lines[1]

    @property
    def maps(self) -> Path:
        """The folder for what attacks on single prompts learn."""
        return self._cache / "maps"

    @property
    def _cache(self) -> Path:
        return cache_folder(self.runs.config.model) / "attacks"

    def _folder(self, end: int) -> Path:
        """One for each header and format of results, so that no sweep meets another one's."""
        runs = self.runs
        header = results.header_of(runs.files, runs.dtype, end, victims.ANSWER_TOKENS, 0, victims.built_in())
        name = hashlib.sha256(json.dumps([results.FORMAT, header]).encode()).hexdigest()[:16]
        return self._cache / name

    def _work(self, asked: SweepRequest, status: SweepStatus, stop: threading.Event) -> Iterator[SweepStatus]:
        try:
            for step in process.stream(live.WHAT, "splitlearn.privacy.attacked:sweep", stop, asked, status.folder):
                status = replace(status, step=step)
                yield status
                if self._busy():
                    yield replace(status, step=Step(PAUSED))
                while self._busy() and not stop.wait(POLL_S):
                    pass
            ended, error = "stopped" if stop.is_set() else "done", ""
        except Exception as problem:  # any error must reach the page
            ended, error = "broken off", str(as_error(problem, "running the sweep"))
        yield replace(status, ended=ended, error=error)

    def _command(self, asked: SweepRequest, folder: Path) -> str:
        """The command that does the same, or goes on with it."""
        given = {
            "--splits": ",".join(str(plan.start) for plan in asked.plans),
            "--attacks": ",".join(live.LIVE),
            "--defences": ",".join(asked.defences),
            "--limit": str(asked.prompts),
            "--out": str(folder),
        }
        words = [word for pair in given.items() for word in pair]
        return shlex.join([programs.spoken(), "-m", "splitlearn", "attack", *self._options, *words])

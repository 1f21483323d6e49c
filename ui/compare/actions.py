"""The actions of the Answers tab, and the state that all tabs share. Plain values in, views out. Nothing of Gradio
here."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path

from splitlearn.arms.startup import Startup
from splitlearn.errors import SplitlearnError
from splitlearn.flags.selection import check, parse
from splitlearn.lab.job import Job
from splitlearn.lab.store import FOLDER
from splitlearn.privacy.sweep_job import SweepJob
from ui import inputs
from ui.attacks.actions import Attacks
from ui.compare import session
from ui.compare.session import ArmView, ComparisonView
from ui.flags import flag_words
from ui.history.actions import Historian
from ui.lab.actions import Lab
from ui.line import Line
from ui.model.actions import Planner
from ui.models.actions import Chooser
from ui.network.actions import Network
from ui.trunk.monitor import Monitor
from ui.visitors import Downloads, Stops

MEASURING = (
    "The machine is measuring an experiment, which a comparison would disturb. The Lab tab shows its progress and can "
    "stop it."
)


class Handlers:
    """The page's actions on the arms of `startup`. A context manager, since it owns the folder of downloads.

    `options` are the command-line options for the same settings, such as --config.
    """

    def __init__(self, startup: Startup, options: Sequence[str] = ()) -> None:
        self.startup = startup
        self.runs = runs = startup.runs
        self.stops = Stops()
        self.line = Line()
        self.running: ComparisonView | None = None  # the view of the running comparison
        self.downloads = Downloads()
        self.historian = Historian(runs, self.downloads, options)
        self.lab = Lab(Job(runs, Path(FOLDER), options), self.downloads)
        self.planner = Planner(startup, self.stops, self.line, self._measuring)
        self.attacks = Attacks(self.planner, SweepJob(runs, self._busy, options))
        self.chooser = Chooser(startup, self.planner)
        self.network = Network(startup, self._measuring)
        self.monitor = Monitor(runs, lambda: runs.busy or self.lab.job.running)

    def __enter__(self) -> "Handlers":
        return self

    def __exit__(self, *_: object) -> None:
        self.end()
        self.downloads.__exit__()

    def end(self) -> None:
        """Stop all comparisons, and the experiment and the sweep, which can be resumed."""
        self.stops.stop_all()
        self.lab.job.close()
        self.attacks.job.close()
        self.monitor.close()

    def _measuring(self) -> str:
        return MEASURING if self.lab.job.running else ""

    def _busy(self) -> bool:
        """Whether something is measured or loaded."""
        return self.line.taken or self.runs.busy or self.startup.running or self.lab.job.running

    def leave(self, visitor: str) -> None:
        """Stop the runs of a visitor whose page was closed, and remove her files."""
        self.stops.stop(visitor)
        self.line.leave(visitor)
        for key in (visitor, f"{visitor} flags", f"{visitor} sweep"):
            self.downloads.forget(key)
        self.historian.leave(visitor)
        self.network.leave(visitor)

    def begin(self, visitor: str) -> int:
        """Clear the visitor's stop signal and join the queue. Returns her place in it."""
        self.stops.begin(visitor)
        return self.line.join(visitor)

    def compare(self, typed: Mapping[str, object], words: str, visitor: str) -> Iterator[ComparisonView]:
        """Run the typed request through both arms once they are loaded. Refused while an experiment is measured."""
        try:
            with closing(self._compare(typed, words, visitor)) as states:  # type: ignore[type-var]  # a generator
                for self.running in states:
                    yield self.running
        finally:
            self.running = None

    def _compare(self, typed: Mapping[str, object], words: str, visitor: str) -> Iterator[ComparisonView]:
        if self.lab.job.running:
            yield ComparisonView(error=MEASURING)
            return
        try:
            request, pairs, link = inputs.request(typed), inputs.pairs(typed), inputs.link(typed)
            check(words)
        except SplitlearnError as error:
            yield ComparisonView(error=str(error))
            return
        stop = self.stops.signal(visitor)
        self.startup.begin()
        if self.startup.running:
            yield ComparisonView(ArmView("full", "warming"), ArmView("split", "warming"))
            self.startup.wait(stop)
        try:
            flags = parse(words, flag_words.available(self.runs))
        except SplitlearnError as error:
            yield ComparisonView(error=str(error))
            return
        with closing(session.compare(self.runs, flags, request, stop, pairs, link)) as states:  # type: ignore[type-var]  # a generator
            yield from states

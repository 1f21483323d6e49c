"""What the page does when a person acts: each function takes plain values and gives what is to be drawn."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path

from splitlearn.arms.startup import Startup
from splitlearn.errors import SplitlearnError
from splitlearn.flags.selection import check, parse
from splitlearn.lab.job import Job
from splitlearn.lab.store import FOLDER
from ui import inputs
from ui.compare import session
from ui.compare.session import ArmView, ComparisonView
from ui.flags import flag_words
from ui.history.actions import Historian
from ui.lab.actions import Lab
from ui.model.actions import Planner
from ui.models.actions import Chooser
from ui.network.actions import Network
from ui.trunk.monitor import Monitor
from ui.visitors import Downloads, Line, Stops

MEASURING = (
    "The machine is measuring an experiment; a comparison now would disturb it. The Lab tab shows how far it is, and "
    "can stop it. What you typed stays as it is."
)


class Handlers:
    """The page's actions on the arms of `startup`. Use as a context: it holds the folder of what is downloaded.

    `options` is what the command line needs to find the same settings, such as --config.
    """

    def __init__(self, startup: Startup, options: Sequence[str] = ()) -> None:
        self.startup = startup
        self.runs = runs = startup.runs
        self.stops = Stops()
        self.line = Line()
        self.downloads = Downloads()
        self.historian = Historian(runs, self.downloads, options)
        self.lab = Lab(Job(runs, Path(FOLDER), options), self.downloads)
        self.planner = Planner(startup, self.stops, self.line, self._measuring)
        self.chooser = Chooser(startup, self.planner)
        self.network = Network(startup, self._measuring)
        self.monitor = Monitor(runs, lambda: runs.busy or self.lab.job.running)

    def __enter__(self) -> "Handlers":
        return self

    def __exit__(self, *_: object) -> None:
        self.end()
        self.downloads.__exit__()

    def end(self) -> None:
        """End every comparison and the experiment, which can be resumed."""
        self.stops.stop_all()
        self.lab.job.close()
        self.monitor.close()

    def _measuring(self) -> str:
        return MEASURING if self.lab.job.running else ""

    def leave(self, visitor: str) -> None:
        """The page of that visitor was closed: end her run, and any that waits, and remove what is hers."""
        self.stops.stop(visitor)
        self.line.leave(visitor)
        for mine in (visitor, f"{visitor} flags"):
            self.downloads.forget(mine)
        self.historian.leave(visitor)
        self.network.leave(visitor)

    def begin(self, visitor: str) -> int:
        """A comparison was asked for: what was stopped before does not stop it. Returns her place in the line."""
        self.stops.begin(visitor)
        return self.line.join(visitor)

    def compare(self, typed: Mapping[str, object], words: str, visitor: str) -> Iterator[ComparisonView]:
        """Run what was typed through both arms, once they are loaded; not while an experiment is being measured."""
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
            for shown in states:
                yield shown
        if shown.pairs and shown.ended:
            self.planner.learn(words, flags, shown.pairs, link, shown.others_cpu)

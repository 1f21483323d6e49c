"""The actions of the tab "Model and cut": read the anatomy, measure, predict and adopt cuts. Nothing of Gradio here."""

import queue
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TypeVar

from splitlearn.arms.startup import ANY_PROMPT, Startup
from splitlearn.errors import InputError, SetupError
from splitlearn.events import GenerationRequest
from splitlearn.flags.selection import FlagSet, parse
from splitlearn.link.emulated import Link
from splitlearn.models.plan import SplitPlan
from splitlearn.planning import anatomy as planning
from splitlearn.planning.anatomy import Anatomy
from splitlearn.planning.costs import CutCost, Rates, cut_cost
from splitlearn.planning.measure import (
    CutRun,
    measure_cut,
    measure_rates,
    short_request,
)
from splitlearn.planning.report import CutReport, report_of
from splitlearn.runtime.progress import Progress, Step
from ui import inputs
from ui.flags import flag_words
from ui.line import Line
from ui.model.view import context_of
from ui.visitors import Stops

USUAL_CONTEXT = 2048
POLL_S = 0.1
Result = TypeVar("Result")


@dataclass(frozen=True)
class Question:
    """The chosen cut, and the context, memory limit and link for it."""

    plan: SplitPlan
    context: int
    client_memory_bytes: float | None
    link: Link


@dataclass(frozen=True)
class Measurement:
    """The rates of these machines with the flags `words`, measured at `at_s` (seconds since the epoch)."""

    words: str
    flags: FlagSet
    rates: Rates
    at_s: float


@dataclass
class _Known:
    """What was read and measured of the model with this `digest`."""

    digest: str = ""
    anatomy: Anatomy | None = None
    measured: Measurement | None = None
    cuts: dict[tuple[FlagSet, Link, SplitPlan], CutRun] = field(default_factory=dict)
    report: tuple[object, CutReport] | None = None


class Planner:
    """Measures and predicts cuts of the model of `startup`. All visitors share the measurements, as they share the
    machine. Those of a model that is no longer in use are dropped.

    `measuring` returns a sentence while an experiment runs, and else an empty text.
    """

    def __init__(self, startup: Startup, stops: Stops, line: Line, measuring: Callable[[], str]) -> None:
        self.runs, self.stops, self.line = startup.runs, stops, line
        self._startup, self._measuring = startup, measuring
        self._lock = threading.Lock()
        self._last = _Known()

    @property
    def _known(self) -> _Known:
        """What was read and measured of the model in use. Raises what reading the model raises."""
        digest = self.runs.files.digest
        if self._last.digest != digest:
            self._last = _Known(digest)
        return self._last

    @property
    def is_read(self) -> bool:
        """Whether the anatomy was already read."""
        return self._last.anatomy is not None and self._known.anatomy is not None

    @property
    def measured(self) -> Measurement | None:
        """The last measurement of the model in use."""
        return self._known.measured

    def begin(self, visitor: str) -> int:
        """Clear the visitor's stop signal and join the queue. Returns her place in it."""
        self.stops.begin(visitor)
        return self.line.join(visitor)

    def anatomy(self) -> Anatomy:
        """The model's anatomy, read once. Raises what reading the model raises."""
        with self._lock:
            known = self._known
            if known.anatomy is None:
                known.anatomy = planning.read(self.runs.files, self.runs.dtype)
            return known.anatomy

    def question(self, typed: Mapping[str, object]) -> Question:
        """Parse the fields of the tab. Raises InputError."""
        anatomy = self.anatomy()
        plan = SplitPlan(inputs.whole("start", typed["start"]), inputs.whole("end", typed["end"]), anatomy.n_layers)
        context, most = inputs.whole("context", typed["context"]), context_of(anatomy)
        if not 1 <= context <= most:
            raise InputError("context", context, f"1 to {most}, which is all that the model takes")
        return Question(plan, context, _memory(typed["memory"]), inputs.link(typed))

    def report(self, question: Question) -> CutReport | None:
        """The costs of all cuts; None before anything was measured."""
        known = self._known
        if (measured := known.measured) is None:
            return None
        runs = [run for (flags, link, _), run in known.cuts.items() if (flags, link) == (measured.flags, question.link)]
        key = (measured, self.runs.plan, question.link, question.context, question.client_memory_bytes, tuple(runs))
        if known.report is None or known.report[0] != key:
            memory = question.client_memory_bytes
            about = (self.anatomy(), self.runs.plan, measured.rates, question.link, question.context, memory)
            known.report = key, report_of(*about, runs)
        return known.report[1]

    def short(self, question: Question, rates: Rates) -> CutCost:
        """The predicted cost of the chosen cut at the context of the runs, to compare with a measured cut."""
        plan = question.plan
        return cut_cost(self.anatomy(), rates, question.link, rates.context, plan.start, plan.end)

    def measure(self, words: str, visitor: str) -> Iterator[Step]:
        """Measure the rates with the flags `words`. Yields progress."""
        stop = yield from self.ready(visitor)
        flags, request = self._flags(words), self._request()
        rates = yield from follow(
            lambda progress: measure_rates(self.runs, self.anatomy(), flags, request, progress, stop), stop
        )
        if rates is not None:
            self._known.measured = Measurement(words, flags, rates, time.time())

    def measure_cut(self, question: Question, words: str, visitor: str) -> Iterator[Step]:
        """Run the cut of `question` with the prediction's flags. Measures the rates first if there are none. Yields
        progress."""
        stop = yield from self.ready(visitor)
        if self.measured is None:
            yield from self.measure(words, visitor)
        if (measured := self.measured) is None:  # it was stopped
            return
        flags, plan, link, request = measured.flags, question.plan, question.link, self._request()
        run = yield from follow(
            lambda progress: measure_cut(self.runs, plan, flags, request, link, progress, stop), stop
        )
        if run is not None:
            self._known.cuts[flags, link, plan] = run

    def adopt(self, plan: SplitPlan) -> None:
        """Use this cut from now on. Raises InputError if the trunk server has other layers, SetupError while an
        experiment runs."""
        self.check()
        self.runs.split_at(plan)

    def ready(self, visitor: str) -> Generator[Step, None, threading.Event]:
        """Wait for the requests before the visitor, and for the background loading. Returns her stop signal."""
        self.check()
        stop = self.stops.signal(visitor)
        self.line.take(visitor, stop)
        self._startup.begin()
        if self._startup.running:
            yield Step("Waiting until the model and both arms are loaded")
            self._startup.wait(stop)
        return stop

    def check(self) -> None:
        """Raise SetupError while an experiment runs."""
        if reason := self._measuring():
            raise SetupError(reason)

    def _flags(self, words: str) -> FlagSet:
        return parse(words, flag_words.available(self.runs))

    def _request(self) -> GenerationRequest:
        return short_request(self.runs.config.generation.prompt.strip() or ANY_PROMPT)


def follow(work: Callable[[Progress], Result], stop: threading.Event) -> Generator[Step, None, Result]:
    """Run `work` in a thread. Yields its steps and returns its result. Closing the generator sets `stop`."""
    steps: queue.SimpleQueue[Step] = queue.SimpleQueue()
    done: Future[Result] = Future()

    def run() -> None:
        try:
            done.set_result(work(steps.put))
        except BaseException as error:
            done.set_exception(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        while thread.is_alive() or not steps.empty():
            with suppress(queue.Empty):
                yield steps.get(timeout=POLL_S)
        return done.result()
    except GeneratorExit:
        stop.set()
        thread.join()
        raise


def _memory(typed: object) -> float | None:
    """Bytes of a limit in MB; None for an empty field."""
    if not str(typed or "").strip():
        return None
    value = inputs.decimal("memory", typed)
    if not 0 < value < 1e9:
        raise InputError("memory", typed, "megabytes above 0, or nothing for no limit")
    return value * 1e6

"""What the tab "Model and cut" does: reads the anatomy, measures, and cuts elsewhere. Nothing of Gradio here."""

import queue
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TypeVar

from splitlearn.arms.compare import Pairs
from splitlearn.arms.report import ArmReport
from splitlearn.arms.startup import ANY_PROMPT, Startup
from splitlearn.errors import InputError, SetupError, SplitlearnError
from splitlearn.events import GenerationRequest
from splitlearn.flags.selection import FlagSet, parse
from splitlearn.link.emulated import Link
from splitlearn.models.plan import SplitPlan
from splitlearn.planning import anatomy as planning
from splitlearn.planning.anatomy import Anatomy
from splitlearn.planning.costs import CutCost, Rates, cut_cost
from splitlearn.planning.measure import (
    CutRun,
    arms_of,
    measure_cut,
    measure_rates,
    measured_at,
    rates_from,
    short_request,
)
from splitlearn.planning.report import CutReport, report_of
from splitlearn.runtime.progress import Progress, Step
from ui import inputs
from ui.flags import flag_words
from ui.model.view import context_of
from ui.visitors import Line, Stops

USUAL_CONTEXT = 2048
POLL_S = 0.1
FEWEST, FEWEST_TOKENS = 3, 16
"""Runs of each arm, and tokens of each run, from which rates are taken."""
Found = TypeVar("Found")


@dataclass(frozen=True)
class Question:
    """Which cut is looked at, for which client and link."""

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


class Planner:
    """The cuts of the model of `startup`. What was measured is kept for all visitors, since all share the machine.

    `measuring` says that an experiment is under way, as a sentence; empty when none is.
    """

    def __init__(self, startup: Startup, stops: Stops, line: Line, measuring: Callable[[], str]) -> None:
        self.runs, self.stops, self.line = startup.runs, stops, line
        self._startup, self._measuring = startup, measuring
        self._lock = threading.Lock()
        self._anatomy: Anatomy | None = None
        self.measured: Measurement | None = None
        self._cuts: dict[tuple[FlagSet, Link, SplitPlan], CutRun] = {}
        self._report: tuple[object, CutReport] | None = None

    @property
    def is_read(self) -> bool:
        """Whether the anatomy is there without waiting."""
        return self._anatomy is not None

    def forget(self) -> None:
        """Another model is in use: nothing that was read or measured holds for it."""
        with self._lock:
            self._anatomy = self.measured = self._report = None
            self._cuts.clear()

    def begin(self, visitor: str) -> int:
        """Something was asked for: what was stopped before does not stop it. Returns her place in the line."""
        self.stops.begin(visitor)
        return self.line.join(visitor)

    def anatomy(self) -> Anatomy:
        """What the model is made of, read once. Raises what reading the model raises."""
        with self._lock:
            if self._anatomy is None:
                self._anatomy = planning.read(self.runs.files, self.runs.dtype)
            return self._anatomy

    def question(self, typed: Mapping[str, object]) -> Question:
        """What the fields of the tab say. Raises InputError."""
        anatomy = self.anatomy()
        plan = SplitPlan(inputs.whole("start", typed["start"]), inputs.whole("end", typed["end"]), anatomy.n_layers)
        context, most = inputs.whole("context", typed["context"]), context_of(anatomy)
        if not 1 <= context <= most:
            raise InputError("context", context, f"1 to {most}, which is all that the model takes")
        return Question(plan, context, _memory(typed["memory"]), inputs.link(typed))

    def report(self, question: Question) -> CutReport | None:
        """The costs of all cuts; None before anything was measured."""
        found = self.measured
        if found is None:
            return None
        runs = [run for (flags, link, _), run in self._cuts.items() if (flags, link) == (found.flags, question.link)]
        key = (found, self.runs.plan, question.link, question.context, question.client_memory_bytes, tuple(runs))
        if self._report is None or self._report[0] != key:
            memory = question.client_memory_bytes
            about = (self.anatomy(), self.runs.plan, found.rates, question.link, question.context, memory)
            self._report = key, report_of(*about, runs)
        return self._report[1]

    def short(self, question: Question, rates: Rates) -> CutCost:
        """The chosen cut with as few tokens as the runs have: what a measured cut is held against."""
        plan = question.plan
        return cut_cost(self.anatomy(), rates, question.link, rates.context, plan.start, plan.end)

    def measure(self, words: str, visitor: str) -> Iterator[Step]:
        """Measure the rates with the flags `words`; a step for each thing worth saying."""
        stop = yield from self.ready(visitor)
        flags, request = self._flags(words), self._request()
        rates = yield from follow(
            lambda progress: measure_rates(self.runs, self.anatomy(), flags, request, progress, stop), stop
        )
        if rates is not None:
            self.measured = Measurement(words, flags, rates, time.time())

    def learn(self, words: str, flags: FlagSet, pairs: Pairs, link: Link, others_cpu: float) -> None:
        """Take the rates from a comparison, if it shows them and nothing was measured with these flags.

        It shows them when the trunk was near and kept, the client's flags are the full model's, and there were some
        runs of some tokens.
        """
        runs, usable = self.runs, [*zip(pairs.full, pairs.split, strict=True)]
        usable = [pair for pair in usable if all(_shows_rates(report) for report in pair)]
        apart = link != Link() or "whole" in arms_of(flags) or measured_at(runs) != runs.plan
        if apart or len(usable) < FEWEST or (self.measured and self.measured.flags == flags):
            return
        full, split = zip(*usable, strict=True)
        with suppress(SplitlearnError):  # a model whose structure cannot be read: the tab says so
            rates = rates_from(runs, self.anatomy(), flags, runs.plan, {"full": [*full], "split": [*split]})
            self.measured = Measurement(words, flags, replace(rates, others_cpu=others_cpu), time.time())

    def measure_cut(self, question: Question, words: str, visitor: str) -> Iterator[Step]:
        """Run the cut of `question` with the flags of the prediction, which is measured first where there is none."""
        stop = yield from self.ready(visitor)
        if self.measured is None:
            yield from self.measure(words, visitor)
        if self.measured is None:  # it was stopped
            return
        flags, plan, link, request = self.measured.flags, question.plan, question.link, self._request()
        run = yield from follow(
            lambda progress: measure_cut(self.runs, plan, flags, request, link, progress, stop), stop
        )
        if run is not None:
            self._cuts[flags, link, plan] = run

    def adopt(self, plan: SplitPlan) -> None:
        """Compare with this cut from now on. Raises InputError for a trunk server that has other layers, and SetupError
        while an experiment is measured."""
        self.check()
        self.runs.split_at(plan)

    def ready(self, visitor: str) -> Generator[Step, None, threading.Event]:
        """Wait until what loads in the background is loaded."""
        self.check()
        stop = self.stops.signal(visitor)
        self._startup.begin()
        if self._startup.running:
            yield Step("Waiting until the model and both arms are loaded")
            self._startup.wait(stop)
        return stop

    def check(self) -> None:
        """Raise SetupError while an experiment is measured."""
        if said := self._measuring():
            raise SetupError(said)

    def _flags(self, words: str) -> FlagSet:
        return parse(words, flag_words.available(self.runs))

    def _request(self) -> GenerationRequest:
        return short_request(self.runs.config.generation.prompt.strip() or ANY_PROMPT)


def follow(work: Callable[[Progress], Found], stop: threading.Event) -> Generator[Step, None, Found]:
    """Run `work` in a thread of its own; its steps as they come, and what it gave at the end. Closing sets `stop`."""
    steps: queue.SimpleQueue[Step] = queue.SimpleQueue()
    done: Future[Found] = Future()

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


def _shows_rates(report: ArmReport) -> bool:
    """Whether a run of a comparison can stand for others: one sample of some tokens, and no trunk was lost."""
    metrics = report.metrics
    return not report.others and not metrics.recoveries and metrics.n_tokens >= FEWEST_TOKENS


def _memory(typed: object) -> float | None:
    """Bytes of a limit in MB; None for an empty field."""
    if not str(typed or "").strip():
        return None
    value = inputs.decimal("memory", typed)
    if not 0 < value < 1e9:
        raise InputError("memory", typed, "megabytes above 0, or nothing for no limit")
    return value * 1e6

"""One comparison as a page follows it: what each side shows at any moment. Nothing of Gradio here."""

import random
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Literal

from splitlearn.arms.compare import KINDS
from splitlearn.arms.runs import ArmReport, Restart, Runs
from splitlearn.arms.spec import Kind
from splitlearn.errors import InputError, SplitlearnError
from splitlearn.events import Event, GenerationRequest
from splitlearn.flags.selection import FlagSet
from splitlearn.metrics import RunMetrics, of_samples

DRAW_S = 0.1  # drawing oftener takes time from the run on a machine with few cores
State = Literal["idle", "waiting", "warming", "loading", "compiled", "running", "done", "stopped", "failed"]


@dataclass(frozen=True)
class ArmView:
    """What one side shows: `metrics` of what came so far, `report` once the run is complete, `error` if it failed;
    `others` are of the samples after the first."""

    kind: Kind
    state: State = "idle"
    metrics: RunMetrics | None = None
    report: ArmReport | None = None
    error: str = ""
    others: tuple[RunMetrics, ...] = ()

    @property
    def samples(self) -> tuple[RunMetrics, ...]:
        """What came of each sample so far."""
        return (self.metrics, *self.others) if self.metrics else ()


@dataclass(frozen=True)
class ComparisonView:
    """Both sides, and an error that concerns both."""

    full: ArmView = ArmView("full")
    split: ArmView = ArmView("split")
    error: str = ""

    def of(self, kind: Kind) -> ArmView:
        """The side of that kind."""
        return self.full if kind == "full" else self.split

    def with_arm(self, arm: ArmView) -> "ComparisonView":
        """The same with `arm` in its place."""
        return replace(self, full=arm) if arm.kind == "full" else replace(self, split=arm)

    @property
    def both(self) -> tuple[ArmReport, ArmReport] | None:
        """The reports of full and split, when both are complete."""
        full, split = self.full.report, self.split.report
        return (full, split) if full and split else None


def compare(runs: Runs, flags: FlagSet, request: GenerationRequest, stop: threading.Event) -> Iterator[ComparisonView]:
    """Run both arms, one after the other in random order; a state for each moment worth drawing.

    An arm that fails leaves the other one alone, unless the request itself is at fault.
    """
    shown = ComparisonView(ArmView("full", "waiting"), ArmView("split", "waiting"))
    yield shown
    for kind in random.sample(KINDS, len(KINDS)):
        try:
            for arm in _follow(runs, kind, flags, request, stop):
                shown = shown.with_arm(arm)
                yield shown
        except InputError as error:
            yield ComparisonView(error=str(error))
            return
        except SplitlearnError as error:
            shown = shown.with_arm(replace(shown.of(kind), state="failed", error=str(error)))
            yield shown


def _follow(
    runs: Runs, kind: Kind, flags: FlagSet, request: GenerationRequest, stop: threading.Event
) -> Iterator[ArmView]:
    """One arm's run, at most one state in DRAW_S while tokens come."""
    if stop.is_set():
        yield ArmView(kind, "stopped")
        return
    yield ArmView(kind, "loading")
    events: list[Event] = []
    report, drawn = None, 0.0
    with closing(runs.stream(kind, flags, request, stop)) as items:  # type: ignore[type-var]  # a generator
        for item in items:
            if isinstance(item, ArmReport):
                report = item
            elif isinstance(item, Restart):
                events.clear()
                yield ArmView(kind, "compiled")
            else:
                events.append(item)
                if time.monotonic() - drawn >= DRAW_S:
                    drawn = time.monotonic()
                    yield _view(kind, "running", of_samples(events, request.samples))
    samples = report.samples if report else of_samples(events, request.samples)
    complete = report is not None and all(each.finish_reason != "cancelled" for each in samples)
    yield _view(kind, "done" if complete else "stopped", samples, report if complete else None)


def _view(kind: Kind, state: State, samples: Sequence[RunMetrics], report: ArmReport | None = None) -> ArmView:
    return ArmView(kind, state, samples[0] if samples else None, report, others=tuple(samples[1:]))

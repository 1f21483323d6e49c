"""One comparison as a stream of views: what each card shows at any moment. Nothing of Gradio here."""

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from statistics import mean
from typing import Literal

from splitlearn.arms.compare import KINDS, DivergentLogits, Pairs, divergent_logits, turns
from splitlearn.arms.report import ArmReport, Item, Restart
from splitlearn.arms.runs import Runs
from splitlearn.arms.spec import Kind
from splitlearn.errors import InputError, SplitlearnError
from splitlearn.events import Event, GenerationRequest, Reconnecting
from splitlearn.flags.selection import FlagSet
from splitlearn.link.emulated import Link
from splitlearn.metrics import RunMetrics, of_samples
from splitlearn.runtime.load import reading

# Drawing takes page and browser 10 to 60 ms of CPU. On two cores, drawing more often would slow the run.
DRAW_S = 0.25
State = Literal[
    "idle",
    "waiting",
    "warming",
    "loading",
    "compiled",
    "running",
    "reconnecting",
    "again",
    "between",
    "done",
    "stopped",
    "failed",
]


@dataclass(frozen=True)
class ArmView:
    """The view of one arm.

    `reports` has one for each complete run. `metrics` are those of the run so far, or of the typical report; `others`
    those of the samples after the first. `lost` is set while it reconnects to its trunk.
    """

    kind: Kind
    state: State = "idle"
    metrics: RunMetrics | None = None
    reports: tuple[ArmReport, ...] = ()
    error: str = ""
    others: tuple[RunMetrics, ...] = ()
    lost: Reconnecting | None = None

    @property
    def samples(self) -> tuple[RunMetrics, ...]:
        """The metrics of each sample so far."""
        return (self.metrics, *self.others) if self.metrics else ()


@dataclass(frozen=True)
class ComparisonView:
    """Both arms after some of `n_pairs` pairs, and an error that concerns both.

    `others_cpu` is the CPU use of other programs so far, in cores. `logits` are those of the first token that differs,
    known at the end.
    """

    full: ArmView = ArmView("full")
    split: ArmView = ArmView("split")
    error: str = ""
    n_pairs: int = 1
    others_cpu: float = 0.0
    logits: DivergentLogits | None = None

    def of(self, kind: Kind) -> ArmView:
        """The arm of that kind."""
        return self.full if kind == "full" else self.split

    def with_arm(self, arm: ArmView) -> "ComparisonView":
        """A copy with `arm` replaced."""
        return replace(self, full=arm) if arm.kind == "full" else replace(self, split=arm)

    @property
    def pairs(self) -> Pairs | None:
        """The complete pairs, once there is one."""
        n = min(len(self.full.reports), len(self.split.reports))
        return Pairs(self.full.reports[:n], self.split.reports[:n]) if n else None

    @property
    def left_s(self) -> float | None:
        """About how many seconds the runs still to come will take, the one under way included. None until each arm has
        one."""
        arms = (self.full, self.split)
        if not all(arm.reports for arm in arms):
            return None
        return sum((self.n_pairs - len(arm.reports)) * mean(_e2el_s(each) for each in arm.reports) for arm in arms)

    @property
    def ended(self) -> bool:
        """Whether both arms are done, stopped or failed."""
        return all(arm.state in ("done", "stopped", "failed") for arm in (self.full, self.split))


def _e2el_s(report: ArmReport) -> float:
    """Until the last of its samples ended."""
    return max(sample.e2el_s for sample in report.samples)


def compare(
    runs: Runs,
    flags: FlagSet,
    request: GenerationRequest,
    stop: threading.Event,
    pairs: int = 1,
    link: Link | None = None,
) -> Iterator[ComparisonView]:
    """Run both arms `pairs` times, one at a time in random order. Yields a view whenever something changes.

    If one arm fails, the other one still runs, unless the request is invalid. `link` None is the configured one.
    """
    before = reading(None)
    shown = ComparisonView(ArmView("full", "waiting"), ArmView("split", "waiting"), n_pairs=pairs)
    yield shown
    for kind in turns(pairs):
        if shown.of(kind).state in ("failed", "stopped"):
            continue
        try:
            for arm in _follow(runs, shown.of(kind), flags, request, stop, link):
                shown = shown.with_arm(arm)
                yield shown
        except InputError as error:
            yield ComparisonView(error=str(error))
            return
        except SplitlearnError as error:
            shown = shown.with_arm(replace(shown.of(kind), state="failed", error=str(error), lost=None))
            yield shown
        shown = replace(shown, others_cpu=reading(before).others_cpu)
    if shown.pairs is not None and not stop.is_set():
        shown = replace(shown, logits=divergent_logits(runs, request, flags, shown.pairs, stop))
    yield _ended(shown)


def _ended(shown: ComparisonView) -> ComparisonView:
    for kind in KINDS:
        arm = shown.of(kind)
        shown = shown.with_arm(replace(arm, state="done") if arm.state == "between" else arm)
    return shown


def _follow(
    runs: Runs, arm: ArmView, flags: FlagSet, request: GenerationRequest, stop: threading.Event, link: Link | None
) -> Iterator[ArmView]:
    """Run `arm` once."""
    if stop.is_set():
        yield replace(arm, state="stopped")
        return
    yield replace(arm, state="again" if arm.reports else "loading")
    drawing = _Drawing(arm, request.samples)
    with closing(runs.stream(arm.kind, flags, request, stop, link=link)) as items:  # type: ignore[type-var]  # a generator
        for item in items:
            drawn = drawing.take(item)
            if drawn is not None:
                yield drawn
    yield drawing.end()


@dataclass
class _Drawing:
    """Turns the items of one more run of `arm` into views. Tokens are drawn in the first run only."""

    arm: ArmView
    samples: int
    events: list[Event] = field(default_factory=list)
    report: ArmReport | None = None
    drawn_at: float = 0.0
    lost: bool = False

    def take(self, item: Item) -> ArmView | None:
        """The view after `item`, or None if nothing changed."""
        if isinstance(item, ArmReport):
            self.report = item
        elif isinstance(item, Restart):
            self.events.clear()
            return replace(self.arm, state="compiled")
        elif isinstance(item, Reconnecting):
            self.lost = True
            return replace(_with(self.arm, "reconnecting", self.so_far), lost=item)
        else:
            self.events.append(item)
            return self._token()
        return None

    def _token(self) -> ArmView | None:
        """At most one view in DRAW_S, and one after a reconnection."""
        reconnected, self.lost = self.lost, False
        if self.arm.reports:
            return replace(self.arm, state="again") if reconnected else None
        if not reconnected and time.monotonic() - self.drawn_at < DRAW_S:
            return None
        self.drawn_at = time.monotonic()
        return _with(self.arm, "running", self.so_far)

    @property
    def so_far(self) -> tuple[RunMetrics, ...]:
        """The samples to show: those of this run if it is the first, else those of the runs before."""
        return self.arm.samples if self.arm.reports else of_samples(self.events, self.samples)

    def end(self) -> ArmView:
        """The view after the run."""
        if self.report is None or any(each.finish_reason == "cancelled" for each in self.report.samples):
            first = self.report.samples if self.report else self.so_far
            return _with(self.arm, "stopped", self.arm.samples if self.arm.reports else first)
        reports = (*self.arm.reports, self.report)
        typical = Pairs(reports, reports).typical(self.arm.kind)
        return replace(_with(self.arm, "between", typical.samples), reports=reports)


def _with(arm: ArmView, state: State, samples: Sequence[RunMetrics]) -> ArmView:
    return replace(arm, state=state, metrics=samples[0] if samples else None, others=tuple(samples[1:]))

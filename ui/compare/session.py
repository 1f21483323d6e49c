"""One comparison as a page follows it: what each side shows at any moment. Nothing of Gradio here."""

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
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

# A drawing takes the page and a browser 10 to 60 ms of computing: on two cores, oftener takes time from the run.
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
    """What one side shows: `metrics` of what came so far, or of the typical one of its `reports`, one for each complete
    run; `error` if it failed; `others` are of the samples after the first; `lost` while it reconnects to its trunk."""

    kind: Kind
    state: State = "idle"
    metrics: RunMetrics | None = None
    reports: tuple[ArmReport, ...] = ()
    error: str = ""
    others: tuple[RunMetrics, ...] = ()
    lost: Reconnecting | None = None

    @property
    def samples(self) -> tuple[RunMetrics, ...]:
        """What came of each sample so far."""
        return (self.metrics, *self.others) if self.metrics else ()


@dataclass(frozen=True)
class ComparisonView:
    """Both sides after some of `asked` pairs, and an error that concerns both. `others_cpu` is what other programs have
    used of the processor so far, in cores; `logits` are those of the first token that differs, at the end."""

    full: ArmView = ArmView("full")
    split: ArmView = ArmView("split")
    error: str = ""
    asked: int = 1
    others_cpu: float = 0.0
    logits: DivergentLogits | None = None

    def of(self, kind: Kind) -> ArmView:
        """The side of that kind."""
        return self.full if kind == "full" else self.split

    def with_arm(self, arm: ArmView) -> "ComparisonView":
        """The same with `arm` in its place."""
        return replace(self, full=arm) if arm.kind == "full" else replace(self, split=arm)

    @property
    def pairs(self) -> Pairs | None:
        """The complete pairs, once there is one."""
        n = min(len(self.full.reports), len(self.split.reports))
        return Pairs(self.full.reports[:n], self.split.reports[:n]) if n else None

    @property
    def ended(self) -> bool:
        """Whether nothing of it will run any more."""
        return all(arm.state in ("done", "stopped", "failed") for arm in (self.full, self.split))


def compare(
    runs: Runs,
    flags: FlagSet,
    request: GenerationRequest,
    stop: threading.Event,
    pairs: int = 1,
    link: Link | None = None,
) -> Iterator[ComparisonView]:
    """Run both arms `pairs` times, one after the other in random order; a state for each moment worth drawing.

    An arm that fails leaves the other one alone, unless the request itself is at fault. `link` None is that of the
    configuration.
    """
    before = reading(None)
    shown = ComparisonView(ArmView("full", "waiting"), ArmView("split", "waiting"), asked=pairs)
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
    """One run of `arm`."""
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
    """What one more run of `arm` shows as its items come. Its tokens are drawn the first time."""

    arm: ArmView
    samples: int
    events: list[Event] = field(default_factory=list)
    report: ArmReport | None = None
    drawn_at: float = 0.0
    lost: bool = False

    def take(self, item: Item) -> ArmView | None:
        """What to draw after `item`; None for nothing new."""
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
        """At most one state in DRAW_S, and one after a reconnection."""
        found, self.lost = self.lost, False
        if self.arm.reports:
            return replace(self.arm, state="again") if found else None
        if not found and time.monotonic() - self.drawn_at < DRAW_S:
            return None
        self.drawn_at = time.monotonic()
        return _with(self.arm, "running", self.so_far)

    @property
    def so_far(self) -> tuple[RunMetrics, ...]:
        """What there is to show: this run's samples the first time, then those of the runs before."""
        return self.arm.samples if self.arm.reports else of_samples(self.events, self.samples)

    def end(self) -> ArmView:
        """The state after the run."""
        if self.report is None or any(each.finish_reason == "cancelled" for each in self.report.samples):
            first = self.report.samples if self.report else self.so_far
            return _with(self.arm, "stopped", self.arm.samples if self.arm.reports else first)
        reports = (*self.arm.reports, self.report)
        typical = Pairs(reports, reports).typical(self.arm.kind)
        return replace(_with(self.arm, "between", typical.samples), reports=reports)


def _with(arm: ArmView, state: State, samples: Sequence[RunMetrics]) -> ArmView:
    return replace(arm, state=state, metrics=samples[0] if samples else None, others=tuple(samples[1:]))

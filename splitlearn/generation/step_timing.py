"""The time breakdown of a generation, from event to event: the parts of each step, and the unattributed rest."""

import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from splitlearn.events import Layers, StageTiming, TokenEvent
from splitlearn.metrics import UNATTRIBUTED
from splitlearn.stages.base import StageOutput


@dataclass
class Ledger:
    """The breakdown of the time since the last events: seconds by name, on one monotonic clock from t0. Samples that
    run in step share it. Bytes and other facts of a stage's step belong to one sample."""

    t0: float = field(default_factory=time.perf_counter)
    since: float = 0.0
    parts: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    timings: defaultdict[int, list[StageTiming]] = field(default_factory=lambda: defaultdict(list))
    hops: dict[Layers, defaultdict[str, float]] = field(default_factory=dict)
    started_right: bool | None = None
    """Whether a speculative start of this step had the right token; None if it had no such start (head_overlap.py)."""

    def now(self) -> float:
        return time.perf_counter() - self.t0

    def spend(self, name: str, seconds: float) -> None:
        self.parts[name] += seconds

    def add(self, sample: int, timing: StageTiming) -> None:
        """Add a stage's timing of a step of `sample`."""
        for name, spent in timing.ledger.items():
            self.parts[name] += spent
        for layers, parts in timing.hops.items():
            own = self.hops.setdefault(layers, defaultdict(float))
            for name, spent in parts.items():
                own[name] += spent
        self.timings[sample].append(timing)

    def noted(self, sample: int, output: StageOutput) -> Tensor:
        """Add the timing of `output`, of a step of `sample`, and return its tensor."""
        self.add(sample, output.timing)
        return output.x

    def close_step(self, events: Sequence[TokenEvent], at: float) -> list[TokenEvent]:
        """Add the times to the events of a step whose tokens were on the host at `at`. Begins the next interval."""
        parts = dict(self.parts)
        parts[UNATTRIBUTED] = at - self.since - sum(parts.values())
        whole = [self._with_times(event, parts) for event in events]
        self.since, self.parts, self.timings, self.started_right = at, defaultdict(float), defaultdict(list), None
        self.hops = {}
        return whole

    def _with_times(self, event: TokenEvent, parts: dict[str, float]) -> TokenEvent:
        timings = self.timings[event.sample]
        return replace(
            event,
            ledger=parts,
            compile_s=sum((timing.compile_s for timing in timings), 0.0),
            bytes_up=sum(timing.bytes_up for timing in timings),
            bytes_down=sum(timing.bytes_down for timing in timings),
            recoveries=tuple(recovery for timing in timings for recovery in timing.recoveries),
            overlapped_s=sum((timing.overlapped_s for timing in timings), 0.0),
            head_start=self.started_right,
            hops={layers: dict(own) for layers, own in self.hops.items()},
        )

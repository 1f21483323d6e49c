"""What an emulated link costs a split run: the same run without it, the prediction from that, and what was measured."""

import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from splitlearn.arms.compare import Watch
from splitlearn.arms.report import ArmReport
from splitlearn.arms.runs import Runs
from splitlearn.client.real_link import RealLink, real_link
from splitlearn.events import GenerationRequest
from splitlearn.flags.selection import FlagSet
from splitlearn.link.emulated import Link
from splitlearn.link.prediction import Prediction, predict
from splitlearn.metrics import RunMetrics


@dataclass(frozen=True)
class LinkCost:
    """`real` is the link to the trunk, of a chain to its first server, beside the emulated one."""

    link: Link
    real: RealLink
    without: Prediction
    predicted: Prediction
    measured: Prediction

    @property
    def ttft(self) -> tuple[float, float, float]:
        """TTFT without the link, predicted with it, and measured."""
        return self.without.ttft_s, self.predicted.ttft_s, self.measured.ttft_s

    @property
    def tpot(self) -> tuple[float | None, float | None, float | None]:
        """The same of TPOT."""
        return self.without.tpot_s, self.predicted.tpot_s, self.measured.tpot_s

    def as_json(self) -> dict[str, Any]:
        """The part `link` of `compare --json`: seconds."""
        times = {"without": self.without, "predicted": self.predicted, "measured": self.measured}
        return {
            "emulated": self.link.as_json(),
            "real": asdict(self.real),
            **{name: asdict(each) for name, each in times.items()},
        }


def link_cost(
    runs: Runs,
    request: GenerationRequest,
    flags: FlagSet,
    over: ArmReport,
    watch: Watch = lambda kind, item: None,
    cancelled: threading.Event | None = None,
) -> LinkCost | None:
    """Run the split arm once more without its link, and compare with `over`, the run that had it. None where that had
    no link, and when it was cancelled. Raises as `Runs.stream`."""
    if over.link == Link():
        return None
    for item in runs.stream("split", flags, request, cancelled, link=Link()):
        watch("split", item)
        if isinstance(item, ArmReport):
            hops = runs.hops()
            real = real_link(hops[0].address(), hops[0].credentials)
            predicted = predict(item.samples, over.link, 1 if runs.config.trunk.forward else len(hops))
            return LinkCost(over.link, real, _times(item.samples), predicted, _times(over.samples))
    return None


def _times(samples: Sequence[RunMetrics]) -> Prediction:
    return Prediction(samples[0].ttft_s, samples[0].tpot_s)

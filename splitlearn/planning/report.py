"""All that is known of a model's cuts, as one record: what page and command line show, and `parts --cuts --json`."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from splitlearn.link.emulated import Link
from splitlearn.models.plan import SplitPlan
from splitlearn.planning.advice import Advice, advise
from splitlearn.planning.anatomy import Anatomy
from splitlearn.planning.costs import CutCost, Rates, cut_costs, pareto
from splitlearn.planning.measure import CutRun


@dataclass(frozen=True)
class CutReport:
    """The costs of every cut over `link` with `context` tokens, those that nothing beats (`front`), and the advice for
    a client of `client_memory_bytes`. `measured` are cuts that were also run."""

    plan: SplitPlan
    rates: Rates
    link: Link
    context: int
    client_memory_bytes: float | None
    costs: tuple[CutCost, ...]
    front: tuple[CutCost, ...]
    advice: Advice
    measured: tuple[CutRun, ...]

    def cost(self, start: int, end: int) -> CutCost:
        """The costs of one cut."""
        return next(cost for cost in self.costs if (cost.start, cost.end) == (start, end))

    def as_json(self) -> dict[str, Any]:
        """The object that `parts --cuts --json` adds: seconds and bytes (docs/planning.md)."""
        front = {(cost.start, cost.end) for cost in self.front}
        return {
            "split": {"start": self.plan.start, "end": self.plan.end, "n_layers": self.plan.n_layers},
            "link": self.link.as_json(),
            "context": self.context,
            "client_memory_bytes": self.client_memory_bytes,
            "rates": asdict(self.rates),
            "advice": asdict(self.advice),
            "cuts": [{**asdict(cost), "pareto": (cost.start, cost.end) in front} for cost in self.costs],
            "measured": [asdict(run) for run in self.measured],
        }


def report_of(
    anatomy: Anatomy,
    plan: SplitPlan,
    rates: Rates,
    link: Link,
    context: int | None = None,
    client_memory_bytes: float | None = None,
    measured: Sequence[CutRun] = (),
) -> CutReport:
    """The report for measured rates; another link, context or memory needs no new measurement. `context` None is that
    of the measurement."""
    length = context or rates.context
    costs = cut_costs(anatomy, rates, link, length)
    advice = advise(costs, rates, client_memory_bytes)
    return CutReport(plan, rates, link, length, client_memory_bytes, costs, pareto(costs), advice, tuple(measured))

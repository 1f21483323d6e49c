"""TPOT, TTFT and peak memory of four cuts, predicted by planning and measured.

Each block has one run of every cut and the runs from which the rates come, so that a prediction and its measurement see
the machine in the same state.
"""

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial

from bench.answer import report
from bench.pairs import warm_blocks
from bench.report import write
from splitlearn.arms.compare import environment
from splitlearn.arms.report import ArmReport
from splitlearn.arms.runs import Runs
from splitlearn.lab.stats import effect
from splitlearn.link.emulated import Link
from splitlearn.models.plan import SplitPlan
from splitlearn.planning import anatomy
from splitlearn.planning.costs import CutCost, cut_cost
from splitlearn.planning.measure import arms_of, cut_at, rates_from, short_request

BLOCKS = 24
CUTS = ((0, 30), (4, 26), (8, 20), (14, 16))


def main(runs: Runs) -> None:
    """Measure and write docs/results/cuts.md."""
    request, flags = short_request(runs.config.generation.prompt), runs.flags(runs.config.flags)
    model = anatomy.read(runs.files, runs.dtype)
    with ExitStack() as stack:
        arms: dict[str, Callable[[], ArmReport]] = {
            name: partial(report, runs, kind, own, request) for name, (kind, own) in arms_of(flags).items()
        }
        for start, end in CUTS:
            own_runs = stack.enter_context(cut_at(runs, SplitPlan(start, end, model.n_layers)))
            arms[f"{start}:{end}"] = partial(report, own_runs, "split", flags, request)
        found = warm_blocks(arms, BLOCKS)
    each = [
        rates_from(runs, model, flags, runs.plan, {name: [found[name][block]] for name in arms_of(flags)})
        for block in range(BLOCKS)
    ]
    rows = []
    for start, end in CUTS:
        predicted = [cut_cost(model, rates, Link(), rates.context, start, end) for rates in each]
        rows.append(_row(predicted, found[f"{start}:{end}"]))
    text = (
        f"Flags `{runs.config.flags}`; the rates are from the full model and the cut [{runs.plan.start}, "
        f"{runs.plan.end}), which run in the same blocks; {BLOCKS} blocks in random order. Memory is the peak of the "
        "client's and of the trunk's process, in MB, predicted and measured."
    )
    write("cuts", "What cuts cost, predicted and measured", text, rows, environment(runs))


def _row(predicted: list[CutCost], measured: list[ArmReport]) -> dict[str, str]:
    last, run = predicted[-1], measured[-1]
    trunk = run.trunk.peak_rss_bytes if run.trunk else 0
    tpot = [report.metrics.tpot_s or 0.0 for report in measured]
    return {
        "trunk layers": f"[{last.start}, {last.end})",
        "TPOT, measured / predicted": str(effect(tpot, [cost.tpot_s for cost in predicted])),
        "TTFT, measured / predicted": str(
            effect([report.metrics.ttft_s for report in measured], [cost.ttft_s for cost in predicted])
        ),
        "client": _memory(last.client_memory_bytes, run.peak_rss_bytes),
        "trunk": _memory(last.trunk_memory_bytes, trunk),
    }


def _memory(predicted: float, measured: int) -> str:
    return f"{predicted / 1e6:.0f}, {measured / 1e6:.0f} ({measured / predicted:.3f})"

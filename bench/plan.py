"""TPOT and TTFT of eight plans over emulated links, predicted by planning and measured.

Each block has one run of every plan and the runs from which the figures of the machines come, so that a prediction and
its measurement see the machine in the same state.
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
from splitlearn.link.words import parse
from splitlearn.models.plan import SplitPlan
from splitlearn.planning import anatomy
from splitlearn.planning.anatomy import Anatomy
from splitlearn.planning.costs import Rates
from splitlearn.planning.devices import DeviceEntry, device_of
from splitlearn.planning.machines import client_figures, trunk_figures
from splitlearn.planning.measure import arms_of, cut_at, rates_from, short_request
from splitlearn.planning.network import Network, work_of
from splitlearn.planning.route import Route, Span, predict

BLOCKS = 12
LINKS = ("none", "rtt=20ms,up=20mbit,down=100mbit")
CUTS = ((0, 30), (4, 26), (8, 20), (14, 16))
PLANS = tuple((cut, link) for cut in CUTS for link in LINKS)


def main(runs: Runs, blocks: int = BLOCKS) -> None:
    """Measure and write docs/results/plan.md."""
    request, flags = short_request(runs.config.generation.prompt), runs.flags(runs.config.flags)
    model = anatomy.read(runs.files, runs.dtype)
    with ExitStack() as stack:
        arms: dict[str, Callable[[], ArmReport]] = {
            name: partial(report, runs, kind, own, request) for name, (kind, own) in arms_of(flags).items()
        }
        for cut in CUTS:
            own_runs = stack.enter_context(cut_at(runs, SplitPlan(*cut, model.n_layers)))
            for link in LINKS:
                arms[_name(cut, link)] = partial(report, own_runs, "split", flags, request, parse(link))
        found = warm_blocks(arms, blocks)
    each = [
        rates_from(runs, model, flags, runs.plan, {name: [found[name][block]] for name in arms_of(flags)})
        for block in range(blocks)
    ]
    rows = [
        _row(cut, link, [_predicted(model, rates, cut, link) for rates in each], found[_name(cut, link)])
        for cut, link in PLANS
    ]
    text = (
        f"Flags `{runs.config.flags}`; the figures of client and trunk are from the full model and the cut "
        f"[{runs.plan.start}, {runs.plan.end}), which run in the same blocks without a link; {blocks} blocks in random "
        "order."
    )
    write("plan", "What plans cost, predicted and measured", text, rows, environment(runs))


def _name(cut: tuple[int, int], link: str) -> str:
    return f"{cut[0]}:{cut[1]} over {link}"


def _predicted(model: Anatomy, rates: Rates, cut: tuple[int, int], link: str) -> Route:
    """The plan's prediction, with the bytes that the runs had on the wire."""
    figures = {"client": client_figures(model, rates), "trunk": trunk_figures(rates)}
    devices = (
        device_of(name, DeviceEntry().model_copy(update={"memory": 1e12, **own})) for name, own in figures.items()
    )
    work = work_of(model, rates.prompt_tokens, rates.context, rates.prompt_token_bytes)
    return predict(work, Network(tuple(devices), {(0, 1): parse(link)}), (Span(1, *cut),))


def _row(cut: tuple[int, int], link: str, predicted: list[Route], measured: list[ArmReport]) -> dict[str, str]:
    tpot = [run.metrics.tpot_s or 0.0 for run in measured]
    ttft = [run.metrics.ttft_s for run in measured]
    return {
        "trunk layers": f"[{cut[0]}, {cut[1]})",
        "link": link,
        "TPOT, measured / predicted": str(effect(tpot, [route.tpot_s for route in predicted])),
        "TTFT, measured / predicted": str(effect(ttft, [route.ttft_s for route in predicted])),
    }

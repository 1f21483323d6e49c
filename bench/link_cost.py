"""TPOT and TTFT over the presets of emulated links, measured and predicted.

In each block every cut runs over every link once, in random order. The prediction is made from a run without a link, at
the same trunk, just before or after it.
"""

import random
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from statistics import fmean

from bench.answer import report
from bench.pairs import blocks as in_blocks
from bench.report import write
from splitlearn.arms.compare import environment
from splitlearn.arms.report import ArmReport
from splitlearn.arms.runs import Runs
from splitlearn.events import GenerationRequest
from splitlearn.lab.stats import effect
from splitlearn.link.emulated import NONE, Link
from splitlearn.link.prediction import predict
from splitlearn.link.words import PRESETS
from splitlearn.models.plan import SplitPlan
from splitlearn.planning.measure import cut_at

TOKENS = 16
CUTS = ((2, 28), (8, 22), (13, 17))
OVER = tuple(name for name in PRESETS if name != NONE)
NEAR, FAR = "near", "far"
Pair = tuple[ArmReport, ArmReport]


def main(runs: Runs, blocks: int = 12) -> None:
    """Measure and write docs/results/link_cost.md."""
    found = _measure(runs, blocks)
    rows = [
        {"trunk's layers": f"[{start}, {end})", **_row(name, found[f"{start}:{end} {name}"])}
        for start, end in CUTS
        for name in OVER
    ]
    text = (
        f"The presets of links.md, with three cuts of the default model: {TOKENS} tokens, flags `{runs.config.flags}`. "
        f"Predicted from a run without a link, beside it in random order; {blocks} such pairs for each row, one in "
        "each block, and all rows in random order within a block. Geometric mean ratios with 95% intervals."
    )
    write("link_cost", "What a link costs, predicted and measured", text, rows, environment(runs))


def _measure(runs: Runs, count: int) -> dict[str, list[Pair]]:
    """The pairs of each cut and link."""
    request = GenerationRequest(runs.config.generation.prompt, max_new_tokens=TOKENS, ignore_eos=True)
    arms: dict[str, Callable[[], Pair]] = {}
    with ExitStack() as stack:
        for start, end in CUTS:
            cut = stack.enter_context(cut_at(runs, SplitPlan(start, end, runs.plan.n_layers)))
            run = partial(report, cut, "split", cut.flags(cut.config.flags), request)
            for link in (Link(), PRESETS[OVER[0]].link):
                run(link=link)  # not counted: it loads and compiles
            arms |= {f"{start}:{end} {name}": partial(_pair, run, PRESETS[name].link) for name in OVER}
        return in_blocks(arms, count)


def _pair(run: "partial[ArmReport]", link: Link) -> Pair:
    """A run without `link` and one over it, in random order."""
    arms = {NEAR: partial(run, link=Link()), FAR: partial(run, link=link)}
    found = in_blocks(arms, 1, seed=random.randrange(1 << 30), say=lambda text: None)
    return found[NEAR][0], found[FAR][0]


def _row(name: str, pairs: list[Pair]) -> dict[str, str]:
    predicted = [predict(near.samples, PRESETS[name].link) for near, _ in pairs]
    measured = [far.metrics for _, far in pairs]
    tpots = [[each.tpot_s or 0.0 for each in metrics] for metrics in (predicted, measured)]
    ttfts = [[each.ttft_s for each in metrics] for metrics in (predicted, measured)]
    return {
        "link": f"{name}: {PRESETS[name].link.summary}",
        "TPOT, ms": " / ".join(f"{fmean(each) * 1e3:.1f}" for each in tpots),
        "TPOT, measured / predicted": str(effect(tpots[1], tpots[0])),
        "TTFT, ms": " / ".join(f"{fmean(each) * 1e3:.0f}" for each in ttfts),
        "TTFT, measured / predicted": str(effect(ttfts[1], ttfts[0])),
    }

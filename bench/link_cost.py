"""TPOT and TTFT over the presets of emulated links, against the prediction.

The prediction is made from a run without a link just before or after, in random order, at the same trunk.
"""

import random
from functools import partial
from statistics import fmean

from bench.answer import report
from bench.pairs import blocks
from bench.report import table, write
from splitlearn.arms.compare import environment
from splitlearn.arms.runs import ArmReport, Runs
from splitlearn.config import SplitConfig
from splitlearn.events import GenerationRequest
from splitlearn.lab.stats import effect
from splitlearn.link.emulated import NONE, Link
from splitlearn.link.prediction import predict
from splitlearn.link.words import PRESETS
from splitlearn.runtime.progress import silent
from splitlearn.runtime.terminal import say

BLOCKS, TOKENS = 8, 16
CUTS = ((2, 28), (8, 22), (13, 17))
OVER = tuple(name for name in PRESETS if name != NONE)
NEAR, FAR = "near", "far"


def main(runs: Runs) -> None:
    """Measure and write docs/results/link_cost.md."""
    rows = [row for cut in CUTS for row in _rows(runs, *cut)]
    text = (
        f"The presets of links.md, with three cuts of the default model: {TOKENS} tokens, flags `{runs.config.flags}`. "
        f"Predicted from a run without a link, beside it in random order; {BLOCKS} such pairs for each row, geometric "
        "mean ratios with 95% intervals."
    )
    write("link_cost", "What a link costs, predicted and measured", text, rows, environment(runs))


def _rows(runs: Runs, start: int, end: int) -> list[dict[str, str]]:
    """A row for each preset, with the trunk's layers [start, end)."""
    request = GenerationRequest(runs.config.generation.prompt, max_new_tokens=TOKENS, ignore_eos=True)
    config = runs.config.model_copy(update={"split": SplitConfig(start=start, end=end)})
    with Runs(config, silent) as cut:
        run = partial(report, cut, "split", cut.flags(config.flags), request)
        for link in (Link(), PRESETS[OVER[0]].link):
            run(link=link)  # what is loaded or compiled at first is not counted
        arms = {name: partial(_pair, run, PRESETS[name].link) for name in OVER}
        pairs = blocks(arms, BLOCKS)
    rows = [{"trunk's layers": f"[{start}, {end})", **_row(name, pairs[name])} for name in OVER]
    say(table(rows))  # what was measured so far, should the next cut fail
    return rows


def _pair(run: "partial[ArmReport]", link: Link) -> tuple[ArmReport, ArmReport]:
    """A run without `link` and one over it, in random order."""
    arms = {NEAR: partial(run, link=Link()), FAR: partial(run, link=link)}
    found = blocks(arms, 1, seed=random.randrange(1 << 30), say=lambda said: None)
    return found[NEAR][0], found[FAR][0]


def _row(name: str, pairs: list[tuple[ArmReport, ArmReport]]) -> dict[str, str]:
    predicted = [predict(near.samples, PRESETS[name].link) for near, _ in pairs]
    measured = [far.metrics for _, far in pairs]
    tpots = [[each.tpot_s or 0.0 for each in listed] for listed in (predicted, measured)]
    ttfts = [[each.ttft_s for each in listed] for listed in (predicted, measured)]
    return {
        "link": f"{name}: {PRESETS[name].link.summary}",
        "TPOT, ms": " / ".join(f"{fmean(each) * 1e3:.1f}" for each in tpots),
        "TPOT, measured / predicted": str(effect(tpots[1], tpots[0])),
        "TTFT, ms": " / ".join(f"{fmean(each) * 1e3:.0f}" for each in ttfts),
        "TTFT, measured / predicted": str(effect(ttfts[1], ttfts[0])),
    }

"""TPOT over emulated links, against what follows from the link: RTT, bytes over bandwidth, and the compute.

The compute is TPOT at the same trunk without a link, in the same blocks.
"""

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from statistics import fmean

from bench.answer import FAST, answer
from bench.link import Shape, link
from bench.pairs import blocks
from bench.report import write
from splitlearn.arms.compare import environment
from splitlearn.arms.runs import Runs
from splitlearn.config import TrunkConfig
from splitlearn.events import GenerationRequest
from splitlearn.lab.stats import effect
from splitlearn.metrics import RunMetrics
from splitlearn.runtime.progress import silent

BLOCKS = 12
TOKENS = 32
SHAPES = tuple(Shape(rtt, rate) for rtt in (0.005, 0.020, 0.050, 0.100) for rate in (10e6, 100e6))
NONE = "no link"


def main(runs: Runs) -> None:
    """Measure and write docs/results/links.md."""
    request = GenerationRequest(runs.config.generation.prompt, max_new_tokens=TOKENS, ignore_eos=True)
    flags = runs.flags(FAST)
    near = runs.trunk_addresses(flags.trunk)[0]
    with ExitStack() as stack:
        arms: dict[str, Callable[[], RunMetrics]] = {NONE: partial(answer, runs, "split", flags, request)}
        for shape in SHAPES:
            address = stack.enter_context(link(near, shape))
            config = runs.config.model_copy(update={"trunk": TrunkConfig(address=(address,))})
            arms[str(shape)] = partial(answer, stack.enter_context(Runs(config, silent)), "split", flags, request)
        for arm in arms.values():
            arm()
        found = blocks(arms, BLOCKS)
    rows = [_row(shape, found) for shape in SHAPES]
    text = (
        f"One token a trip, {TOKENS} tokens, flags `{FAST}`; {BLOCKS} blocks in random order. Predicted: TPOT "
        "without a link + RTT + 8 * bytes / bandwidth, up and down. The link is bench/link.py's."
    )
    write("links", "TPOT over links, predicted and measured", text, rows, environment(runs))


def _row(shape: Shape, found: dict[str, list[RunMetrics]]) -> dict[str, str]:
    measured = [run.tpot_s or 0.0 for run in found[str(shape)]]
    predicted = [
        (run.tpot_s or 0.0)
        + shape.rtt_s
        + shape.transfer_s((run.decode_bytes_up + run.decode_bytes_down) // (TOKENS - 1))
        for run in found[NONE]
    ]
    return {
        "link": str(shape),
        "predicted, ms": f"{fmean(predicted) * 1e3:.1f}",
        "measured, ms": f"{fmean(measured) * 1e3:.1f}",
        "measured / predicted": str(effect(measured, predicted)),
    }

"""What a token takes after a long context, against one after a short context: full and split, float32.

One token attends in the compiled kernel (row_attention); beside it, full with torch's sdpa.
"""

from collections.abc import Callable
from statistics import median

from bench.answer import FAST, answer, text_of
from bench.pairs import blocks
from bench.report import write
from splitlearn.arm import Kind
from splitlearn.compare import environment
from splitlearn.events import GenerationRequest
from splitlearn.lab.stats import effect
from splitlearn.runs import Runs
from splitlearn.tokens import Tokens

PAIRS = 12
SHORT, LONG = 100, 4000
TOKENS = 32
KERNEL = f"{FAST},row_attention"
ARMS: tuple[tuple[Kind, str], ...] = (("full", KERNEL), ("split", KERNEL), ("full", FAST))


def main(runs: Runs) -> None:
    """Measure and write docs/results/context.md."""
    tokens = Tokens.load(runs.spec("full", runs.flags(FAST)).files.folder, use_fast=True)
    prompts = {length: text_of(tokens, length) for length in (SHORT, LONG)}
    rows = [_row(runs, kind, flags, prompts) for kind, flags in ARMS]
    text = (
        f"TPOT of {TOKENS} tokens after prompts of {SHORT} and {LONG} tokens, float32, on one thread; geometric mean "
        f"ratios with 95% intervals over {PAIRS} pairs in random order. Flags `{FAST}`, and those named."
    )
    write("context", "A token after a long context", text, rows, environment(runs))


def _row(runs: Runs, kind: Kind, flags: str, prompts: dict[int, str]) -> dict[str, str]:
    def arm(length: int) -> Callable[[], float]:
        request = GenerationRequest(prompts[length], max_new_tokens=TOKENS, chat=False, ignore_eos=True)
        return lambda: answer(runs, kind, runs.flags(flags), request).tpot_s or 0.0

    arms = {str(length): arm(length) for length in prompts}
    for run in arms.values():
        run()
    found = blocks(arms, PAIRS)
    short, long = found[str(SHORT)], found[str(LONG)]
    return {
        "arm": kind,
        "more flags": flags.removeprefix(FAST).strip(","),
        f"TPOT at {SHORT}, ms": f"{median(short) * 1e3:.1f}",
        f"TPOT at {LONG}, ms": f"{median(long) * 1e3:.1f}",
        "ratio": str(effect(long, short)),
    }

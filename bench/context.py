"""TPOT after a long context against TPOT after a short one: full and split, float32. And whether torch.compile
recompiles while the context grows.

Attention of one token is a compiled kernel, that of row_attention or of weight_prepack=blocks. For comparison, full
also runs with torch's sdpa.
"""

import itertools
from collections.abc import Callable
from statistics import median

from bench.answer import FAST, answer, text_of
from bench.pairs import warm_blocks
from bench.report import write
from splitlearn.arms.compare import environment
from splitlearn.arms.report import Restart
from splitlearn.arms.runs import Runs
from splitlearn.arms.spec import Kind
from splitlearn.arms.worker import WARM_UP_TOKENS
from splitlearn.events import GenerationRequest
from splitlearn.generation.tokenizer import Tokens
from splitlearn.lab.stats import effect

PAIRS = 12
SHORT, LONG = 100, 4000
TOKENS = 32
KERNEL, ONE_CALL = f"{FAST},row_attention", FAST.replace("weight_prepack", "weight_prepack=blocks")
KINDS: tuple[Kind, ...] = ("full", "split")
ARMS = (*itertools.product(KINDS, (KERNEL, ONE_CALL)), ("full", FAST))
COMPILED = (
    "low_cpu_mem_usage,inference_mode,use_cache,cache=static,output_attentions,output_hidden_states,torch_compile"
)
GROWN = 2000


def main(runs: Runs) -> None:
    """Measure and write docs/results/context.md."""
    tokens = Tokens.load(runs.spec("full", runs.flags(FAST)).files.folder, use_fast=True)
    prompts = {length: text_of(tokens, length) for length in (SHORT, LONG)}
    rows: list[dict[str, str]] = [_row(runs, kind, flags, prompts) for kind, flags in ARMS]
    text = (
        f"TPOT of {TOKENS} tokens after prompts of {SHORT} and {LONG} tokens, float32, on one thread; geometric mean "
        f"ratios with 95% intervals over {PAIRS} pairs in random order. "
    )
    text += "\n\n" + " ".join(_compiled_again(runs, kind) for kind in KINDS)
    write("context", "A token after a long context", text, rows, environment(runs))


def _compiled_again(runs: Runs, kind: Kind) -> str:
    """A sentence on recompilations while GROWN tokens are generated, twice. A run that recompiles starts over."""
    request = GenerationRequest(runs.config.generation.prompt, max_new_tokens=GROWN, ignore_eos=True)
    flags = runs.flags(COMPILED)
    first, then = (sum(isinstance(item, Restart) for item in runs.stream(kind, flags, request)) for _ in range(2))
    return (
        f"{kind} with `{COMPILED}`: after a warm-up of {WARM_UP_TOKENS} tokens, something was compiled in {first} runs "
        f"of {GROWN} tokens until one went through without; in as many tokens after that, {then} times."
    )


def _row(runs: Runs, kind: Kind, flags: str, prompts: dict[int, str]) -> dict[str, str]:
    def arm(length: int) -> Callable[[], float]:
        request = GenerationRequest(prompts[length], max_new_tokens=TOKENS, chat=False, ignore_eos=True)
        return lambda: answer(runs, kind, runs.flags(flags), request).tpot_s or 0.0

    arms = {str(length): arm(length) for length in prompts}
    found = warm_blocks(arms, PAIRS)
    short, long = found[str(SHORT)], found[str(LONG)]
    return {
        "arm": kind,
        "flags": flags,
        f"TPOT at {SHORT}, ms": f"{median(short) * 1e3:.1f}",
        f"TPOT at {LONG}, ms": f"{median(long) * 1e3:.1f}",
        "ratio": str(effect(long, short)),
    }

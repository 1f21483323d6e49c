"""TTFT of a long prompt over a link with chunked prefill, for a balanced and the default split.

Both arms are split clients of one trunk server. One sends the prompt whole; the other sends chunks while its own layers
compute the next ones (prefill_overlap).
"""

from functools import partial
from typing import Any

from bench.answer import FAST, answer
from bench.pairs import warm_blocks
from bench.report import write
from splitlearn.arms.compare import environment
from splitlearn.arms.runs import Runs
from splitlearn.config import Config, RunsConfig, SplitConfig, with_link
from splitlearn.events import GenerationRequest
from splitlearn.generation.tokenizer import Tokens
from splitlearn.lab.stats import effect
from splitlearn.link.emulated import Link
from splitlearn.metrics import RunMetrics
from splitlearn.runtime.progress import silent

PAIRS = 12
PROMPT_TOKENS = 2000
LINK = Link(rtt_ms=20, up_mbit=50, down_mbit=50)
SPLITS = {"[8, 22)": SplitConfig(start=8, end=22), "default": SplitConfig()}
SENTENCE = "The river rises in the hills above the town and flows south for thirty miles before it meets the sea. "
CHUNKED, WHOLE = "prefill_overlap", "whole"


def main(runs: Runs) -> None:
    """Measure and write docs/results/overlap.md."""
    rows = [_row(runs.config, name, split) for name, split in SPLITS.items()]
    text = (
        f"TTFT of a prompt of {PROMPT_TOKENS} tokens over a link of {LINK.summary}, one thread for each process, flags "
        f"`{FAST}` on both sides of both arms; the arms in random order in each of {PAIRS} blocks, geometric mean "
        "ratios with 95% intervals. *Overlapped*: what the trunk did while the client was at work itself."
    )
    write("overlap", "A prompt in pieces, over a link", text, rows, environment(runs))


def _row(config: Config, name: str, split: SplitConfig) -> dict[str, Any]:
    near = config.model_copy(update={"split": split, "runs": RunsConfig(threads=1), "flags": FAST})
    with Runs(with_link(near, str(LINK)), silent) as far:
        request = GenerationRequest(_prompt(far), max_new_tokens=2, chat=False, ignore_eos=True)
        arms = {
            WHOLE: partial(answer, far, "split", far.flags(FAST), request),
            CHUNKED: partial(answer, far, "split", far.flags(f"{FAST},prefill_overlap"), request),
        }
        found = warm_blocks(arms, PAIRS)
    chunked, whole = found[CHUNKED], found[WHOLE]
    same = sum(one.token_ids == other.token_ids for one, other in zip(chunked, whole, strict=True))
    return {
        "trunk's layers": name,
        "TTFT in pieces / whole, s": " / ".join(f"{_mean(each):.2f}" for each in (chunked, whole)),
        "ratio": str(effect([run.ttft_s for run in chunked], [run.ttft_s for run in whole])),
        "overlapped, s": f"{sum(run.overlapped_s for run in chunked) / PAIRS:.2f}",
        "the same token ids": f"{same} of {PAIRS}",
    }


def _mean(runs: list[RunMetrics]) -> float:
    return sum(run.ttft_s for run in runs) / len(runs)


def _prompt(runs: Runs) -> str:
    """Sentences of exactly PROMPT_TOKENS tokens, the last one cut."""
    tokens = Tokens.load(runs.files.folder, use_fast=True)
    ids = tokens.encode(SENTENCE * PROMPT_TOKENS, chat=False)[:PROMPT_TOKENS]
    return tokens.decode(ids)

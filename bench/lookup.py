"""Speed-up by prompt lookup over a link of 50 ms, on prompts whose answers quote them and on open ones.

Both arms are split clients of one trunk server. One decodes a token per round trip, the other verifies drafts
(prompt_lookup). Answers stop at the end token, and a repeating tail does not count.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import yaml

from bench.answer import FAST, answer
from bench.pairs import blocks
from bench.report import table, write
from splitlearn.arms.compare import environment
from splitlearn.arms.runs import Runs
from splitlearn.config import with_link
from splitlearn.events import GenerationRequest
from splitlearn.lab.stats import effect
from splitlearn.link.emulated import Link
from splitlearn.metrics import RunMetrics, first_divergence
from splitlearn.runtime.progress import silent

LINK = Link(rtt_ms=50)
TOKENS = 128
HERE = Path(__file__).parent
QUOTING: tuple[str, ...] = tuple(yaml.safe_load((HERE / "quoting.yaml").read_text(encoding="utf-8")))
OPEN = tuple((HERE / "prompts.txt").read_text(encoding="utf-8").splitlines())
DRAFTS, ALONE = "prompt_lookup", "one token a trip"
LONGEST_PERIOD, ROUNDS = 16, 3


@dataclass(frozen=True)
class Pair:
    """One prompt's answers with and without drafts, and how many of their tokens count."""

    drafted: RunMetrics
    alone: RunMetrics
    counted: int

    def tps(self, run: RunMetrics) -> float:
        """Tokens per second after the first token, of those that count."""
        return (self.counted - 1) / (list(accumulate(run.itl_s))[self.counted - 2])


def main(runs: Runs) -> None:
    """Measure and write docs/results/lookup.md."""
    with Runs(with_link(runs.config, str(LINK)), silent) as far:
        found = {name: [_pair(far, prompt) for prompt in listed] for name, listed in _SETS.items()}
        machine = environment(far)
    rows = [_row(name, pairs) for name, pairs in found.items()]
    every = [_line(name, number, pair) for name, pairs in found.items() for number, pair in enumerate(pairs, 1)]
    text = (
        f"A link of {LINK.summary} round trip, greedy, at most {TOKENS} tokens, flags `{FAST}` on both sides of both "
        "arms; the arms in random order for each prompt, geometric mean ratios with 95% intervals over the prompts "
        "with at least two tokens that count. Tokens per second are those after the first token. Each prompt:\n\n"
        f"{table(every)}\n\nTogether:"
    )
    write("lookup", "Draft tokens from the prompt, over a link", text, rows, machine)


_SETS = {"quoting": QUOTING, "open": OPEN}


def _pair(runs: Runs, prompt: str) -> Pair:
    request = GenerationRequest(prompt, max_new_tokens=TOKENS)
    words = {ALONE: FAST, DRAFTS: f"{FAST},prompt_lookup"}
    arms = {name: partial(answer, runs, "split", runs.flags(chosen), request) for name, chosen in words.items()}
    found = blocks(arms, 1, seed=len(prompt), say=lambda text: None)
    drafted, alone = found[DRAFTS][0], found[ALONE][0]
    same = first_divergence(drafted.token_ids, alone.token_ids)
    counted = before_the_loop(alone.token_ids[:same])
    print(f"{prompt[:40]!r}: {counted} tokens count", flush=True)
    return Pair(drafted, alone, counted)


def before_the_loop(ids: Sequence[int]) -> int:
    """How many of `ids` come before a repeating tail: at most LONGEST_PERIOD tokens, at least ROUNDS times. The first
    round counts."""
    least = len(ids)
    for period in range(1, LONGEST_PERIOD + 1):
        start = len(ids)
        while start > period and ids[start - 1] == ids[start - 1 - period]:
            start -= 1
        if len(ids) - start >= (ROUNDS - 1) * period:
            least = min(least, start)
    return least


def _row(name: str, pairs: Sequence[Pair]) -> dict[str, Any]:
    enough = [pair for pair in pairs if pair.counted > 1]
    ratio = effect([pair.tps(pair.drafted) for pair in enough], [pair.tps(pair.alone) for pair in enough])
    same = sum(pair.drafted.token_ids == pair.alone.token_ids for pair in pairs)
    fed, accepted = (sum(getattr(pair.drafted, key) for pair in pairs) for key in ("drafts", "drafts_accepted"))
    return {
        "prompts": name,
        "tokens per second, drafts / one a trip": str(ratio),
        "drafts accepted": f"{accepted} of {fed}",
        "the same token ids": f"{same} of {len(pairs)}",
    }


def _line(name: str, number: int, pair: Pair) -> dict[str, Any]:
    speeds = [f"{pair.tps(run):.1f}" if pair.counted > 1 else "" for run in (pair.drafted, pair.alone)]
    return {
        "prompt": f"{name} {number}",
        "tokens": pair.alone.n_tokens,
        "that count": pair.counted,
        "with drafts, /s": speeds[0],
        "one a trip, /s": speeds[1],
        "drafts accepted": f"{pair.drafted.drafts_accepted} of {pair.drafted.drafts}",
    }

"""Speed-up by a draft model over a link of 50 ms, on prompts whose answers do not quote them.

The default model drafts for itself, with 4-bit weights and whole at the client: no smaller model with its vocabulary is
available without a hub. So this does not show what a smaller draft model gains.
"""

from functools import partial
from statistics import median
from typing import Any

from bench.answer import FAST, answer
from bench.lookup import OPEN
from bench.pairs import blocks
from bench.report import write
from splitlearn.arms.compare import environment
from splitlearn.arms.runs import Runs
from splitlearn.config import with_link
from splitlearn.events import GenerationRequest
from splitlearn.lab.stats import effect
from splitlearn.link.emulated import Link
from splitlearn.metrics import RunMetrics
from splitlearn.runtime.progress import silent

LINK, TOKENS = Link(rtt_ms=50), 64
ALONE, DRAFTED = FAST, f"{FAST},draft_model"


def main(runs: Runs) -> None:
    """Measure and write docs/results/draft.md."""
    model = runs.config.model.model_copy(update={"draft": runs.config.model.name})
    config = with_link(runs.config.model_copy(update={"model": model}), str(LINK))
    with Runs(config, silent) as far:
        pairs = [_pair(far, prompt) for prompt in (OPEN[0], *OPEN)][1:]  # the first one loads the stages
        machine = environment(far)
    text = (
        f"A link of {LINK.summary} round trip, greedy, {TOKENS} tokens, flags `{ALONE}` on both sides of both arms; "
        "the arms in random order for each prompt. The draft model is the model itself with weights in 4 bits."
    )
    write("draft", "Draft tokens from a second model, over a link", text, [_row(pairs)], machine)


def _pair(runs: Runs, prompt: str) -> dict[str, RunMetrics]:
    request = GenerationRequest(prompt, max_new_tokens=TOKENS, ignore_eos=True)
    arms = {words: partial(answer, runs, "split", runs.flags(words), request) for words in (ALONE, DRAFTED)}
    return {words: found[0] for words, found in blocks(arms, 1, seed=len(prompt), say=lambda text: None).items()}


def _row(pairs: list[dict[str, RunMetrics]]) -> dict[str, Any]:
    drafted, alone = ([pair[words] for pair in pairs] for words in (DRAFTED, ALONE))
    speeds = [[1 / (run.tpot_s or 1.0) for run in runs] for runs in (drafted, alone)]
    fed, accepted = (sum(getattr(run, key) for run in drafted) for key in ("drafts", "drafts_accepted"))
    return {
        "TPOT, ms, drafts / one a trip": " / ".join(f"{1e3 / median(each):.1f}" for each in speeds),
        "tokens per second, drafts / one a trip": str(effect(speeds[0], speeds[1])),
        "drafts accepted": f"{accepted} of {fed}",
        "the same token ids": f"{sum(d.token_ids == a.token_ids for d, a in zip(drafted, alone, strict=True))} of "
        f"{len(pairs)}",
    }

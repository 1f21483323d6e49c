"""What `wire_dtype` changes in tokens and bytes: greedy answers to 50 fixed prompts, against a plain wire."""

from pathlib import Path
from statistics import median
from typing import Any

from bench.answer import FAST, answer
from bench.lookup import OPEN, QUOTING
from bench.report import write
from splitlearn.arms.compare import environment
from splitlearn.arms.runs import Runs
from splitlearn.events import GenerationRequest
from splitlearn.metrics import RunMetrics, first_divergence

TOKENS = 32
PROMPTS = (*OPEN, *QUOTING, *(Path(__file__).parent / "more_prompts.txt").read_text(encoding="utf-8").splitlines())
CHOICES = ("bfloat16", "int8")


def main(runs: Runs) -> None:
    """Measure and write docs/results/flips.md."""
    plain = [_run(runs, FAST, prompt) for prompt in PROMPTS]
    rows = [_row(runs, choice, plain) for choice in CHOICES]
    text = (
        f"{len(PROMPTS)} prompts, greedy, {TOKENS} tokens, the end token notwithstanding; flags `{FAST}`. Answers are "
        "compared up to the first token that differs: what follows has another text before it. Bytes are those of all "
        "messages of a decoded token, up and down."
    )
    write("flips", "Fewer bytes on the wire: which tokens change", text, rows, environment(runs))


def _row(runs: Runs, choice: str, plain: list[RunMetrics]) -> dict[str, Any]:
    found = [_run(runs, f"{FAST},wire_dtype={choice}", prompt) for prompt in PROMPTS]
    flips = [first_divergence(one.token_ids, other.token_ids) for one, other in zip(found, plain, strict=True)]
    places = [place + 1 for place in flips if place is not None]
    compared = sum(TOKENS if place is None else place + 1 for place in flips)
    sizes = [median(_bytes(run) for run in each) for each in (found, plain)]
    print(f"{choice}: {len(places)} answers differ", flush=True)
    return {
        "wire_dtype": choice,
        "answers that are the same": f"{len(PROMPTS) - len(places)} of {len(PROMPTS)}",
        "flips / tokens compared": f"{len(places)} / {compared} ({len(places) / compared:.2%})",
        "first flip at token, median": str(median(places)) if places else "none",
        "bytes per decoded token": f"{sizes[0]:.0f}, of {sizes[1]:.0f}: {sizes[0] / sizes[1]:.3f}",
    }


def _bytes(run: RunMetrics) -> float:
    return (run.decode_bytes_up + run.decode_bytes_down) / (run.n_tokens - 1)


def _run(runs: Runs, flags: str, prompt: str) -> RunMetrics:
    request = GenerationRequest(prompt, max_new_tokens=TOKENS, ignore_eos=True)
    return answer(runs, "split", runs.flags(flags), request)

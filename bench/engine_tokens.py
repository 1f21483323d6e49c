"""Whether the engines beside torch give torch's tokens: greedy answers to 20 prompts, in float32, by the full model.

Where an answer differs, what follows has another text before it. How near the two tokens were there is the gap between
torch's two largest logits.
"""

from dataclasses import dataclass
from typing import Any

from bench.engines import ENGINES, THREADS, TORCH
from bench.fidelity import PROMPTS, TOKENS
from bench.overhead import PLAIN
from bench.report import write
from splitlearn.arms.compare import environment
from splitlearn.arms.report import ArmReport
from splitlearn.arms.runs import Runs
from splitlearn.config import RunsConfig
from splitlearn.events import GenerationRequest, TokenEvent
from splitlearn.metrics import first_divergence
from splitlearn.runtime.progress import silent

NEAR = 1e-3
"""The gap of a near tie: ten times what the engines' logits may be off (tests/engines)."""
BESIDE = ("onnxruntime", "jax")


@dataclass(frozen=True)
class Greedy:
    """An answer's ids, and at each of them the gap between the two largest logits."""

    token_ids: tuple[int, ...]
    gaps: tuple[float, ...]


def main(runs: Runs) -> None:
    """Measure and write docs/results/engine_tokens.md."""
    config = runs.config.model_copy(update={"runs": RunsConfig(threads=THREADS)})
    with Runs(config, silent) as own:
        expected = _answers(own, TORCH)
        rows = [_row(name, _answers(own, name), expected) for name in BESIDE]
        machine = environment(own)
    text = (
        f"{len(PROMPTS)} prompts of {TOKENS} tokens, greedy, the end token notwithstanding, beside torch's own layers "
        f"with `{PLAIN}`. A near tie is a token where torch's two largest logits are less than {NEAR} apart."
    )
    write("engine_tokens", "Engines of a stage: the same tokens", text, rows, machine)


def _row(name: str, found: list[Greedy], expected: list[Greedy]) -> dict[str, Any]:
    places = [first_divergence(one.token_ids, other.token_ids) for one, other in zip(found, expected, strict=True)]
    gaps = [own.gaps[place] for own, place in zip(expected, places, strict=True) if place is not None]
    near = sum(gap < NEAR for gap in gaps)
    return {
        "engine": name,
        f"all {TOKENS} tokens the same": f"{places.count(None)} of {len(places)}",
        "the same up to a near tie": f"{places.count(None) + near} of {len(places)}",
        "gaps where tokens differ": ", ".join(f"{gap:.2g}" for gap in gaps) or "none",
    }


def _answers(runs: Runs, name: str) -> list[Greedy]:
    flags, found = runs.flags(ENGINES[name]), []
    for number, prompt in enumerate(PROMPTS, 1):
        request = GenerationRequest(prompt, max_new_tokens=TOKENS, ignore_eos=True, top_logprobs=2)
        *events, last = runs.stream("full", flags, request)
        assert isinstance(last, ArmReport)
        best = [each[1:] for event in events if isinstance(event, TokenEvent) for each in event.logprobs]
        gaps = [first.logit - second.logit for first, second in best]
        ids = last.metrics.token_ids  # a run that compiled was repeated, and its events came before
        found.append(Greedy(ids, tuple(gaps[-len(ids) :])))
        print(f"{name}: prompt {number} of {len(PROMPTS)}", flush=True)
    return found

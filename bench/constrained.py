"""Tokens per second of answers that are held to JSON against free ones, in full and split."""

import json
from collections.abc import Sequence
from functools import partial
from statistics import median
from typing import Any

from bench.answer import report
from bench.lookup import OPEN
from bench.pairs import blocks as in_random_order
from bench.report import write
from splitlearn.arms.compare import environment
from splitlearn.arms.report import ArmReport
from splitlearn.arms.runs import Runs
from splitlearn.arms.spec import Kind
from splitlearn.events import KINDS, GenerationRequest
from splitlearn.lab.stats import effect
from splitlearn.response_format import JsonFormat

PAIRS, TOKENS = 12, 64
FLAGS = "fast"
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "likes": {"type": "array", "items": {"enum": ["music", "sport", "books", "films"]}, "maxItems": 3},
    },
    "required": ["name", "age", "likes"],
    "additionalProperties": False,
}
# None of them can end within TOKENS.
HELD: dict[str, dict[str, Any]] = {
    "records": {"type": "array", "items": PERSON, "minItems": 100},
    "a long text": {"type": "array", "prefixItems": [{"type": "string", "minLength": 2000}], "minItems": 1},
    "any JSON": {"type": "object", "minProperties": 1000},
}
FREE = "free"


def main(runs: Runs, blocks: int = PAIRS) -> None:
    """Measure and write docs/results/constrained.md."""
    rows = [row for kind in KINDS for row in _rows(runs, kind, OPEN[:blocks])]
    text = (
        f"{TOKENS} tokens each, greedy, flags `{FLAGS}`; free, and held to each of {len(HELD)} schemas that do not end "
        f"before, in random order for each of {blocks} prompts. Geometric mean ratios with 95% intervals. Tokens per "
        "second are those of the request: compiling the schema is in its TTFT, the masks are in `sample`, which with "
        "TPOT is a median."
    )
    write("constrained", "Answers held to JSON against free ones", text, rows, environment(runs))


def _rows(runs: Runs, kind: Kind, prompts: Sequence[str]) -> list[dict[str, Any]]:
    in_random_order(_arms(runs, kind, prompts[0]), 1)  # warms
    found: dict[str, list[ArmReport]] = {name: [] for name in (FREE, *HELD)}
    for number, prompt in enumerate(prompts):
        for name, reports in in_random_order(_arms(runs, kind, prompt), 1, seed=number).items():
            found[name] += reports
    return [_row(kind, name, found[name], found[FREE]) for name in HELD]


def _arms(runs: Runs, kind: Kind, prompt: str) -> dict[str, Any]:
    asked = {FREE: GenerationRequest(prompt, TOKENS, ignore_eos=True)}
    for name, held in HELD.items():
        asked[name] = GenerationRequest(prompt, TOKENS, response_format=JsonFormat(json.dumps(held)))
    return {name: partial(report, runs, kind, runs.flags(FLAGS), request) for name, request in asked.items()}


def _row(kind: Kind, name: str, held: list[ArmReport], free: list[ArmReport]) -> dict[str, Any]:
    counts = {each.metrics.n_tokens for each in (*held, *free)}
    assert counts == {TOKENS}, f"the same number of tokens: {counts}"
    rate, free_rate = ([each.metrics.tps or 0.0 for each in reports] for reports in (held, free))
    return {
        "arm": kind,
        "held to": name,
        "tokens per second, held / free": str(effect(rate, free_rate)),
        "TPOT, ms": " / ".join(f"{1e3 * median(each.metrics.tpot_s or 0.0 for each in of):.1f}" for of in (held, free)),
        "sample, ms a token": " / ".join(f"{1e3 * _sampling(reports):.2f}" for reports in (held, free)),
    }


def _sampling(reports: list[ArmReport]) -> float:
    return median((each.metrics.per_token or {}).get("sample", 0.0) for each in reports)

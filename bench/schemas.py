"""Answers of the default model that are held to random JSON Schemas: how many are complete, and valid by jsonschema."""

import json
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import jsonschema

from bench.answer import FAST
from bench.report import write
from splitlearn.arms.compare import environment
from splitlearn.arms.report import ArmReport
from splitlearn.arms.runs import Runs
from splitlearn.events import KINDS, GenerationRequest, Kind
from splitlearn.response_format import JsonFormat
from splitlearn.sampling import SamplingParams
from tests.support import schemas

SCHEMAS, AT_ONCE, MOST_TOKENS = 200, 16, 400
PROMPT = "Answer with JSON about a person."
SAMPLINGS = {"greedy": SamplingParams(), "temperature 1": SamplingParams(temperature=1.0, seed=1)}


def main(runs: Runs) -> None:
    """Measure and write docs/results/schemas.md. Half of the schemas go to each arm, half of these to each sampling."""
    places = [(kind, name) for kind in KINDS for name in SAMPLINGS]
    found: dict[tuple[Kind, str], Counter[str]] = {place: Counter() for place in places}

    def ask(seed: int) -> dict[str, int]:
        return _outcome(runs, *places[seed % len(places)], schemas.schema(seed))

    with ThreadPoolExecutor(AT_ONCE) as threads:
        for seed, outcome in enumerate(threads.map(ask, range(SCHEMAS))):
            found[places[seed % len(places)]].update(outcome)
    rows = [{"arm": kind, "sampling": name, **counts} for (kind, name), counts in found.items()]
    text = (
        f"{SCHEMAS} random schemas (tests/support/schemas.py: objects, arrays, choices, $ref, patterns, formats), each "
        f"the `response_format` of one answer to {PROMPT!r} of at most {MOST_TOKENS} tokens, {AT_ONCE} at once. "
        "*Complete*: it ended by itself. *Valid*: a complete one, by the package jsonschema, with its formats."
    )
    write("schemas", "Answers of the default model to random JSON Schemas", text, rows, environment(runs))


def _outcome(runs: Runs, kind: Kind, sampling: str, schema: schemas.Schema) -> dict[str, int]:
    wanted = JsonFormat(json.dumps(schema))
    request = GenerationRequest(PROMPT, MOST_TOKENS, response_format=wanted, sampling=SAMPLINGS[sampling])
    *_, last = runs.serve(kind, runs.flags(FAST), request, threading.Event())
    assert isinstance(last, ArmReport)
    metrics = last.metrics
    complete = metrics.finish_reason == "eos"
    return {
        "answers": 1,
        "complete": complete,
        "valid": complete and _is_valid(metrics.text, schema),
        "tokens": metrics.n_tokens,
    }


def _is_valid(text: str, schema: schemas.Schema) -> bool:
    judge = jsonschema.Draft202012Validator
    try:
        judge(schema, format_checker=judge.FORMAT_CHECKER).validate(json.loads(text))
    except (ValueError, jsonschema.ValidationError):
        return False
    return True

"""Many clients of `splitlearn serve` at once against one, by the OpenAI protocol: tokens per second, and the answers.

Sixteen clients ask once each, with prompts and answers of mixed lengths; one client asks some of that one after the
other. Each answer must be the one that its request gets alone. For each of some sets of flags.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import httpx

from bench.pairs import warm_blocks
from bench.report import write
from splitlearn.arms.compare import environment
from splitlearn.arms.runs import Runs
from splitlearn.events import KINDS
from splitlearn.lab.stats import effect
from tests.support.openai_server import serve

CLIENTS, ALONE, BLOCKS = 16, 3, 8
SETS = ("auto", "default", "fast")
PATIENCE_S = 600.0
WORDS = (
    "the",
    "river",
    "rises",
    "in",
    "hills",
    "above",
    "a",
    "town",
    "and",
    "flows",
    "south",
    "before",
    "it",
    "meets",
    "sea",
)
ONE, MANY = "one", "many"


@dataclass(frozen=True)
class Load:
    """What clients got in `seconds`: the texts of their answers, and all tokens."""

    texts: Sequence[str]
    tokens: int
    seconds: float

    @property
    def tps(self) -> float:
        """Tokens per second, of all clients."""
        return self.tokens / self.seconds


def main(runs: Runs, blocks: int = BLOCKS) -> None:
    """Measure and write docs/results/endpoint.md."""
    rows = [row for words in SETS for row in _rows(runs, words, blocks)]
    text = (
        f"`splitlearn serve`; server, trunk and clients on one machine. {CLIENTS} clients at once, one request each, "
        f"against one client that asks the first {ALONE} one after the other; in random order in each of {blocks} "
        "blocks. Medians of all tokens per second, and the geometric mean ratio with its 95% interval. Greedy answers "
        "of 48 to 78 tokens; one is *equal* if it has the text that the request got alone."
    )
    write("endpoint", "Many requests at once on the endpoint", text, rows, environment(runs))


def _rows(runs: Runs, words: str, blocks: int) -> list[dict[str, Any]]:
    """Full and split with these flags."""
    settings: dict[str, Any] = {"flags": words, "runs": runs.config.runs.model_dump()}
    with TemporaryDirectory() as folder, serve(runs.config.model.name, Path(folder), **settings) as url:
        return [{"flags": f"`{words}`", **_row(url, model, blocks)} for model in _models(url)]


def _models(url: str) -> list[str]:
    ids = [each["id"] for each in httpx.get(f"{url}/v1/models").raise_for_status().json()["data"]]
    return [name for kind in KINDS for name in ids if name.endswith(f":{kind}")]


def _row(url: str, model: str, blocks: int) -> dict[str, Any]:
    with httpx.Client(base_url=url, timeout=PATIENCE_S, limits=httpx.Limits(max_connections=None)) as client:
        alone = _asked(client, model, CLIENTS, at_once=1).texts
        loads = {ONE: partial(_asked, client, model, ALONE, 1), MANY: partial(_asked, client, model, CLIENTS, CLIENTS)}
        found = warm_blocks(loads, blocks)
    one, many = ([load.tps for load in found[name]] for name in (ONE, MANY))
    same = sum(text == own for load in found[MANY] for text, own in zip(load.texts, alone, strict=True))
    return {
        "arm": model.partition(":")[2],
        "one client, tokens/s": f"{median(one):.1f}",
        f"{CLIENTS} clients, tokens/s": f"{median(many):.1f}",
        "ratio": str(effect(many, one)),
        "answers equal": f"{same} of {CLIENTS * blocks}",
    }


def _asked(client: httpx.Client, model: str, requests: int, at_once: int) -> Load:
    """The first `requests` of the load, `at_once` at a time."""
    began = perf_counter()
    with ThreadPoolExecutor(at_once) as threads:
        answers = list(threads.map(partial(_answer, client, model), range(requests)))
    tokens = sum(answer["usage"]["completion_tokens"] for answer in answers)
    return Load([answer["choices"][0]["text"] for answer in answers], tokens, perf_counter() - began)


def _answer(client: httpx.Client, model: str, number: int) -> Any:
    prompt = " ".join(WORDS[(number + at) % len(WORDS)] for at in range(6 + 2 * number))
    body = {"model": model, "prompt": prompt, "max_tokens": 48 + 2 * number, "temperature": 0, "ignore_eos": True}
    return client.post("/v1/completions", json=body).raise_for_status().json()

"""`loadtest --url` beside llama-benchy, on the same `splitlearn serve`: TTFT, TPOT and TPS (decode).

Both go through a relay, which sees what each measures. llama-benchy is in an environment of its own:

    python3 -m venv /tmp/benchy && /tmp/benchy/bin/pip install llama-benchy==0.4.0
    LLAMA_BENCHY=/tmp/benchy/bin/llama-benchy python -m bench load_tools
"""

import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from threading import Thread
from typing import Any

import httpx
import pandas as pd

from bench.relay import Relay, Seen, relay
from bench.report import write
from splitlearn.arms.compare import environment
from splitlearn.arms.runs import Runs
from splitlearn.errors import SetupError
from splitlearn.generation.tokenizer import Tokens
from splitlearn.lab.stats import effect

ROOT = Path(__file__).parent.parent
TOOLS = ("loadtest --url", "llama-benchy 0.4.0")
BLOCKS = 8
REQUESTS = 4
PROMPT_TOKENS, TOKENS = 128, 32
TEMPLATE_TOKENS = 30
"""What the default model's chat template adds to a prompt."""
WAIT_S = 300.0


@dataclass(frozen=True)
class Pair:
    """A request as a tool reports it and as the relay saw it. Seconds."""

    ttft_s: float
    tpot_s: float
    seen: Seen


def main(runs: Runs, blocks: int = BLOCKS) -> None:
    """Measure and write docs/results/load_tools.md."""
    benchy = shutil.which(os.environ.get("LLAMA_BENCHY", "llama-benchy"))
    if benchy is None:
        raise SetupError("llama-benchy is not there; the head of bench/load_tools.py says how to install it.")
    model = f"{runs.files.name}:split"
    found = defaultdict[str, list[list[Pair]]](list)
    tokens = Tokens.load(runs.files.folder, use_fast=True)
    with _served() as port, relay(port) as judge, _book(tokens) as (book, prompts):
        tools: dict[str, Callable[[], list[Pair]]] = {
            TOOLS[0]: partial(_loadtest, judge, model, prompts),
            TOOLS[1]: partial(_benchy, judge, [benchy, "--model", model, "--tokenizer", str(runs.files.folder)], book),
        }
        for block in range(blocks):
            for name in random.Random(block).sample(TOOLS, 2):
                found[name].append(tools[name]())
                print(f"block {block + 1} of {blocks}: {name}", flush=True)
    write("load_tools", "loadtest --url beside another tool", _text(blocks, found), _rows(found), environment(runs))


def _text(blocks: int, found: dict[str, list[list[Pair]]]) -> str:
    late = fmean(pair.seen.tpot_s / pair.seen.text_tpot_s for block in found[TOOLS[1]] for pair in block)
    return (
        "`splitlearn serve` with the default model, split: pieces of this project's docs as prompts of "
        f"{PROMPT_TOKENS} tokens, answers of {TOKENS}, one client, streamed chat. In each of {blocks} blocks "
        f"both tools ran in random order: `loadtest --url` for about as long as {REQUESTS} requests take, "
        f"llama-benchy with `--runs {REQUESTS}`. Both went through a relay that noted when each byte passed. "
        "The first two rows are what a tool reports / what the relay saw of the same request, by the tool's "
        "own definition: geometric mean with 95% interval over its requests. The last row is one tool / the "
        "other, by the means of the blocks: requests at different times, with all the noise of the machine.\n\n"
        "**Definitions.** llama-benchy's e2e_ttft is TTFT: it ends with the first chunk that has text. Its "
        "ttfr ends with the first chunk of any kind, which may have the role only. Its t/s of tg is TPS "
        "(decode) = 1 / TPOT, with tokens by the usage. Its last token is the last chunk that has text, ours "
        f"the chunk that has `finish_reason`, which makes TPOT {late - 1:.2%} longer here. It sends "
        "`return_token_ids`, which `splitlearn serve` refuses; `--extra-body return_token_ids=null` takes "
        "that out."
    )


def _rows(found: dict[str, list[list[Pair]]]) -> list[dict[str, Any]]:
    ours, other = TOOLS
    all_of = {name: [pair for block in found[name] for pair in block] for name in TOOLS}
    seen = {
        ours: [(pair.seen.ttft_s, pair.seen.tpot_s) for pair in all_of[ours]],
        other: [(pair.seen.ttft_s, pair.seen.text_tpot_s) for pair in all_of[other]],
    }
    said = {name: [(pair.ttft_s, pair.tpot_s) for pair in all_of[name]] for name in TOOLS}
    means = {
        name: [(fmean(pair.ttft_s for pair in block), fmean(pair.tpot_s for pair in block)) for block in found[name]]
        for name in TOOLS
    }
    return [
        *(_row(f"{name} / relay", said[name], seen[name]) for name in TOOLS),
        _row(" / ".join(TOOLS), means[ours], means[other]),
    ]


def _row(what: str, these: Sequence[tuple[float, float]], those: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """The ratios of (TTFT, TPOT) of these to those."""
    (ttft_s, tpot_s), (by_ttft_s, by_tpot_s) = zip(*these, strict=True), zip(*those, strict=True)
    tps, by_tps = [1 / each for each in tpot_s], [1 / each for each in by_tpot_s]
    effects = {"TTFT": (ttft_s, by_ttft_s), "TPOT": (tpot_s, by_tpot_s), "TPS (decode)": (tps, by_tps)}
    return {"what": what, **{head: str(effect(*values)) for head, values in effects.items()}}


def _loadtest(judge: Relay, model: str, prompts: Path) -> list[Pair]:
    """A load test of one client, for as long as the last REQUESTS answers took."""
    known = [seen.ttft_s + seen.tpot_s * (TOKENS - 1) for seen in judge.seen() if seen.tokens == TOKENS][-REQUESTS:]
    seconds = REQUESTS * fmean(known) if known else 10.0
    with TemporaryDirectory() as folder:
        out = Path(folder) / "found"
        command = [sys.executable, "-m", "splitlearn", "loadtest", "--url", f"http://127.0.0.1:{judge.port}/v1"]
        size = ["--prompts", str(prompts), "--answer-tokens", f"{TOKENS}"]
        rest = ["--model", model, "--clients", "1", "--duration", f"{seconds:.1f}", "--out", str(out), "--json"]
        subprocess.run([*command, *size, *rest], cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, check=True)
        requests = pd.read_csv(out / "requests.csv")
    assert (requests["state"] == "done").all(), requests["reason"].tolist()
    assert (requests["prompt_tokens"] == PROMPT_TOKENS).all(), requests["prompt_tokens"].tolist()
    return _paired(requests["ttft_s"].tolist(), requests["tpot_s"].tolist(), judge)


def _benchy(judge: Relay, program: Sequence[str], book: str) -> list[Pair]:
    """A run of llama-benchy; its home is a folder of its own, where it keeps the book."""
    with TemporaryDirectory() as folder:
        out = Path(folder) / "found.json"
        where = ["--base-url", f"http://127.0.0.1:{judge.port}/v1", "--book-url", book, "--latency-mode", "none"]
        size = ["--pp", f"{PROMPT_TOKENS}", "--tg", f"{TOKENS}", "--runs", f"{REQUESTS}", "--skip-coherence"]
        body = "return_token_ids=null,ignore_eos=true,temperature=0"
        command = [*program, *where, *size, "--extra-body", body, "--format", "json", "--save-result", str(out)]
        home = {**os.environ, "HOME": folder}
        subprocess.run(command, env=home, stdin=subprocess.DEVNULL, capture_output=True, check=True)
        (found,) = json.loads(out.read_text(encoding="utf-8"))["benchmarks"]
    ttft_s = [value / 1e3 for value in found["e2e_ttft"]["values"]]
    return _paired(ttft_s, [1 / value for value in found["tg_req_throughput"]["values"]], judge)


def _paired(ttft_s: Sequence[float], tpot_s: Sequence[float], judge: Relay) -> list[Pair]:
    """What a tool says of its requests, each with what the relay saw of it: the last ones that passed."""
    seen = judge.seen()[-len(ttft_s) :]
    assert {each.tokens for each in seen} == {TOKENS}
    return [Pair(*each) for each in zip(ttft_s, tpot_s, seen, strict=True)]


@contextmanager
def _served() -> Iterator[int]:
    """The port of a `splitlearn serve` whose arms are loaded."""
    command = [sys.executable, "-m", "splitlearn", "serve", "--port", "0"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=pipe, text=True) as server:
        try:
            assert server.stdout is not None
            found = next(port[1] for line in server.stdout if (port := re.search(r":(\d+)/v1", line)))
            health = httpx.get(f"http://127.0.0.1:{found}/health", timeout=WAIT_S)
            while health.status_code != httpx.codes.OK:
                health = httpx.get(f"http://127.0.0.1:{found}/health", timeout=WAIT_S)
                time.sleep(0.5)
            yield int(found)
        finally:
            server.terminate()


@contextmanager
def _book(tokens: Tokens) -> Iterator[tuple[str, Path]]:
    """The URL of an English text, this project's docs, and a file of prompts that are pieces of it."""
    with TemporaryDirectory() as folder:
        texts = [path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))]
        book, prompts = " ".join(" ".join(texts).split()), Path(folder) / "prompts.txt"
        (Path(folder) / "book.txt").write_text(book, encoding="utf-8")
        prompts.write_text("\n".join(_pieces(book, tokens)), encoding="utf-8")
        server = ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=folder))
        Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/book.txt", prompts
        finally:
            server.shutdown()


def _pieces(book: str, tokens: Tokens) -> list[str]:
    """Pieces that are PROMPT_TOKENS long with the chat template."""
    ids, length = tokens.encode(book, chat=False), PROMPT_TOKENS - TEMPLATE_TOKENS
    texts = [tokens.decode(ids[at : at + length]).strip() for at in range(0, len(ids) - length, length)]
    return [text for text in texts if len(tokens.encode(text, chat=True)) == PROMPT_TOKENS]

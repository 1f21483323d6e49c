"""Full and split with the fastest flags, against llama.cpp and transformers' `generate()`.

Full runs against llama.cpp on the GGUF file that its weights came from, and against `generate()` in float32. Split runs
against full and against llama.cpp's RPC mode over loopback. All are greedy, with the same threads and prompt ids.
llama.cpp is called through llama-cpp-python's low-level API (bench/requirements.txt), with numpy's argmax in place of
its samplers. It rounds activations to 8 bits where ours stay in float32, so tokens may differ.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from bench.answer import answer, text_of
from bench.pairs import warm_blocks
from bench.ratios import both, ratio
from bench.ratios import tokens as same
from bench.reference import Generated, Reference
from bench.report import write
from splitlearn.arms.compare import environment
from splitlearn.arms.runs import Runs
from splitlearn.arms.spec import Kind
from splitlearn.checkpoints import download
from splitlearn.checkpoints.catalogue import CATALOGUE
from splitlearn.config import Config, RunsConfig
from splitlearn.events import GenerationRequest
from splitlearn.generation.tokenizer import Tokens
from splitlearn.runtime import environment as process_environment
from splitlearn.runtime.process import default_threads
from splitlearn.runtime.progress import silent

PAIRS = 12
THREADS = (1, 2)
TOKENS = 64
SHORT, LONG = 20, 512
FLAGS = "fast"
OURS, SPLIT, LLAMA, RPC, GENERATE = "full, fast", "split, fast", "llama.cpp", "llama.cpp RPC", "generate()"
RATIOS = ((OURS, LLAMA), (OURS, GENERATE), (SPLIT, OURS), (SPLIT, RPC))


def main(runs: Runs, blocks: int = PAIRS) -> None:
    """Measure and write docs/results/llama.md, or for another model than the default llama-NAME.md."""
    entry = next(entry for entry in CATALOGUE if entry.name == runs.config.model.name)
    tokens = Tokens.load(runs.spec("full", runs.flags(FLAGS)).files.folder, use_fast=True)
    short, long = (text_of(tokens, length) for length in (SHORT, LONG))
    with tempfile.TemporaryDirectory() as work:
        gguf = download.fetch(entry.source, Path(work), silent).gguf
        rows = [
            row
            for threads in THREADS
            for row in _rows(runs.config, threads, tokens, (short, long), f"{work}/{gguf}", blocks)
        ]
    text = (
        f"Geometric mean ratios with 95% intervals over {blocks} blocks, the arms in random order within each, each "
        f"arm in a process with the threads named. TPOT: {TOKENS} tokens after a prompt of {SHORT}; TTFT: prompts of "
        f"{SHORT} and {LONG} tokens. fast: the flags `{FLAGS}` (docs/flags.md); with them, steps of one token run on "
        f"one thread here, since there are fewer than four. llama.cpp RPC: {runs.plan.end - runs.plan.start} layers in "
        f"a server with as many threads. The model is {entry.name}."
    )
    name, options = ("llama", "") if entry is CATALOGUE[0] else (f"llama-{entry.name}", f" --model {entry.name}")
    options += f" --blocks {blocks}" if blocks != PAIRS else ""
    title = "The full model against llama.cpp and generate()"
    write(name, title, text, rows, environment(runs), f"llama{options}")


def _rows(
    config: Config, threads: int, tokens: Tokens, prompts: tuple[str, str], gguf: str, blocks: int
) -> list[dict[str, str]]:
    changes = {"runs": RunsConfig(threads=threads), "flags": FLAGS}
    with Runs(config.model_copy(update=changes), silent) as runs:
        decode, prefill = (
            _measure(runs, tokens, prompt, count, gguf, blocks)
            for prompt, count in zip(prompts, (TOKENS, 1), strict=True)
        )
    return [
        {
            "threads": str(threads),
            "ratio": f"{name} / {baseline}",
            "TPOT, ms": both(decode, name, baseline, "tpot_s"),
            "TPOT": ratio(decode, name, baseline, "tpot_s"),
            f"TTFT of {SHORT}, ms": both(decode, name, baseline, "ttft_s"),
            f"TTFT of {SHORT}": ratio(decode, name, baseline, "ttft_s"),
            f"TTFT of {LONG}, ms": both(prefill, name, baseline, "ttft_s"),
            f"TTFT of {LONG}": ratio(prefill, name, baseline, "ttft_s"),
            "tokens": same(decode, name, baseline),
        }
        for name, baseline in RATIOS
    ]


def _measure(runs: Runs, tokens: Tokens, prompt: str, count: int, gguf: str, blocks: int) -> dict[str, list[Generated]]:
    flags = runs.flags(FLAGS)
    spec = runs.spec("full", flags)
    reference, threads = Reference(spec), spec.threads or default_threads()
    llama, rpc = _Llama(gguf, threads), _Llama(gguf, threads, runs.plan.end - runs.plan.start)
    ids = tokens.encode(prompt, chat=False)
    request = GenerationRequest(prompt, max_new_tokens=count, chat=False, ignore_eos=True)

    def run(kind: Kind) -> Generated:
        metrics = answer(runs, kind, flags, request)
        return Generated(metrics.token_ids, metrics.ttft_s, metrics.tpot_s or 0.0)

    arms: dict[str, Callable[[], Generated]] = {
        OURS: lambda: run("full"),
        SPLIT: lambda: run("split"),
        LLAMA: lambda: llama.run(ids, count),
        RPC: lambda: rpc.run(ids, count),
        GENERATE: lambda: reference.run(prompt, count, chat=False),
    }
    try:
        return warm_blocks(arms, blocks)
    finally:
        reference.stop()
        llama.stop()
        rpc.stop()


class _Llama:
    """The process of bench/llama_worker.py. It keeps OpenMP's own wait policy, since llama.cpp's threads synchronise
    after every operation."""

    def __init__(self, gguf: str, threads: int, *remote_layers: int) -> None:
        command = [sys.executable, "-m", "bench.llama_worker", gguf, *map(str, (threads, *remote_layers))]
        environment = {name: value for name, value in os.environ.items() if name not in process_environment.DEFAULTS}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def run(self, ids: Sequence[int], count: int) -> Generated:
        """Generate `count` tokens after `ids`, greedily."""
        stdin, stdout = self._process.stdin, self._process.stdout
        if stdin is None or stdout is None:
            raise ValueError("the worker has no pipes")
        print(json.dumps([ids, count]), file=stdin, flush=True)
        found, ttft_s, tpot_s = json.loads(stdout.readline())
        return Generated(tuple(found), ttft_s, tpot_s)

    def stop(self) -> None:
        """End the worker by closing its stdin."""
        self._process.communicate()

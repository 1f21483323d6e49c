"""The full model as fast as it goes here, against llama.cpp on the file that its weights came from, and against
transformers' `generate()` in float32.

Three workers, each with the same number of threads and the same prompt ids; greedy. llama.cpp is evaluated through
llama-cpp-python's low-level calls (bench/requirements.txt), with numpy's argmax in place of its samplers. Its products
round activations to 8 bits where ours leave them in float32, so that the two may come to differ in a token.
"""

import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from bench.answer import FAST, answer
from bench.pairs import blocks
from bench.reference import Generated, Reference
from bench.report import write
from splitlearn import fetch, process
from splitlearn.compare import environment
from splitlearn.config import Config, RunsConfig
from splitlearn.events import GenerationRequest
from splitlearn.lab.stats import effect
from splitlearn.metrics import first_divergence
from splitlearn.models import CATALOGUE
from splitlearn.progress import silent
from splitlearn.runs import Runs
from splitlearn.tokens import Tokens

PAIRS = 12
THREADS = (1, 2)
TOKENS = 64
SHORT, LONG = 20, 512
FLAGS = f"{FAST},weight_dtype=int4"
OURS, LLAMA, GENERATE = "full, fast", "llama.cpp", "generate()"
TEXTS = ("prompts.txt", "more_prompts.txt")


def main(runs: Runs) -> None:
    """Measure and write docs/results/llama.md."""
    tokens = Tokens.load(runs.spec("full", runs.flags(FLAGS)).files.folder, use_fast=True)
    short, long = (_prompt(tokens, length) for length in (SHORT, LONG))
    with tempfile.TemporaryDirectory() as work:
        gguf = fetch.fetch(CATALOGUE[0].source, Path(work), silent).gguf
        rows = [
            row for threads in THREADS for row in _rows(runs.config, threads, tokens, (short, long), f"{work}/{gguf}")
        ]
    text = (
        f"Geometric mean ratios with 95% intervals over {PAIRS} blocks, the arms in random order within each, each arm "
        f"in a process with the threads named. TPOT: {TOKENS} tokens after a prompt of {SHORT}; TTFT: prompts of "
        f"{SHORT} and {LONG} tokens. {OURS}: flags `{FLAGS}`; its steps of one token run on one thread in any case."
    )
    write("llama", "The full model against llama.cpp and generate()", text, rows, environment(runs))


def _prompt(tokens: Tokens, length: int) -> str:
    """A text of so many tokens."""
    text = " ".join((Path(__file__).parent / name).read_text(encoding="utf-8").replace("\n", " ") for name in TEXTS)
    found = tokens.decode(tokens.encode(text, chat=False)[:length])
    if len(tokens.encode(found, chat=False)) != length:
        raise ValueError(f"the first {length} tokens of {' and '.join(TEXTS)} are others when they stand alone")
    return found


def _rows(config: Config, threads: int, tokens: Tokens, prompts: tuple[str, str], gguf: str) -> list[dict[str, str]]:
    changes = {"runs": RunsConfig(threads=threads), "flags": FLAGS}
    with Runs(config.model_copy(update=changes), silent) as runs:
        decode, prefill = (
            _measure(runs, tokens, prompt, count, gguf) for prompt, count in zip(prompts, (TOKENS, 1), strict=True)
        )
    ours, theirs = decode[OURS][0].token_ids, decode[LLAMA][0].token_ids
    differ = first_divergence(ours, theirs)
    return [
        {
            "threads": str(threads),
            "ratio": f"{OURS} / {baseline}",
            "TPOT, ms": _both(decode, baseline, "tpot_s"),
            "TPOT": _ratio(decode, baseline, "tpot_s"),
            f"TTFT of {SHORT}, ms": _both(decode, baseline, "ttft_s"),
            f"TTFT of {SHORT}": _ratio(decode, baseline, "ttft_s"),
            f"TTFT of {LONG}, ms": _both(prefill, baseline, "ttft_s"),
            f"TTFT of {LONG}": _ratio(prefill, baseline, "ttft_s"),
            "tokens": ("identical" if differ is None else f"differ from {differ} on") if baseline == LLAMA else "",
        }
        for baseline in (LLAMA, GENERATE)
    ]


def _both(found: dict[str, list[Generated]], baseline: str, key: str) -> str:
    return " / ".join(f"{median(getattr(run, key) for run in found[arm]) * 1e3:.1f}" for arm in (OURS, baseline))


def _ratio(found: dict[str, list[Generated]], baseline: str, key: str) -> str:
    return str(effect([getattr(run, key) for run in found[OURS]], [getattr(run, key) for run in found[baseline]]))


def _measure(runs: Runs, tokens: Tokens, prompt: str, count: int, gguf: str) -> dict[str, list[Generated]]:
    flags = runs.flags(FLAGS)
    spec = runs.spec("full", flags)
    reference, llama = Reference(spec), process.start("The llama.cpp worker process", _serve, gguf, spec.threads)
    ids = tokens.encode(prompt, chat=False)
    request = GenerationRequest(prompt, max_new_tokens=count, chat=False, ignore_eos=True)

    def ours() -> Generated:
        metrics = answer(runs, "full", flags, request)
        return Generated(metrics.token_ids, metrics.ttft_s, metrics.tpot_s or 0.0)

    def theirs() -> Generated:
        llama.send((ids, count))
        found: Generated = llama.receive()
        return found

    arms: dict[str, Callable[[], Generated]] = {
        OURS: ours,
        LLAMA: theirs,
        GENERATE: lambda: reference.run(prompt, count, chat=False),
    }
    try:
        for arm in arms.values():
            arm()
        return blocks(arms, PAIRS)
    finally:
        reference.stop()
        llama.stop()


def _serve(connection: Connection, gguf: str, threads: int) -> None:
    """llama.cpp's process."""
    from llama_cpp import Llama

    model = Llama(gguf, n_ctx=1024, n_threads=threads, n_threads_batch=threads, verbose=False)
    while True:
        ids, count = connection.recv()
        connection.send(_generated(model, ids, count))


def _generated(model: Any, ids: Sequence[int], count: int) -> Generated:
    found, times, started = list[int](), list[float](), time.perf_counter()
    model.reset()
    model.eval(ids)
    for number in range(count):
        found.append(int(np.argmax(model.scores[model.n_tokens - 1])))
        times.append(time.perf_counter())
        if number + 1 < count:
            model.eval(found[-1:])
    return Generated(tuple(found), times[0] - started, (times[-1] - times[0]) / max(1, count - 1))

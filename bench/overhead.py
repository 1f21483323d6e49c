"""Overhead of splitting on loopback, and of the decode loop against transformers' `generate()`.

The three arms are worker processes with the same threads, tokens and dtype (unless a flag changes it). Each block also
has as many round trips of a step's bytes to an echo server (bench/echo.py).
"""

from collections.abc import Callable
from pathlib import Path
from statistics import median

from bench.answer import answer
from bench.echo import READS, Echo, Memory
from bench.pairs import warm_blocks
from bench.ratios import both, difference_s, ratio
from bench.reference import Generated, Reference
from bench.report import write
from splitlearn.arms.compare import environment
from splitlearn.arms.runs import Runs
from splitlearn.arms.spec import Kind
from splitlearn.config import Config, RunsConfig
from splitlearn.events import GenerationRequest
from splitlearn.flags.selection import FlagSet
from splitlearn.runtime.progress import silent

PAIRS = 12
THREADS = (1, 2)
TOKENS = 64
# How long the echo server, and then its client, read memory between two messages: at least as long as trunk and client.
HOLD_S, BETWEEN_S = 0.003, 0.0015
PROMPT = (Path(__file__).parent / "prompts.txt").read_text(encoding="utf-8").splitlines()[0]
# With "medium", float32 products may be computed in bfloat16: that would not be the dtype of the reference.
PLAIN = "low_cpu_mem_usage,inference_mode,use_cache,cache,output_attentions,output_hidden_states,fast_top_k"

MORE = ("weight_prepack", "weight_prepack=blocks", "weight_dtype")
SETS = {"none": PLAIN, **{more: f"{PLAIN},{more}" for more in MORE}}


def main(runs: Runs) -> None:
    """Measure and write docs/results/overhead.md."""
    rows = [row for more in SETS for threads in THREADS for row in _rows(runs.config, threads, more)]
    text = (
        f"Geometric mean ratios with 95% intervals over {PAIRS} blocks of {TOKENS} tokens, greedy, float32 but for the "
        "weights with weight_dtype, the arms in random order within each block, each process with the threads named; "
        f"flags `{PLAIN}`, and those named. Difference and echo (a round trip of the same bytes) are medians. All "
        "processes have the OpenMP wait policy PASSIVE, without which client and "
        "trunk take the cores from each other. One-token steps of full and split run on one thread in float32, "
        "whatever the number named; those of generate() do not."
    )
    write("overhead", "What splitting costs, and what the decode loop costs", text, rows, environment(runs))


def _rows(config: Config, threads: int, more: str) -> list[dict[str, str]]:
    changes = {"runs": RunsConfig(threads=threads), "flags": SETS[more]}
    with Runs(config.model_copy(update=changes), silent) as runs:
        found = _measure(runs)
    echo_s = median(run.tpot_s for run in found.pop("echo"))
    return [
        {
            "more flags": more,
            "threads": str(threads),
            "ratio": f"{name} / {baseline}",
            "TPOT, ms": both(found, name, baseline, "tpot_s"),
            "TPOT": ratio(found, name, baseline, "tpot_s"),
            "difference, ms": f"{1e3 * difference_s(found, name, baseline):.2f}",
            "echo, ms": f"{1e3 * echo_s:.2f}",
            "TTFT": ratio(found, name, baseline, "ttft_s"),
            "token ids of all runs": "identical" if _same(found[name] + found[baseline]) else "NOT identical",
        }
        for name, baseline in (("split", "full"), ("full", "generate"), ("split", "generate"))
    ]


def _same(runs: list[Generated]) -> bool:
    return len({run.token_ids for run in runs}) == 1


def _measure(runs: Runs) -> dict[str, list[Generated]]:
    flags = runs.flags(runs.config.flags)
    reference, echo, memory = Reference(runs.spec("full", flags)), Echo(READS), Memory()
    try:
        arms: dict[str, Callable[[], Generated]] = {
            "generate": lambda: reference.run(PROMPT, TOKENS),
            "full": lambda: _run(runs, "full", flags),
            "split": lambda: _run(runs, "split", flags),
            "echo": lambda: round_trips(echo, memory),
        }
        return warm_blocks(arms, PAIRS)
    finally:
        reference.stop()
        echo.close()


def round_trips(echo: Echo, memory: Memory) -> Generated:
    """Send a step's bytes TOKENS times; both ends read memory between them. TPOT is the median round trip."""
    taken = list[float]()
    for _ in range(TOKENS):
        memory.read(BETWEEN_S)
        taken.append(echo.step(HOLD_S))
    return Generated((), 0.0, median(taken))


def _run(runs: Runs, kind: Kind, flags: FlagSet) -> Generated:
    request = GenerationRequest(PROMPT, max_new_tokens=TOKENS, ignore_eos=True)
    metrics = answer(runs, kind, flags, request)
    return Generated(metrics.token_ids, metrics.ttft_s, metrics.tpot_s or 0.0)

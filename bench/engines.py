"""The engines side by side, full and split: TTFT, TPOT, load time, memory, and whether the token ids are torch's.

Every arm is compared with torch's own layers in float32 in the same arm, and full with split. Both sides of the split
have the same engine.
"""

from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

from bench.answer import report
from bench.overhead import PLAIN
from bench.pairs import warm_blocks
from bench.report import write
from splitlearn.arms.compare import environment
from splitlearn.arms.report import ArmReport
from splitlearn.arms.runs import Runs
from splitlearn.config import RunsConfig
from splitlearn.events import GenerationRequest, Kind
from splitlearn.lab.stats import effect
from splitlearn.metrics import first_divergence
from splitlearn.runtime.progress import silent

BLOCKS, THREADS, TOKENS = 12, 1, 64
BASE = "low_cpu_mem_usage,inference_mode,use_cache"
TORCH = "torch"
ENGINES = {
    TORCH: PLAIN,
    "torch, `auto`": "auto",
    "torch, `fast` (4 bits)": "fast",
    "onnxruntime": f"{BASE},engine=onnxruntime",
    "onnxruntime, int4": f"{BASE},engine=onnxruntime,weight_dtype=int4",
    "jax": f"{BASE},engine=jax",
}
KINDS: tuple[Kind, ...] = ("full", "split")


def main(runs: Runs, blocks: int = BLOCKS) -> None:
    """Measure and write docs/results/engines.md."""
    request = GenerationRequest(runs.config.generation.prompt, max_new_tokens=TOKENS, ignore_eos=True)
    config = runs.config.model_copy(update={"runs": RunsConfig(threads=THREADS)})
    with Runs(config, silent) as own:
        arms: dict[str, Callable[[], ArmReport]] = {
            f"{kind} {name}": partial(report, own, kind, own.flags(words), request)
            for kind in KINDS
            for name, words in ENGINES.items()
        }
        found = warm_blocks(arms, blocks)
        machine = environment(own)
    rows = [_row(kind, name, found) for kind in KINDS for name in ENGINES]
    text = (
        f"Greedy answers of {TOKENS} tokens, {THREADS} thread in each process, {blocks} blocks in random order; means, "
        f"and geometric mean ratios with 95% intervals. torch has the flags `{PLAIN}`, an engine beside it `{BASE}`. "
        "*Load* is the weights' way into the engine (for a graph or a program that is kept, without making it), the "
        "client's in split. Memory is the peak beyond imports, client and trunk together. *Same ids*: up to which "
        f"token the ids are those of torch in the same arm, of {TOKENS}."
    )
    write("engines", "Engines of a stage", text, rows, machine)


def _row(kind: Kind, name: str, found: dict[str, list[ArmReport]]) -> dict[str, Any]:
    own, torch, full = (found[each] for each in (f"{kind} {name}", f"{kind} {TORCH}", f"full {name}"))
    ids, expected = own[0].metrics.token_ids, torch[0].metrics.token_ids
    same = TOKENS if ids == expected else first_divergence(ids, expected)
    return {
        "arm": kind,
        "engine": name,
        "TPOT, ms": f"{1e3 * sum(_tpot(own)) / len(own):.1f}",
        "TPOT / torch": "" if name == TORCH else str(effect(_tpot(own), _tpot(torch))),
        "split / full": str(effect(_tpot(own), _tpot(full))) if kind == "split" else "",
        "TTFT / torch": "" if name == TORCH else str(effect(_ttft(own), _ttft(torch))),
        "load, s": f"{own[0].load_s:.1f}",
        "memory, MB": f"{median(each.added_bytes for each in own) / 1e6:.0f}",
        "same ids": same,
    }


def _tpot(reports: list[ArmReport]) -> list[float]:
    return [each.metrics.tpot_s or 0.0 for each in reports]


def _ttft(reports: list[ArmReport]) -> list[float]:
    return [each.metrics.ttft_s for each in reports]

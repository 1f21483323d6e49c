"""Speed-up by head_overlap: split with it against split without it and against full, beside `generate()`.

Measured on loopback, and with one thread over a link of 20 ms.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from statistics import median

from bench.answer import answer
from bench.echo import READS, Echo, Memory
from bench.lookup import OPEN
from bench.overhead import SETS, round_trips
from bench.pairs import blocks
from bench.reference import Generated, Reference
from bench.report import write
from splitlearn.arms.compare import environment
from splitlearn.arms.runs import Runs
from splitlearn.arms.spec import Kind
from splitlearn.config import Config, RunsConfig, with_link
from splitlearn.events import GenerationRequest
from splitlearn.lab.stats import effect
from splitlearn.link.emulated import Link
from splitlearn.metrics import RunMetrics
from splitlearn.runtime.progress import silent

MEASURED = ("none", "weight_prepack=blocks", "weight_dtype")
PAIRS, TOKENS, THREADS = 12, 64, (1, 2)
WITH = "head_overlap"
LINK = Link(rtt_ms=20)
LOOPBACK = "loopback"
NEAR = (("split", "full"), (WITH, "full"), (WITH, "split"), ("full", "generate"))
Run = RunMetrics | Generated
Found = Mapping[str, Sequence[Run]]


def main(runs: Runs) -> None:
    """Measure and write docs/results/head_overlap.md."""
    rows = [row for more in MEASURED for threads in THREADS for row in _rows(runs.config, more, threads)]
    text = (
        f"Geometric mean ratios of TPOT with 95% intervals over {PAIRS} prompts, {TOKENS} tokens each, greedy, the "
        "arms in random order for each prompt, flags of overhead.md and those named, each process with the threads "
        "named, of which one computes the single tokens of full and split in any case. Client and trunk are on the "
        "same machine and share its memory: while the client reads its head's weights the trunk reads its own. "
        "Difference, echo (a round trip of a step's bytes, as in overhead.md) and TPOT are medians. Head starts are "
        "the steps that were begun before their token was sure."
    )
    write("head_overlap", "The next step begun beside the LM head", text, rows, environment(runs))


def _rows(config: Config, more: str, threads: int) -> list[dict[str, str]]:
    echoes, said = list[float](), {"more flags": more, "threads": str(threads)}
    changes = {"flags": SETS[more], "runs": RunsConfig(threads=threads)}
    with Runs(config.model_copy(update=changes), silent) as runs:
        near = _measure(runs, ("generate", "full", "split", WITH), echoes)
        rows = [said | _row(near, LOOPBACK, *pair, f"{1e3 * median(echoes):.2f}") for pair in NEAR]
        if threads > 1:
            return rows
    with Runs(with_link(config.model_copy(update=changes), str(LINK)), silent) as far_runs:
        far = _measure(far_runs, ("split", WITH), [])
    return [*rows, said | _row(far, LINK.summary, WITH, "split", "")]


def _measure(runs: Runs, names: Sequence[str], echoes: list[float]) -> Found:
    """Run the arms on each prompt. Appends the echo server's round trip of a step's bytes to `echoes`, once a
    prompt."""
    reference, echo, memory = Reference(runs.spec("full", runs.flags(runs.config.flags))), Echo(READS), Memory()
    found: dict[str, list[Run]] = {name: [] for name in names}
    try:
        blocks(_arms(runs, reference, names, OPEN[0]), 1)  # warms them all
        for number, prompt in enumerate(OPEN[:PAIRS]):
            for name, each in blocks(_arms(runs, reference, names, prompt), 1, seed=number).items():
                found[name] += each
            echoes.append(round_trips(echo, memory).tpot_s)
    finally:
        reference.stop()
        echo.close()
    return found


def _arms(runs: Runs, reference: Reference, names: Sequence[str], prompt: str) -> dict[str, Callable[[], Run]]:
    request = GenerationRequest(prompt, max_new_tokens=TOKENS, ignore_eos=True)
    flags = runs.config.flags
    arms: dict[str, tuple[Kind, str]] = {
        "full": ("full", flags),
        "split": ("split", flags),
        WITH: ("split", f"{flags},{WITH}"),
    }
    found: dict[str, Callable[[], Run]] = {
        name: partial(answer, runs, kind, runs.flags(words), request) for name, (kind, words) in arms.items()
    }
    found["generate"] = partial(reference.run, prompt, TOKENS)
    return {name: found[name] for name in names}


def _row(found: Found, where: str, name: str, baseline: str, echo_ms: str) -> dict[str, str]:
    runs, others = found[name], found[baseline]
    tpots, base = ([each.tpot_s or 0.0 for each in arm] for arm in (runs, others))
    split = [run for run in runs if isinstance(run, RunMetrics)]
    begun, right = sum(run.head_starts for run in split), sum(run.head_starts_right for run in split)
    same = sum(run.token_ids == other.token_ids for run, other in zip(runs, others, strict=True))
    return {
        "trunk": where,
        "ratio": f"{name} / {baseline}",
        "TPOT, ms": f"{1e3 * median(tpots):.2f} / {1e3 * median(base):.2f}",
        "TPOT": str(effect(tpots, base)),
        "difference, ms": f"{1e3 * median(a - b for a, b in zip(tpots, base, strict=True)):.2f}",
        "echo, ms": echo_ms,
        "head starts right": f"{right} of {begun} ({begun / (len(runs) * (TOKENS - 1)):.0%} of steps)" if begun else "",
        "token ids the same": f"{same} of {len(runs)}",
    }

"""What it brings to begin a step with the first part of the logits: split with head_overlap against split without it
and against the full model, on loopback, and over a link of 20 ms."""

from collections.abc import Mapping, Sequence
from functools import partial
from statistics import median

from bench.answer import answer
from bench.echo import READS, Echo, Memory
from bench.link import Shape, link
from bench.lookup import OPEN
from bench.overhead import SETS, round_trips
from bench.pairs import blocks
from bench.report import write
from splitlearn.arm import Kind
from splitlearn.compare import environment
from splitlearn.config import Config, RunsConfig, TrunkConfig
from splitlearn.events import GenerationRequest
from splitlearn.lab.stats import effect
from splitlearn.metrics import RunMetrics
from splitlearn.progress import silent
from splitlearn.runs import Runs

PAIRS, TOKENS, THREADS = 12, 64, 1
WITH = "head_overlap"
SHAPE = Shape(0.020)
LOOPBACK = "loopback"
Found = Mapping[str, Sequence[RunMetrics]]


def main(runs: Runs) -> None:
    """Measure and write docs/results/head_overlap.md."""
    config = runs.config.model_copy(update={"runs": RunsConfig(threads=THREADS)})
    rows = [row for more in SETS for row in _rows(config, more)]
    text = (
        f"Geometric mean ratios of TPOT with 95% intervals over {PAIRS} prompts, {TOKENS} tokens each, greedy, the "
        "arms in random order for each prompt, one thread in each process, flags of overhead.md and those named. "
        "Client and trunk are on the same machine and share its memory: while the client reads its head's weights the "
        "trunk reads its own. Difference, echo (a round trip of a step's bytes, as in overhead.md) and TPOT are "
        "medians. Head starts are the steps that were begun before their token was sure."
    )
    write("head_overlap", "The next step begun beside the LM head", text, rows, environment(runs))


def _rows(config: Config, more: str) -> list[dict[str, str]]:
    echoes = list[float]()
    with Runs(config.model_copy(update={"flags": SETS[more]}), silent) as runs:
        near = _measure(runs, ("full", "split", WITH), echoes)
        with link(runs.trunk_addresses(runs.flags(SETS[more]).trunk)[0], SHAPE) as address:
            far_config = runs.config.model_copy(update={"trunk": TrunkConfig(address=(address,))})
            with Runs(far_config, silent) as far_runs:
                far = _measure(far_runs, ("split", WITH), [])
    pairs = (("split", "full"), (WITH, "full"), (WITH, "split"))
    rows = [_row(near, LOOPBACK, more, *pair, f"{1e3 * median(echoes):.2f}") for pair in pairs]
    return [*rows, _row(far, str(SHAPE), more, WITH, "split", "")]


def _measure(runs: Runs, names: Sequence[str], echoes: list[float]) -> Found:
    """Each arm's runs; `echoes` gets the round trip of a step's bytes to an echo server, once for each prompt."""
    blocks(_arms(runs, names, OPEN[0]), 1)  # all are warm then
    found: dict[str, list[RunMetrics]] = {name: [] for name in names}
    echo, memory = Echo(READS), Memory()
    for number, prompt in enumerate(OPEN[:PAIRS]):
        for name, each in blocks(_arms(runs, names, prompt), 1, seed=number).items():
            found[name] += each
        echoes.append(round_trips(echo, memory).tpot_s)
    echo.close()
    return found


def _arms(runs: Runs, names: Sequence[str], prompt: str) -> dict[str, "partial[RunMetrics]"]:
    request = GenerationRequest(prompt, max_new_tokens=TOKENS, ignore_eos=True)
    flags = runs.config.flags
    arms: dict[str, tuple[Kind, str]] = {
        "full": ("full", flags),
        "split": ("split", flags),
        WITH: ("split", f"{flags},{WITH}"),
    }
    return {name: partial(answer, runs, arms[name][0], runs.flags(arms[name][1]), request) for name in names}


def _row(found: Found, where: str, more: str, name: str, baseline: str, echo_ms: str) -> dict[str, str]:
    runs, others = found[name], found[baseline]
    tpots, base = ([each.tpot_s or 0.0 for each in arm] for arm in (runs, others))
    begun, right = (sum(getattr(run, key) for run in runs) for key in ("head_starts", "head_starts_right"))
    same = sum(run.token_ids == other.token_ids for run, other in zip(runs, others, strict=True))
    return {
        "more flags": more,
        "trunk": where,
        "ratio": f"{name} / {baseline}",
        "TPOT, ms": f"{1e3 * median(tpots):.2f} / {1e3 * median(base):.2f}",
        "TPOT": str(effect(tpots, base)),
        "difference, ms": f"{1e3 * median(a - b for a, b in zip(tpots, base, strict=True)):.2f}",
        "echo, ms": echo_ms,
        "head starts right": f"{right} of {begun} ({begun / (len(runs) * (TOKENS - 1)):.0%} of steps)" if begun else "",
        "token ids the same": f"{same} of {len(runs)}",
    }

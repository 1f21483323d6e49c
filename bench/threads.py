"""TPOT by the number of threads in a team (splitlearn/kernels/thread_team.py).

Full and split run with the preset `fast`, with teams of 1, 2, 4, ... threads up to the machine's cores. It needs an
idle machine with more than two cores.
"""

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial

from bench.answer import answer
from bench.overhead import PROMPT
from bench.pairs import warm_blocks
from bench.ratios import both, ratio, tokens
from bench.reference import Generated
from bench.report import write
from splitlearn.arms.compare import environment
from splitlearn.arms.runs import Runs
from splitlearn.arms.spec import Kind
from splitlearn.config import RunsConfig
from splitlearn.events import GenerationRequest
from splitlearn.runtime.process import default_threads
from splitlearn.runtime.progress import silent
from splitlearn.stages.fused_decode import CORES_EACH

PAIRS = 12
TOKENS = 96
KINDS: tuple[Kind, ...] = ("full", "split")


def main(runs: Runs) -> None:
    """Measure and write docs/results/threads.md."""
    teams = [2**power for power in range(default_threads().bit_length())]
    if len(teams) == 1:
        raise SystemExit("bench threads: this process may use one core, so there is nothing to compare")
    with ExitStack() as stack:
        arms: dict[str, Callable[[], Generated]] = {}
        for team in teams:
            config = runs.config.model_copy(update={"runs": RunsConfig(threads=CORES_EACH * team), "flags": "fast"})
            own = stack.enter_context(Runs(config, silent))
            arms |= {f"{kind}, {team}": partial(_run, own, kind) for kind in KINDS}
        found = warm_blocks(arms, PAIRS)
    rows = [
        {
            "arm": kind,
            "threads for a token": f"{team} / 1",
            "TPOT, ms": both(found, f"{kind}, {team}", f"{kind}, 1", "tpot_s"),
            "TPOT": ratio(found, f"{kind}, {team}", f"{kind}, 1", "tpot_s"),
            "token ids": tokens(found, f"{kind}, {team}", f"{kind}, 1"),
        }
        for kind in KINDS
        for team in teams[1:]
    ]
    text = (
        f"Geometric mean ratios with 95% intervals over {PAIRS} blocks of {TOKENS} tokens, greedy, flags `fast`, all "
        f"arms in random order within each block. `runs.threads` is {CORES_EACH} times the threads for a token, since "
        f"client and trunk compute at the same time. This process may use {default_threads()} cores."
    )
    write("threads", "What more threads bring to a token", text, rows, environment(runs))


def _run(runs: Runs, kind: Kind) -> Generated:
    request = GenerationRequest(PROMPT, max_new_tokens=TOKENS, ignore_eos=True)
    metrics = answer(runs, kind, runs.flags(runs.config.flags), request)
    return Generated(metrics.token_ids, metrics.ttft_s, metrics.tpot_s or 0.0)

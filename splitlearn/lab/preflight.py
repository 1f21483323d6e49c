"""What an experiment will take, said before it begins: flags, arms, processes, time, and how busy the machine is.

    preflight(runs, setup).lines()       # takes SAMPLE_S: it looks how busy the machine is

Times are estimates. A decoded token is taken to read all weights once at READ_BYTES_S, which two cores do with float32;
a token without a KV cache takes UNCACHED times as long. A process loads in LOAD_S and the time to read its weights
LOAD_READS times.
"""

import time
from collections import Counter
from dataclasses import dataclass

from splitlearn.arms.runs import Runs
from splitlearn.lab.design import CACHE, Arm, first_pass
from splitlearn.lab.experiment import FIRST_PASS_PREFILLS, FIRST_PASS_TOKENS, PREFILLS
from splitlearn.lab.records import Setup
from splitlearn.runtime.cgroups import cpus
from splitlearn.runtime.load import reading

SAMPLE_S = 1.0
READ_BYTES_S = 10e9
PROMPT_STEPS = 3
UNCACHED = 3
LOAD_S = 1.5
LOAD_READS = 10
# Cores that other programs take: from here on more pairs are needed, and small effects cannot be decided.
BUSY = 0.25


@dataclass(frozen=True)
class Preflight:
    """Before the start of an experiment. `first_pass_s`, `block_s` and `first_verdicts_s` are estimates in seconds;
    `others_cpu` is how many of the `cores` other programs and the host took during SAMPLE_S."""

    flags: tuple[str, ...]
    arms: int
    processes: int
    first_pass_s: float
    block_s: float
    first_verdicts_s: float
    others_cpu: float
    cores: float

    @property
    def busy(self) -> bool:
        """Whether other programs take so much that verdicts need more pairs."""
        return self.others_cpu > BUSY

    def lines(self) -> list[str]:
        """The preflight in sentences."""
        said = [
            f"Measures {len(self.flags)} flags: {', '.join(self.flags)}.",
            f"{self.arms} arms in {self.processes} processes. The first pass takes about {_text(self.first_pass_s)}, "
            f"then a block about {_text(self.block_s)}; the first verdicts come after about "
            f"{_text(self.first_verdicts_s)}.",
            f"Other programs use {self.others_cpu:.1f} of {self.cores:g} cores now.",
        ]
        if self.busy:
            said[-1] += " Pairs are kept with this load; intervals get wider, and small effects may stay undecided."
        return said


def preflight(runs: Runs, setup: Setup) -> Preflight:
    """What the experiment of `setup` will take on this machine now."""
    arms, weights = setup.plan.arms, runs.files.weights.stat().st_size
    processes = Counter(_process_of(runs, arm) for arm in arms)
    token_s = weights / READ_BYTES_S
    loading_s = len(processes) * (LOAD_S + LOAD_READS * token_s)
    first_s = loading_s + sum(
        _run_s(arm, FIRST_PASS_TOKENS, FIRST_PASS_PREFILLS, token_s) for arm in first_pass(setup.plan)
    )
    block_s = sum(_run_s(arm, setup.max_new_tokens, PREFILLS, token_s) for arm in arms)
    before = reading(None)
    time.sleep(SAMPLE_S)
    now = reading(before)
    return Preflight(
        flags=tuple(dict.fromkeys(q.flag for q in setup.plan.questions if q.flag in setup.flags.names())),
        arms=len(arms),
        processes=len(processes),
        first_pass_s=first_s,
        block_s=block_s,
        first_verdicts_s=first_s + setup.looks[0] * block_s,
        others_cpu=now.others_cpu + now.stolen_cpu,
        cores=cpus(),
    )


def _process_of(runs: Runs, arm: Arm) -> tuple[object, ...]:
    """What tells the arm's worker process from others; split arms also differ by their trunk's flags."""
    flags = runs.spec(arm.kind, arm.flags).loaded().flags
    return arm.kind, flags, arm.copy


def _run_s(arm: Arm, tokens: int, prefills: int, token_s: float) -> float:
    cached = CACHE in (arm.flags.full if arm.kind == "full" else arm.flags.client)
    return token_s * ((prefills + 1) * PROMPT_STEPS + tokens * (1 if cached else UNCACHED))


def _text(seconds: float) -> str:
    return f"{max(1.0, seconds):.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"

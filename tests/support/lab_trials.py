"""A made-up experiment: its arms, and runs with effects that a test chooses. `write` saves it for a page to show.

`quick_command` is the command line for real ones.
"""

import random
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from splitlearn.cli import main as command_line
from splitlearn.flags.selection import FlagSet
from splitlearn.lab import experiment
from splitlearn.lab.design import Arm, Design, plan
from splitlearn.lab.records import Setup, Trial
from splitlearn.lab.store import FILE, FOLDER, Store

FLAGS = frozenset({"use_cache", "inference_mode", "output_hidden_states"})
TOKENS = tuple(range(100, 116))
TTFT_S, TPOT_S = 0.2, 0.03
Change = Callable[[Arm, Trial], Trial]


def quick_command(arguments: list[str]) -> int:
    """The command line in a process of its own. Experiments take fewer prefills: what they time is of no interest."""
    experiment.PREFILLS = 2
    return command_line.main(arguments)


def setup(design: Design = "without", about: frozenset[str] = FLAGS, **changes: Any) -> Setup:
    """An experiment about the flags `about` on every side with a fixed 12 pairs."""
    flags = FlagSet(full=about, client=about, trunk=about)
    made = Setup(
        design=design,
        plan=plan(design, flags, flags.names()),
        flags=flags,
        prompts=("Why is the sky blue?",),
        max_new_tokens=len(TOKENS),
        delta=0.02,
        pairs=12,
        max_pairs=12,
        minutes=None,
        seed=7,
        model="tiny",
        command="python -m splitlearn lab --pairs 12 --seed 7",
        environment={"processor": "made up", "cores": 2},
    )
    return replace(made, **changes)


def trials(
    experiment: Setup,
    effects: Mapping[tuple[str, str], float] | None = None,
    noise: float = 0.004,
    blocks: int = 12,
    change: Change = lambda arm, trial: trial,
) -> list[Trial]:
    """One run of each arm in each block. `effects` maps (arm's name, "ttft_s" or "tpot_s") to a factor on its time.
    `noise` is the standard deviation of the log of each time. `change` may alter each run."""
    draw, made = random.Random(3), []
    for block in range(blocks):
        for order, arm in enumerate(experiment.plan.arms):
            ttft, tpot = (
                base * (effects or {}).get((arm.name, metric), 1.0) * draw.lognormvariate(0, noise)
                for base, metric in ((TTFT_S, "ttft_s"), (TPOT_S, "tpot_s"))
            )
            made.append(change(arm, trial(arm, block, order, len(experiment.plan.arms), ttft, tpot)))
    return made


def write(folder: Path, name: str = "2026-01-02-030405", **changes: Any) -> Setup:
    """Save an experiment of 4 pairs about one flag, which has ended, below the `folder` in which a page runs."""
    usual = {"pairs": 4, "max_pairs": 4, "command": "python -m splitlearn lab --pairs 4 --seed 7"}
    asked = setup(about=frozenset({"inference_mode"}), **{**usual, **changes})
    with Store.create(folder / FOLDER / name / FILE, asked) as store:
        for each in trials(asked, blocks=asked.max_pairs):
            store.add(each)
        store.finish(f"{asked.max_pairs} pairs, as asked")
    return asked


def trial(arm: Arm, block: int, order: int, block_runs: int, ttft_s: float, tpot_s: float) -> Trial:
    """One run that did nothing unusual; what a time differs by is in the ledger's part for the model or the trunk."""
    steps = len(TOKENS) - 1
    decode = tpot_s * steps
    part = "model" if arm.kind == "full" else "trunk"
    small = {"sample": 0.01 * decode, "unattributed": 0.001 * decode}
    decode_ledger = {part: decode - sum(small.values()), **small}
    ledger = {**decode_ledger, "tokenise": 0.001, part: decode_ledger.get(part, 0.0) + ttft_s - 0.001}
    return Trial(
        block=block,
        attempt=1,
        order=order,
        arm=arm.name,
        at_s=1.8e9 + 60 * block + order,
        block_runs=block_runs,
        ttft_s=ttft_s,
        prefills_s=(ttft_s,),
        tpot_s=tpot_s,
        itl_s=(tpot_s,) * steps,
        token_ids=TOKENS,
        ledger=ledger,
        decode_ledger=decode_ledger,
        load_s=1.5,
        compile_s=0.0,
        added_bytes=600_000_000,
        peak_bytes=900_000_000,
        dtype="float32",
        threads=2,
        bytes_up=0 if arm.kind == "full" else 40_000,
        bytes_down=0 if arm.kind == "full" else 40_000,
        others_cpu=0.1,
        disturbance="",
    )

"""What a trunk server's step costs when many sessions share it. Four measurements:

- replayed sessions of mixed lengths against a plain batched forward of the same layers, with the same total context;
- one session against an unbatched step;
- decoding sessions while a long prompt is prefilled;
- system TPS of real clients, which share the machine with the trunk.
"""

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from itertools import cycle
from pathlib import Path
from statistics import fmean, median

from bench.batched import WARM_UP, Batched, Contexts, Run
from bench.pairs import warm_blocks
from bench.report import table, write
from bench.stepping import Admission, Trunk, admission, mixed, side_by_side
from bench.unbatched import Unbatched
from splitlearn.arms.compare import environment
from splitlearn.arms.runs import Runs
from splitlearn.cli.loadtest_trunk import measure
from splitlearn.config import Config, ServerConfig
from splitlearn.events import GenerationRequest
from splitlearn.generation.tokenizer import Tokens
from splitlearn.lab.request import read_prompts
from splitlearn.lab.stats import MIN_PAIRS, effect
from splitlearn.loadtest.plan import PROMPTS, LoadTest
from splitlearn.loadtest.recording import record
from splitlearn.loadtest.trunk_clients import client_threads
from splitlearn.runtime.progress import silent
from splitlearn.wire.codec import DTYPES
from splitlearn.wire.hidden_states import Plain

# With "medium", float32 products may be computed in bfloat16: that would not be the dtype of the reference.
FLAGS = "low_cpu_mem_usage,inference_mode,use_cache,output_attentions,output_hidden_states"
SIZES = (1, 8, 16, 32)
LENGTH = 100
STEPS = 24
RUNNING = 8
PROMPT = 2000
# Long, since the chunks of a prompt wait for the steps of others.
TIMEOUT_S = 600.0
REAL = (1, 2, 4, 8, 16)
REAL_S = 20.0
TEXT = (Path(__file__).parent / "prompts.txt").read_text(encoding="utf-8")
ALONE, DIRECT = "unbatched", "server without batching"


def main(runs: Runs, blocks: int = 10) -> None:
    """Measure and write docs/results/capacity.md."""
    admissions = max(2, blocks // 2)
    with Runs(with_room(runs.config, ServerConfig(max_sessions=2 * max(SIZES))), silent) as own:
        trunk = recorded(own)
        runs_of = _steps(own, trunk, blocks)
        lengths = mixed(RUNNING, LENGTH)
        prompts = [admission(trunk, lengths, PROMPT, STEPS) for _ in range(admissions)]
        real = [_real(own, clients) for clients in REAL]
        machine = environment(own)
    text = (
        f"Single-token steps with `{FLAGS}`, from {LENGTH} tokens of context on average: {LENGTH // 5} to "
        f"{LENGTH * 9 // 5} at the trunk, equal in the plain forward, the same in total. {STEPS} steps a run, all arms "
        f"in random order in each of {blocks} blocks; medians, and geometric mean ratios with 95% intervals. *Trunk "
        "step*: the trunk's own time for a step that carried all sessions. *TPOT*: as the replaying clients saw it, "
        "which run on the same cores. Threads of the trunk and of the plain forward: "
        f"{machine['trunk']['threads']} each.\n\n"
        "One client alone, its TPOT against that at a server that computes each step by itself at once, all else being "
        "the same; and against one sequence through the same layers in a loop, without a server:\n\n"
        f"{table(_alone(runs_of))}\n\n"
        f"{RUNNING} sessions decode while a prompt of {PROMPT} tokens is admitted, {admissions} times:\n\n"
        f"{table(_prompts(prompts))}\n\n"
        "Real clients (with bottom and top of their own, on the same cores), closed-loop for "
        f"{REAL_S:g} s, once each:\n\n{table(real)}\n\n"
        "Sessions side by side, against a plain batched forward of the trunk's layers:"
    )
    write(
        "capacity", "What a trunk's step costs when sessions share it", text, [_row(runs_of, n) for n in SIZES], machine
    )


def with_room(config: Config, server: ServerConfig) -> Config:
    """`config` with exact flags and these server settings."""
    return config.model_copy(update={"flags": FLAGS, "server": server})


def recorded(runs: Runs, length: int = PROMPT) -> Trunk:
    """The trunk, with recorded hidden states of a text of `length` tokens."""
    tokens, text = Tokens.load(runs.files.folder, use_fast=True), ""
    for word in cycle(TEXT.split()):
        text += f"{word} "
        if len(text) > length and len(tokens.encode(text, chat=False)) >= length:
            break
    spec = replace(runs.ready_spec("split", runs.flags(FLAGS)), timeout_s=TIMEOUT_S)
    states = record(spec, [GenerationRequest(text, 2, chat=False, ignore_eos=True)], silent)[0].states
    return Trunk(spec, states[:, :length].contiguous())


def _steps(runs: Runs, trunk: Trunk, blocks: int) -> dict[str, list[Run]]:
    """The runs of each arm: trunk and plain forward at each size, and one sequence unbatched."""
    data = Plain(DTYPES[trunk.spec.dtype]).to_bytes(trunk.states[:, : LENGTH + STEPS + WARM_UP])
    plain, direct = Batched(trunk.spec, Contexts(data, LENGTH, SIZES)), Unbatched(runs.config)
    at_direct = replace(trunk, spec=trunk.spec.at(direct.address))
    arms = {ALONE: partial(plain.run, 0, STEPS), DIRECT: partial(side_by_side, at_direct, mixed(1, LENGTH), STEPS)}
    for n in SIZES:
        arms[f"plain {n}"] = partial(plain.run, n, STEPS)
        arms[f"trunk {n}"] = partial(side_by_side, trunk, mixed(n, LENGTH), STEPS)
    try:
        return warm_blocks(arms, blocks)
    finally:
        plain.stop()
        direct.stop()


def _row(found: Mapping[str, Sequence[Run]], n: int) -> dict[str, str]:
    """Compare the trunk with n sessions and the plain forward of n sequences."""
    trunk, plain = found[f"trunk {n}"], found[f"plain {n}"]
    return {
        "sessions": str(n),
        "plain step, ms": _ms(run.tpot_s for run in plain),
        "trunk step, ms": _ms(run.trunk_s for run in trunk if run.trunk_s),
        "trunk step / plain": _ratio(trunk, plain, lambda run: run.trunk_s),
        "TPOT / plain": _ratio(trunk, plain, lambda run: run.tpot_s),
        "steps that carried all": f"{fmean(run.whole for run in trunk):.0%}",
    }


def _alone(found: Mapping[str, Sequence[Run]]) -> list[dict[str, str]]:
    """Compare one session at the trunk with one without batching, and with one sequence through LocalStage."""
    trunk, local, direct = found["trunk 1"], found[ALONE], found[DIRECT]
    return [
        {
            "TPOT, ms": _ms(run.tpot_s for run in trunk),
            "without batching, ms": _ms(run.tpot_s for run in direct),
            "TPOT / without batching": _ratio(trunk, direct, lambda run: run.tpot_s),
            "unbatched step, ms": _ms(run.tpot_s for run in local),
            "trunk step / unbatched": _ratio(trunk, local, lambda run: run.trunk_s),
            "TPOT / unbatched": _ratio(trunk, local, lambda run: run.tpot_s),
        }
    ]


def _ratio(ones: Sequence[Run], others: Sequence[Run], of: Callable[[Run], float | None]) -> str:
    """The paired ratio over the blocks in which both have the figure."""
    pairs = [(of(one), of(other)) for one, other in zip(ones, others, strict=True)]
    both = [(one, other) for one, other in pairs if one and other]
    if len(both) < MIN_PAIRS:
        return "too few"
    return str(effect([one for one, _ in both], [other for _, other in both]))


def _prompts(found: Sequence[Admission]) -> list[dict[str, str]]:
    before, during = [each.before_s for each in found], [each.during_s for each in found]
    return [
        {
            "TPOT before, ms": _ms(before),
            "TPOT while it is admitted, ms": _ms(during),
            "while / before": str(effect(during, before)),
            "longest wait for a token, ms": f"{max(each.longest_s for each in found) * 1e3:.0f}",
            "the prompt itself, s": f"{median(each.prompt_s for each in found):.1f}",
        }
    ]


def _real(runs: Runs, clients: int) -> dict[str, str]:
    test = LoadTest(read_prompts(PROMPTS), clients=clients, duration_s=REAL_S)
    found = measure(runs, test, silent, nullcontext(threading.Event())).summary
    print(f"{clients} real clients: {found.tps_system:.1f} tokens/s", flush=True)
    return {
        "clients": str(clients),
        "threads of each": str(client_threads(clients)),
        "TPS (system)": f"{found.tps_system:.1f}",
        "TPOT, mean, ms": _ms([found.tpot.mean_s or 0.0]),
        "TTFT, mean, ms": _ms([found.ttft.mean_s or 0.0]),
        "not answered": str(found.offered - found.done),
    }


def _ms(seconds: Iterable[float]) -> str:
    """The median in milliseconds."""
    values = list(seconds)
    return f"{median(values) * 1e3:.1f}" if values else "none"

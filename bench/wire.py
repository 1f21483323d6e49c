"""The wire's share of a step, against echo servers that get the same bytes in the same run.

After the client's bottom, each decode step is sent to the trunk and to two echo servers (bench/echo.py), in random
order. An echo server holds a message for as long as the trunk computes.
"""

import random
from collections.abc import Mapping
from contextlib import ExitStack, closing
from statistics import fmean, median

import torch

from bench.echo import READS, SLEEPS, Echo
from bench.report import write
from splitlearn.arms.compare import environment
from splitlearn.arms.runs import Runs
from splitlearn.client.remote_stage import RemoteStage
from splitlearn.flags.registry import settings
from splitlearn.generation.chain import Chain, Step
from splitlearn.generation.tokenizer import Tokens
from splitlearn.lab.stats import effect
from splitlearn.stages import loading

ROUNDS = 12
STEPS = 64
FLAGS = "low_cpu_mem_usage,inference_mode,use_cache,output_attentions,output_hidden_states"
TRUNK = "trunk"
ECHOES = (SLEEPS, READS)
PROMPT = "What is the capital of France?"


def main(runs: Runs) -> None:
    """Measure and write docs/results/wire.md."""
    with ExitStack() as stack:
        echoes = {name: stack.enter_context(closing(Echo(name))) for name in ECHOES}
        rounds = [_round(runs, echoes, random.Random(number)) for number in range(ROUNDS)]
    wires = [found[TRUNK] for found in rounds]
    rows = [
        {
            "echo server": name,
            "wire of the trunk, ms": f"{fmean(wires) * 1e3:.3f}",
            "echo, ms": f"{fmean(found[name] for found in rounds) * 1e3:.3f}",
            "ratio": effect(wires, [found[name] for found in rounds]),
        }
        for name in ECHOES
    ]
    text = f"Medians per step of {ROUNDS} rounds of {STEPS} decoded tokens; ratio of the rounds with its 95% interval."
    write("wire", "The wire against an echo server", text, rows, environment(runs))


def _round(runs: Runs, echoes: Mapping[str, Echo], order: random.Random) -> dict[str, float]:
    """The median wire and echo times of one generation's steps, in seconds."""
    flags = runs.flags(FLAGS)
    spec = runs.ready_spec("split", flags)
    client, at_trunk = settings(flags.client), settings(flags.trunk)
    loading.prepare_process(client.process, spec.threads)
    placement = loading.Placement.of(spec.device, spec.dtype)
    bottom, *rest = loading.load(spec.files, loading.client_specs(spec.plan), client.load, placement).chain
    trunk = RemoteStage(spec.hops[0].addresses, spec.served(), spec.timeout_s)
    stages = [bottom, trunk, *rest]
    sessions = [stage.open(at_trunk.session if stage is trunk else client.session, 256) for stage in stages]
    chain = Chain(sessions, 0)
    ids = Tokens.load(spec.files.folder, use_fast=True).encode(PROMPT, chat=True)
    found: dict[str, list[float]] = {name: [] for name in (TRUNK, *ECHOES)}
    position, held = 0, 0.05
    for _ in range(STEPS):
        step = Step(0, chain, position, torch.tensor([ids[position:]]))
        x = bottom.step([step.item(0, step.ids)])[0].x
        position = len(ids)
        for name in order.sample(list(found), len(found)):
            if name == TRUNK:
                output = trunk.step([step.item(1, x)])[0]
                found[TRUNK].append(output.timing.ledger["wire"])
            else:
                data = x[:, -1:].contiguous().numpy().tobytes()
                found[name].append(echoes[name].step(held, data))
        held = output.timing.ledger["trunk"]
        x = output.x
        for at, stage in enumerate(rest, 2):
            x = stage.step([step.item(at, x)])[0].x
        ids.append(int(x[0, -1].argmax()))
    sessions[1].close()
    trunk.close()
    return {name: median(times[1:]) for name, times in found.items()}

"""The ladder of an article about JAX: 50 tokens with a dynamic cache, with a static cache, and with a static cache and
JIT, each in JAX.

The first two run the model eagerly through torchax, one operation after the other; JAX compiles each operation for each
new shape. The third is the engine `jax` (splitlearn/engines/jax_stage.py). Every run has a process of its own, which
generates twice: the first time includes all compiling, the second none that the first has done.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from statistics import median

import torch
from torch.utils.dlpack import from_dlpack

from bench import pairs
from bench.overhead import PROMPT
from bench.report import write
from splitlearn.arms.compare import environment
from splitlearn.arms.runs import Runs
from splitlearn.arms.spec import ArmSpec
from splitlearn.checkpoints.folder import ModelFiles
from splitlearn.generation.tokenizer import Tokens
from splitlearn.lab.published_claims import JAX_LADDER_S
from splitlearn.lab.stats import effect
from splitlearn.runtime import process
from splitlearn.stages import loading
from splitlearn.stages.base import StageInput
from splitlearn.stages.engine import EagerEngine
from splitlearn.stages.settings import LoadSettings
from splitlearn.wire.codec import DTYPES

BLOCKS = 12
TOKENS = 50
DYNAMIC, STATIC, JIT = JAX_LADDER_S
STEPS = ((STATIC, DYNAMIC), (JIT, STATIC), (JIT, DYNAMIC))
Step = Callable[[torch.Tensor, int], torch.Tensor]


@dataclass(frozen=True)
class Ladder:
    """One process: the ids of its second answer, and the seconds of both answers."""

    token_ids: tuple[int, ...]
    first_s: float
    again_s: float


def main(runs: Runs, blocks: int = BLOCKS) -> None:
    """Measure and write docs/results/jax_ladder.md."""
    spec = runs.spec("full", runs.flags("low_cpu_mem_usage"))
    found = _measure(spec, blocks)
    rows = [_row(found, name, baseline) for name, baseline in STEPS]
    text = (
        f"Seconds for {TOKENS} tokens after a prompt of a few, greedy, in float32: medians of {blocks} blocks, and "
        "geometric mean ratios with 95% intervals, the arms in random order within each block. First: the first answer "
        "of a process, with all that it compiles. Again: the second answer of the same process. Published: another "
        "model on another machine, one run each; its ratio is what can be compared."
    )
    write("jax_ladder", "JAX: dynamic cache, static cache, JIT", text, rows, environment(runs))


def _measure(spec: ArmSpec, count: int) -> dict[str, list[Ladder]]:
    def run(name: str) -> Callable[[], Ladder]:
        return lambda: _in_process(spec, name)

    return pairs.blocks({name: run(name) for name in JAX_LADDER_S}, count)


def _row(found: dict[str, list[Ladder]], name: str, baseline: str) -> dict[str, str]:
    ours, theirs = found[name], found[baseline]
    same = all(one.token_ids == other.token_ids for one, other in zip(ours, theirs, strict=True))
    row = {"ratio": f"{name} / {baseline}"}
    for label, key in (("first", "first_s"), ("again", "again_s")):
        own, other = ([float(getattr(run, key)) for run in runs] for runs in (ours, theirs))
        row[f"{label}, s"] = f"{median(own):.2f} / {median(other):.2f}"
        row[label] = str(effect(own, other))
    published = JAX_LADDER_S[name] / JAX_LADDER_S[baseline]
    row["published, s"] = f"{JAX_LADDER_S[name]} / {JAX_LADDER_S[baseline]}"
    return row | {"published": f"{published:.3f}", "token ids": "identical" if same else "differ"}


def _in_process(spec: ArmSpec, name: str) -> Ladder:
    child = process.start(f"The worker process of {name}", _main, spec, name)
    try:
        found: Ladder = child.receive()
        return found
    finally:
        child.stop()


def _main(connection: Connection, spec: ArmSpec, name: str) -> None:
    loading.prepare_process(frozenset(), spec.threads)
    placement = loading.Placement(torch.device("cpu"), DTYPES[spec.dtype])
    specs = loading.full_specs(spec.files.n_layers)
    (stage,) = loading.load(spec.files, specs, LoadSettings(assign_weights=True), placement).stages
    ids = Tokens.load(spec.files.folder, use_fast=True).encode(PROMPT, chat=False)
    assert isinstance(stage.eager, EagerEngine)  # no other was asked for
    make = _arm(stage.eager, spec.files, name)
    answers, seconds = [], []
    for _ in range(2):
        began = time.perf_counter()
        answers.append(_generate(make(len(ids) + TOKENS), ids))
        seconds.append(time.perf_counter() - began)
    connection.send(Ladder(answers[1], *seconds))
    connection.recv()  # stay until the parent has it


def _generate(step: Step, ids: list[int]) -> tuple[int, ...]:
    found, x, position = list[int](), torch.tensor([ids]), 0
    while len(found) < TOKENS:
        found.append(int(step(x, position)[0, -1].argmax()))
        position, x = position + x.shape[1], torch.tensor([found[-1:]])
    return tuple(found)


def _arm(eager: EagerEngine, files: ModelFiles, name: str) -> Callable[[int], Step]:
    """Makes the function that computes the steps of one answer of at most so many tokens."""
    import jax.numpy as jnp  # in the worker alone: a process that forks must not have it
    import numpy as np
    from transformers.cache_utils import DynamicCache

    from splitlearn.engines.jax_stage import of, pure_step, torchax, with_weights
    from splitlearn.models.cut import forward

    engine = of(eager, files)
    xla = torchax.default_env()

    def dynamic(longest: int) -> Step:
        cut, cache = with_weights(engine.cut, xla.j2t_iso(dict(engine.weights))), DynamicCache()

        def step(x: torch.Tensor, position: int) -> torch.Tensor:
            with torch.no_grad(), xla:
                out = forward(cut, xla.j2t_iso(jnp.asarray(x.int().numpy())), position, cache, logits_to_keep=1)
            return from_dlpack(xla.t2j_iso(out))

        return step

    def static(longest: int) -> Step:
        cache = engine.new_cache(longest)

        def step(x: torch.Tensor, position: int) -> torch.Tensor:
            rows = jnp.asarray(np.int32(position)), jnp.asarray(np.int32(x.shape[1]))
            arguments = engine.weights, cache.states, jnp.asarray(x.int().numpy()), *rows
            out, cache.states = pure_step(engine.cut, 1, *arguments)
            return from_dlpack(out)

        return step

    def jit(longest: int) -> Step:
        session = _Session(engine.new_cache(longest))
        return lambda x, position: engine.compute(StageInput(session, position, x))

    return {DYNAMIC: dynamic, STATIC: static, JIT: jit}[name]


@dataclass
class _Session:
    """What a step needs of a session."""

    cache: object

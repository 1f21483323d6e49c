"""The ladder of an article about JAX: a dynamic cache, a static cache, a static cache and JIT.

The first two run the model eagerly through torchax, one operation after the other. JAX compiles each operation for each
new shape: with a dynamic cache anew at every token. The third is the engine `jax` (splitlearn/engines/jax_stage.py).

An arm is a process that stays. For each block it forgets what JAX has compiled, and generates twice: the first answer
includes all compiling, the second what is left without. An eager answer has EAGER tokens, and what TOKENS would take
is reckoned from its gaps after the second token; the jitted one has them all.
"""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from statistics import median

import torch
from torch.utils.dlpack import from_dlpack

from bench.overhead import PROMPT
from bench.pairs import blocks as in_blocks
from bench.report import write
from splitlearn.arms.compare import environment
from splitlearn.arms.runs import Runs
from splitlearn.arms.spec import ArmSpec
from splitlearn.checkpoints.folder import ModelFiles
from splitlearn.generation.tokenizer import Tokens
from splitlearn.lab.stats import effect
from splitlearn.runtime import process
from splitlearn.stages import loading
from splitlearn.stages.base import StageInput
from splitlearn.stages.engine import EagerEngine
from splitlearn.stages.settings import LoadSettings
from splitlearn.wire.codec import DTYPES

BLOCKS, THREADS = 12, 1
TOKENS, EAGER = 50, 6
DYNAMIC, STATIC, JIT = "dynamic cache, eager", "static cache, eager", "static cache, JIT"
PUBLISHED_S = {DYNAMIC: 130.9, STATIC: 88.4, JIT: 14.8}
"""Seconds for TOKENS."""
STEPS = ((STATIC, DYNAMIC), (JIT, STATIC), (JIT, DYNAMIC))
Step = Callable[[torch.Tensor, int], torch.Tensor]


@dataclass(frozen=True)
class Answer:
    """Greedy ids, and when each was there, in seconds from the start."""

    token_ids: tuple[int, ...]
    at_s: tuple[float, ...]

    @property
    def tpot_s(self) -> float:
        """Seconds between tokens, after the second: until then programs for one token are compiled."""
        return (self.at_s[-1] - self.at_s[1]) / (len(self.at_s) - 2)

    @property
    def whole_s(self) -> float:
        """Seconds for TOKENS."""
        return self.at_s[1] + (TOKENS - 2) * self.tpot_s


Run = tuple[Answer, Answer]
"""The first answer, and another one with what that has compiled."""


def main(runs: Runs, blocks: int = BLOCKS) -> None:
    """Measure and write docs/results/jax_ladder.md."""
    load = os.getloadavg()[0]
    spec = runs.spec("full", runs.flags("low_cpu_mem_usage"))
    with ExitStack() as stack:
        children = {name: process.start(f"The process of {name}", _main, spec, name) for name in PUBLISHED_S}
        for child in children.values():
            stack.callback(child.stop)
        found = in_blocks({name: partial(_asked, child) for name, child in children.items()}, blocks)
    text = (
        f"Greedy answers to a prompt of a few tokens, float32, {THREADS} thread in each process, {blocks} blocks in "
        "random order; medians, and geometric mean ratios with 95% intervals. *First* is an answer with all that it "
        "compiles, *again* the next one of the same process, which compiles nothing. Seconds are those for "
        f"{TOKENS} tokens: measured with JIT; of the eager arms {EAGER} tokens are measured, and the gaps after the "
        "second stand for the rest. *A token* is such a gap, of the second answers. *Published* is another model on "
        "another machine, one run each: only its ratios can be compared. The machine's load average was "
        f"{load:.1f} when this began, and {os.getloadavg()[0]:.1f} at its end."
    )
    write("jax_ladder", "JAX: dynamic cache, static cache, JIT", text, [*_rows(found)], environment(runs))


def _rows(found: dict[str, list[Run]]) -> Iterator[dict[str, str]]:
    for name, baseline in STEPS:
        row = {"ratio": f"{name} / {baseline}"}
        for label, which, key in (("first", 0, "whole_s"), ("again", 1, "whole_s"), ("a token", 1, "tpot_s")):
            own, other = ([float(getattr(run[which], key)) for run in found[arm]] for arm in (name, baseline))
            row[f"{label}, s"] = f"{median(own):.3g} / {median(other):.3g}"
            row[label] = str(effect(own, other))
        row["published, s"] = f"{PUBLISHED_S[name]} / {PUBLISHED_S[baseline]}"
        row["published"] = f"{PUBLISHED_S[name] / PUBLISHED_S[baseline]:.3f}"
        heads = {answer.token_ids[:EAGER] for arm in (name, baseline) for run in found[arm] for answer in run}
        yield row | {"token ids": "identical" if len(heads) == 1 else "differ"}


def _asked(child: process.Child) -> Run:
    child.send("next")
    found: Run = child.receive()
    return found


def _main(connection: Connection, spec: ArmSpec, name: str) -> None:
    """The process of an arm: a run for each message, until the pipe is closed."""
    import jax  # in this process alone: one that forks must not have it

    loading.prepare_process(frozenset(), THREADS)
    jax.config.update("jax_enable_compilation_cache", False)
    placement = loading.Placement(torch.device("cpu"), DTYPES[spec.dtype])
    specs = loading.full_specs(spec.files.n_layers)
    (stage,) = loading.load(spec.files, specs, LoadSettings(assign_weights=True), placement).stages
    ids = Tokens.load(spec.files.folder, use_fast=True).encode(PROMPT, chat=False)
    assert isinstance(stage.eager, EagerEngine)  # no other was asked for
    count = TOKENS if name == JIT else EAGER
    with closing(connection):
        while connection.recv():
            jax.clear_caches()
            make = _arm(stage.eager, spec.files, name)
            connection.send(tuple(_generate(make(len(ids) + TOKENS), ids, count) for _ in range(2)))


def _generate(step: Step, ids: list[int], count: int) -> Answer:
    began, found, at = time.perf_counter(), list[int](), list[float]()
    x, position = torch.tensor([ids]), 0
    while len(found) < count:
        found.append(int(step(x, position)[0, -1].argmax()))
        at.append(time.perf_counter() - began)
        position, x = position + x.shape[1], torch.tensor([found[-1:]])
    return Answer(tuple(found), tuple(at))


def _arm(eager: EagerEngine, files: ModelFiles, name: str) -> Callable[[int], Step]:
    """Makes the function that computes the steps of one answer of at most so many tokens."""
    import jax.numpy as jnp
    import numpy as np
    from transformers.cache_utils import DynamicCache

    from splitlearn.engines.jax_stage import of, pure_step, torchax, with_weights
    from splitlearn.models.cut import forward

    engine, xla = of(eager, files), torchax.default_env()

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

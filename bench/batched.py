"""The baseline of a trunk server's step: the trunk's layers as a plain batched forward in a worker process.

It uses transformers' own batch dimension and DynamicCache, with sequences of equal length and no padding. The worker
can also run one sequence through LocalStage, as a stage does for a single client.
"""

import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from statistics import median
from typing import Protocol

import torch
from transformers.cache_utils import DynamicCache

from splitlearn.arms.spec import ArmSpec
from splitlearn.flags.registry import settings
from splitlearn.models.cut import forward
from splitlearn.runtime import process
from splitlearn.stages import loading
from splitlearn.stages.base import StageInput
from splitlearn.stages.local import LocalStage
from splitlearn.stages.settings import SessionSettings
from splitlearn.wire.hidden_states import Plain

WARM_UP = 2
"""Untimed steps before the timed ones."""


@dataclass(frozen=True)
class Contexts:
    """Hidden states that fill the caches. `data` are the raw values of [1, T, H]: each sequence is prefilled with the
    first `length`, and each step takes the next one. `sizes` are the batch sizes to prepare."""

    data: bytes
    length: int
    sizes: tuple[int, ...]


@dataclass(frozen=True)
class Run:
    """Times of sequences that decoded concurrently, in seconds per step.

    `tpot_s` is measured by the clients. `trunk_s` is the layers' own time for a step with all sequences in it, or None
    if there was none. `whole` is the share of such steps.
    """

    trunk_s: float | None
    whole: float
    tpot_s: float


class Batched:
    """The worker process. `run(n, steps)` decodes n sequences from the same context; n = 0 is one through
    LocalStage."""

    def __init__(self, spec: ArmSpec, contexts: Contexts) -> None:
        self._child = process.start("The plain batched forward's worker process", _main, spec, contexts)

    def run(self, sequences: int, steps: int) -> Run:
        """Take `steps` steps and return the median time of one."""
        self._child.send((sequences, steps))
        step_s: float = self._child.receive()
        return Run(step_s, 1.0, step_s)

    def stop(self) -> None:
        """End the worker."""
        self._child.stop()


def _main(connection: Connection, spec: ArmSpec, contexts: Contexts) -> None:
    own = settings(spec.flags.trunk)
    loading.prepare_process(own.process, spec.threads)
    placement = loading.Placement.of(spec.device, spec.dtype)
    stage = loading.load(spec.files, loading.trunk_specs(spec.plan), own.load, placement).stages[0]
    states = Plain(placement.dtype).from_bytes(contexts.data, spec.files.facts.hidden_size)
    with torch.inference_mode():
        arms: dict[int, _Sequences] = {n: _Plain(stage, states, contexts.length, n) for n in contexts.sizes}
        arms[0] = _Unbatched(stage, states, contexts.length, own.session)
        while True:
            n, steps = connection.recv()
            connection.send(_median_s(arms[n], steps))


class _Sequences(Protocol):
    def step(self, index: int) -> None:
        """Take step number `index` after the context."""

    def rewind(self, steps: int) -> None:
        """Drop the last `steps` steps from the cache."""


class _Plain:
    """`n` sequences of `length` tokens in one batch."""

    def __init__(self, stage: LocalStage, states: torch.Tensor, length: int, n: int) -> None:
        self._cut, self._states, self._length = stage.cut, states.expand(n, -1, -1), length
        self._cache = DynamicCache()
        forward(self._cut, self._states[:, :length], 0, self._cache)

    def step(self, index: int) -> None:
        at = self._length + index
        forward(self._cut, self._states[:, at : at + 1], at, self._cache)

    def rewind(self, steps: int) -> None:
        self._cache.crop(-steps)


class _Unbatched:
    """One sequence through LocalStage."""

    def __init__(self, stage: LocalStage, states: torch.Tensor, length: int, settings: SessionSettings) -> None:
        self._stage, self._states, self._length = stage, states, length
        self._session = stage.open(settings, states.shape[1])
        stage.step([StageInput(self._session, 0, states[:, :length])])

    def step(self, index: int) -> None:
        at = self._length + index
        self._stage.step([StageInput(self._session, at, self._states[:, at : at + 1])])

    def rewind(self, steps: int) -> None:
        return  # a step at a lower position truncates the session


def _median_s(sequences: _Sequences, steps: int) -> float:
    """The median time of a step, without the warm-up."""
    times = []
    for index in range(steps + WARM_UP):
        started = time.perf_counter()
        sequences.step(index)
        times.append(time.perf_counter() - started)
    sequences.rewind(len(times))
    return median(times[WARM_UP:])

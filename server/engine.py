"""What runs the steps: one process for each set of load and process flags, so that what a flag changes for a whole
process, and its memory, stay in that process.

`Engine` is the front's handle on such a process. The process takes one call at a time, in the order they came; a call
waits for its turn at the handle's lock.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch

from splitlearn import loading, process
from splitlearn.errors import InputError, SplitlearnError, TrunkFull, as_error
from splitlearn.flags import of_scope
from splitlearn.split import SplitPlan
from splitlearn.stages import LocalSession, LocalStage, StageInput
from splitlearn.store import ModelFiles
from splitlearn.wire import codec


@dataclass(frozen=True)
class EngineSpec:
    """What an engine process loads."""

    files: ModelFiles
    plan: SplitPlan
    placement: loading.Placement
    threads: int | None
    applied: frozenset[str]


@dataclass(frozen=True)
class EngineFacts:
    """What an engine process says of itself once it has loaded."""

    threads: int
    load_s: float
    import_rss_bytes: int


@dataclass(frozen=True)
class EngineStep:
    """The answer to a step: raw values [T, H], and the durations in seconds of what the process did."""

    data: bytes
    decode_s: float
    trunk_s: float
    encode_s: float
    compile_s: float


class Engine:
    """A running engine process. `sessions` counts those that are open."""

    def __init__(self, spec: EngineSpec) -> None:
        self._lock = threading.Lock()
        self._child = process.start("The trunk's engine process", _main, spec)
        self.sessions = 0
        self.facts: EngineFacts = _result(self._child.receive())

    def call(self, name: str, *arguments: object) -> Any:
        """Have the process do one thing; raises what it raised, or WorkerDied when it is gone."""
        with self._lock:
            self._child.send((name, arguments))
            return _result(self._child.receive())

    def alive(self) -> bool:
        """True while the process runs."""
        return self._child.alive()

    def stop(self) -> None:
        """End the process."""
        self._child.stop()


class EnginePool:
    """The engines that are running, at most `limit`. An idle one makes room for another set of flags."""

    def __init__(self, spec: Callable[[frozenset[str]], EngineSpec], limit: int) -> None:
        self._spec = spec
        self._limit = limit
        self._lock = threading.Lock()
        self._engines: dict[frozenset[str], Engine] = {}

    def take(self, applied: frozenset[str]) -> Engine:
        """The engine for the load and process flags of `applied`, with one session more. Raises TrunkFull."""
        key = of_scope(applied, "load", "process")
        with self._lock:
            engine = self._engines.pop(key, None)
            if engine is None or not engine.alive():
                self._make_room()
                engine = Engine(self._spec(key))
            self._engines[key] = engine  # at the end: the least recently used one is first
            engine.sessions += 1
            return engine

    def give_back(self, engine: Engine) -> None:
        """One session less."""
        with self._lock:
            engine.sessions -= 1

    def stop(self) -> None:
        """End all engines."""
        with self._lock:
            for engine in self._engines.values():
                engine.stop()
            self._engines.clear()

    def _make_room(self) -> None:
        if len(self._engines) < self._limit:
            return
        idle = next((key for key, engine in self._engines.items() if engine.sessions == 0), None)
        if idle is None:
            raise TrunkFull(
                f"all {self._limit} engine processes (server.max_engines) serve other flags; try again later"
            )
        self._engines.pop(idle).stop()


def _result(answer: object) -> Any:
    """An answer of the process, raised if it is an error."""
    if isinstance(answer, SplitlearnError):
        raise answer
    return answer


class _Sessions:
    """The engine process's side: the stage and the sessions at it."""

    def __init__(self, stage: LocalStage, dtype: torch.dtype, hidden_size: int) -> None:
        self._stage = stage
        self._dtype = dtype
        self._hidden_size = hidden_size
        self._open: dict[int, LocalSession] = {}

    def open(self, number: int, applied: frozenset[str], max_length: int) -> None:
        self._open[number] = self._stage.open(applied, max_length)

    def step(self, number: int, position: int, data: bytes, roll_back: bool) -> EngineStep:
        session = self._open[number]
        if not session.recomputes and position < session.length and not roll_back:
            raise InputError("position", position, f"{session.length}, or roll_back to go back from there")
        started = time.perf_counter()
        x = codec.from_bytes(data, self._dtype, self._hidden_size)
        decoded = time.perf_counter()
        output = self._stage.step([StageInput(session, position, x)])[0]
        computed = time.perf_counter()
        raw = codec.to_bytes(output.x)
        done = time.perf_counter()
        return EngineStep(raw, decoded - started, computed - decoded, done - computed, output.timing.compile_s)

    def close(self, number: int) -> None:
        session = self._open.pop(number, None)
        if session is not None:
            session.close()

    def peak(self) -> int:
        return process.peak_resident_bytes()


def _main(connection: Connection, spec: EngineSpec) -> None:
    """The engine process: load, say so, then answer calls until the front closes the pipe."""
    try:
        threads = loading.prepare_process(spec.applied, spec.threads)
        loaded = loading.load(spec.files, loading.trunk_specs(spec.plan), spec.applied, spec.placement)
    except Exception as error:
        connection.send(as_error(error, "loading the trunk"))
        return
    connection.send(EngineFacts(threads, loaded.load_s, loaded.import_rss_bytes))
    sessions = _Sessions(loaded.stages[0], spec.placement.dtype, spec.files.facts.hidden_size)
    while True:
        name, arguments = connection.recv()
        try:
            connection.send(getattr(sessions, name)(*arguments))
        except Exception as error:  # the session fails with its cause; the other sessions of the process go on
            connection.send(as_error(error, "computing"))

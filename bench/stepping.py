"""Many sessions at one trunk, each a thread that sends recorded hidden states step by step: what a step took the trunk,
and what its client saw."""

import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from statistics import fmean, median

import torch

from bench.batched import WARM_UP, Run
from splitlearn.remote import RemoteSession, RemoteStage
from splitlearn.stages import StageInput


@dataclass(frozen=True)
class Trunk:
    """A connection, the flags of its sessions, and the hidden states [1, T, H] that they send."""

    stage: RemoteStage
    applied: frozenset[str]
    states: torch.Tensor


@dataclass
class Seen:
    """One session's single-token steps: when each answer came, and the trunk's own time for it, in seconds."""

    answered: list[float] = field(default_factory=list)
    trunk_s: list[float] = field(default_factory=list)

    def intervals(self) -> list[float]:
        """Seconds between one answer and the next."""
        return [after - before for before, after in zip(self.answered, self.answered[1:], strict=False)]


def mixed(count: int, mean: int) -> list[int]:
    """`count` lengths from a fifth to nine fifths of `mean`, in pairs of the mean: together they are count * mean."""
    shifts = [round(0.8 * mean * (index + 1) / (count // 2)) for index in range(count // 2)]
    return [mean] * (count % 2) + [length for shift in shifts for length in (mean - shift, mean + shift)]


def side_by_side(trunk: Trunk, lengths: Sequence[int], steps: int) -> Run:
    """One session for each of `lengths`; once all have their prompts, each makes `steps` steps as fast as it can."""
    with ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(len(lengths)))
        sessions = list(pool.map(lambda length: _opened(trunk, length, steps + WARM_UP), lengths))
        for session in sessions:
            stack.callback(session.close)
        list(pool.map(lambda each: _step(trunk, each[0], 0, each[1]), zip(sessions, lengths, strict=True)))
        walks = [Walk(trunk, *each) for each in zip(sessions, lengths, strict=True)]
        list(pool.map(lambda walk: walk.go(steps + WARM_UP), walks))
    return _run([walk.seen for walk in walks])


class Walk:
    """A session with its prompt at the trunk, one token further at each step."""

    def __init__(self, trunk: Trunk, session: RemoteSession, length: int) -> None:
        self._trunk, self._session, self._position = trunk, session, length
        self.seen = Seen()

    def go(self, steps: int) -> None:
        """So many steps, each as soon as the one before is answered."""
        for _ in range(steps):
            self.seen.trunk_s.append(_step(self._trunk, self._session, self._position, 1))
            self.seen.answered.append(time.perf_counter())
            self._position += 1

    def until(self, stop: threading.Event) -> None:
        """Steps until `stop` is set."""
        while not stop.is_set():
            self.go(1)


@dataclass(frozen=True)
class Admission:
    """What a long prompt did to sessions that were decoding: their TPOT before it and while it was admitted, their
    longest wait for one token meanwhile, and how long it took itself, in seconds."""

    before_s: float
    during_s: float
    longest_s: float
    prompt_s: float


def admission(trunk: Trunk, lengths: Sequence[int], prompt: int, steps: int) -> Admission:
    """Sessions of `lengths` decode; after `steps` steps a prompt of `prompt` tokens comes, and when it is answered they
    end."""
    room = trunk.states.shape[1] - max(lengths)
    stop = threading.Event()
    with ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(len(lengths)))
        walks = []
        for length in lengths:
            session = _opened(trunk, length, room)
            stack.callback(session.close)
            _step(trunk, session, 0, length)
            walks.append(Walk(trunk, session, length))
        stack.callback(stop.set)
        running = [pool.submit(walk.until, stop) for walk in walks]
        while min(len(walk.seen.answered) for walk in walks) < steps + WARM_UP:
            time.sleep(0.05)
        long = _opened(trunk, prompt, 1)
        stack.callback(long.close)
        began = time.perf_counter()
        _step(trunk, long, 0, prompt)
        ended = time.perf_counter()
        stop.set()
        for each in running:
            each.result()
    found = [_split(walk.seen, began, ended) for walk in walks]
    longest = max(interval for _, during in found for interval in during)
    before, during = (median(fmean(values) for values in side) for side in zip(*found, strict=True))
    return Admission(before, during, longest, ended - began)


def _split(seen: Seen, began: float, ended: float) -> tuple[list[float], list[float]]:
    """The intervals that were over before `began`, and those that have a part of the time up to `ended`."""
    before, during = [], []
    for start, end in zip(seen.answered[WARM_UP:], seen.answered[WARM_UP + 1 :], strict=False):
        if end <= began:
            before.append(end - start)
        elif start < ended:
            during.append(end - start)
    return before, during


def _opened(trunk: Trunk, length: int, more: int) -> RemoteSession:
    return trunk.stage.open(trunk.applied, length + more)


def _step(trunk: Trunk, session: RemoteSession, position: int, tokens: int) -> float:
    """One step; the seconds that the trunk says it computed."""
    x = trunk.states[:, position : position + tokens]
    (output,) = trunk.stage.step([StageInput(session, position, x)])
    return output.timing.ledger["trunk"]


def _run(seen: Sequence[Seen]) -> Run:
    """A forward has one duration, which the trunk tells to each session in it: as many equal ones as there are sessions
    are a step that carried all."""
    told = [value for each in seen for value in each.trunk_s[WARM_UP:]]
    whole = [value for value, count in Counter(told).items() if count >= len(seen)]
    tpot = median(fmean(each.intervals()[WARM_UP:]) for each in seen)
    return Run(median(whole) if whole else None, len(whole) * len(seen) / len(told), tpot)

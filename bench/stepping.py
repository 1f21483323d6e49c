"""Many sessions at one trunk, each a thread that sends recorded hidden states step by step: what a step took the trunk,
and what its client saw."""

import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from statistics import fmean, median

import torch

from bench.batched import WARM_UP, Run
from splitlearn.arms.spec import ArmSpec
from splitlearn.loadtest.replay import Sender

POLL_S = 0.05


@dataclass(frozen=True)
class Trunk:
    """The trunk of `spec`, and the hidden states [1, T, H] that sessions send it."""

    spec: ArmSpec
    states: torch.Tensor


@dataclass
class StepTimes:
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


class Walk:
    """A session with a connection of its own: first its prompt, then one token further at each step."""

    def __init__(self, trunk: Trunk, length: int, more: int) -> None:
        self._states, self._position = trunk.states, 0
        self._sender = Sender(trunk.spec)
        self._stream = self._sender.open(length + more)
        self.times = StepTimes()

    def prompt(self, tokens: int) -> None:
        """The first `tokens` positions in one step."""
        self._step(tokens)

    def go(self, steps: int) -> None:
        """So many steps, each as soon as the one before is answered."""
        for _ in range(steps):
            self.times.trunk_s.append(self._step(1))
            self.times.answered.append(time.perf_counter())

    def until(self, stop: threading.Event) -> None:
        """Steps until `stop` is set."""
        while not stop.is_set():
            self.go(1)

    def close(self) -> None:
        """End the session and its connection."""
        self._sender.end(self._stream)
        self._sender.close()

    def _step(self, tokens: int) -> float:
        """The seconds that the trunk says it computed."""
        x = self._states[:, self._position : self._position + tokens]
        output = self._stream.step(self._position, x, self._sender.wait_s)
        self._position += tokens
        return output.timing.ledger["trunk"]


@contextmanager
def walks(trunk: Trunk, lengths: Sequence[int], more: int) -> Iterator[tuple[ThreadPoolExecutor, list[Walk]]]:
    """For each of `lengths` a thread, and a session with its prompt at the trunk and room for `more` tokens."""
    with ExitStack() as stack:
        made: list[Walk] = []
        for length in lengths:
            made.append(Walk(trunk, length, more))
            stack.callback(made[-1].close)
        pool = stack.enter_context(ThreadPoolExecutor(len(lengths)))  # its threads end before their sessions
        list(pool.map(lambda walk, length: walk.prompt(length), made, lengths))
        yield pool, made


def side_by_side(trunk: Trunk, lengths: Sequence[int], steps: int) -> Run:
    """One session for each of `lengths`; once all have their prompts, each makes `steps` steps as fast as it can."""
    with walks(trunk, lengths, steps + WARM_UP) as (pool, made):
        list(pool.map(lambda walk: walk.go(steps + WARM_UP), made))
    return run_of([walk.times for walk in made])


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
    stop = threading.Event()
    with walks(trunk, lengths, trunk.states.shape[1] - max(lengths)) as (pool, made):
        running = [pool.submit(walk.until, stop) for walk in made]
        try:
            while min(len(walk.times.answered) for walk in made) < steps + WARM_UP and not any(
                each.done() for each in running
            ):
                time.sleep(POLL_S)
            with closing(Walk(trunk, prompt, 1)) as long:
                began = time.perf_counter()
                long.prompt(prompt)
                ended = time.perf_counter()
        finally:
            stop.set()
        for each in running:
            each.result()
    found = [split(walk.times, began, ended) for walk in made]
    longest = max(interval for _, during in found for interval in during)
    before, during = (median(fmean(values) for values in side) for side in zip(*found, strict=True))
    return Admission(before, during, longest, ended - began)


def split(times: StepTimes, began: float, ended: float) -> tuple[list[float], list[float]]:
    """The intervals that were over before `began`, and those that have a part of the time up to `ended`."""
    before, during = [], []
    for start, end in zip(times.answered[WARM_UP:], times.answered[WARM_UP + 1 :], strict=False):
        if end <= began:
            before.append(end - start)
        elif start < ended:
            during.append(end - start)
    return before, during


def run_of(times: Sequence[StepTimes]) -> Run:
    """A forward has one duration, which the trunk tells to each session in it: as many equal ones as there are sessions
    are a step that carried all."""
    told = Counter(value for each in times for value in set(each.trunk_s[WARM_UP:]))
    whole = [value for value, sessions in told.items() if sessions == len(times)]
    tpot = median(fmean(each.intervals()[WARM_UP:]) for each in times)
    return Run(median(whole) if whole else None, len(whole) * len(times) / told.total(), tpot)

"""Many sessions at one trunk, each a thread that sends recorded hidden states step by step.

Measures the trunk's own time for a step, and the time that its client sees.
"""

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
    """The single-token steps of a session: when each answer came, and the trunk's own time for it, in seconds."""

    answered: list[float] = field(default_factory=list)
    trunk_s: list[float] = field(default_factory=list)

    def intervals(self) -> list[float]:
        """Seconds between one answer and the next."""
        return [after - before for before, after in zip(self.answered, self.answered[1:], strict=False)]


def mixed(count: int, mean: int) -> list[int]:
    """`count` lengths from a fifth to nine fifths of `mean`, whose sum is count * mean."""
    shifts = [round(0.8 * mean * (index + 1) / (count // 2)) for index in range(count // 2)]
    return [mean] * (count % 2) + [length for shift in shifts for length in (mean - shift, mean + shift)]


class Walk:
    """A session with its own connection: first its prompt, then one token a step."""

    def __init__(self, trunk: Trunk, length: int, more: int) -> None:
        self._states, self._position = trunk.states, 0
        self._sender = Sender(trunk.spec)
        self._stream = self._sender.open(length + more)
        self.times = StepTimes()

    def prompt(self, tokens: int) -> float:
        """Send the first `tokens` positions in one step. Returns the trunk's own seconds for it."""
        return self._step(tokens)

    def go(self, steps: int) -> None:
        """Take `steps` steps, each as soon as the one before is answered."""
        for _ in range(steps):
            self.times.trunk_s.append(self._step(1))
            self.times.answered.append(time.perf_counter())

    def until(self, stop: threading.Event) -> None:
        """Take steps until `stop` is set."""
        while not stop.is_set():
            self.go(1)

    def close(self) -> None:
        """End the session and its connection."""
        self._sender.end(self._stream)
        self._sender.close()

    def _step(self, tokens: int) -> float:
        """Take one step. Returns the trunk's own seconds for it."""
        x = self._states[:, self._position : self._position + tokens]
        output = self._stream.step(self._position, x, self._sender.wait_s)
        self._position += tokens
        return output.timing.ledger["trunk"]


@contextmanager
def walks(trunk: Trunk, lengths: Sequence[int], more: int) -> Iterator[tuple[ThreadPoolExecutor, list[Walk]]]:
    """Open a session for each of `lengths`, prefilled to that length, with room for `more` tokens and its own
    thread."""
    with ExitStack() as stack:
        opened: list[Walk] = []
        for length in lengths:
            opened.append(Walk(trunk, length, more))
            stack.callback(opened[-1].close)
        pool = stack.enter_context(ThreadPoolExecutor(len(lengths)))  # its threads end before their sessions
        list(pool.map(lambda walk, length: walk.prompt(length), opened, lengths))
        yield pool, opened


def side_by_side(trunk: Trunk, lengths: Sequence[int], steps: int) -> Run:
    """One session for each of `lengths`. Once all are prefilled, each takes `steps` steps as fast as it can."""
    with walks(trunk, lengths, steps + WARM_UP) as (pool, opened):
        list(pool.map(lambda walk: walk.go(steps + WARM_UP), opened))
    return run_of([walk.times for walk in opened])


@dataclass(frozen=True)
class Admission:
    """Effect of a long prompt on decoding sessions, in seconds: their TPOT before and during its prefill, their longest
    ITL meanwhile, and the time of the prefill itself."""

    before_s: float
    during_s: float
    longest_s: float
    prompt_s: float


def admission(trunk: Trunk, lengths: Sequence[int], prompt: int, steps: int) -> Admission:
    """Sessions of `lengths` decode. After `steps` steps a prompt of `prompt` tokens is sent; they end when it is
    answered."""
    stop = threading.Event()
    with walks(trunk, lengths, trunk.states.shape[1] - max(lengths)) as (pool, opened):
        running = [pool.submit(walk.until, stop) for walk in opened]
        try:
            while min(len(walk.times.answered) for walk in opened) < steps + WARM_UP and not any(
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
    found = [split(walk.times, began, ended) for walk in opened]
    longest = max(interval for _, during in found for interval in during)
    before, during = (median(fmean(values) for values in side) for side in zip(*found, strict=True))
    return Admission(before, during, longest, ended - began)


def split(times: StepTimes, began: float, ended: float) -> tuple[list[float], list[float]]:
    """The intervals that ended by `began`, and those that overlap the time from `began` to `ended`."""
    before, during = [], []
    for start, end in zip(times.answered[WARM_UP:], times.answered[WARM_UP + 1 :], strict=False):
        if end <= began:
            before.append(end - start)
        elif start < ended:
            during.append(end - start)
    return before, during


def run_of(times: Sequence[StepTimes]) -> Run:
    """Combine the times of concurrent sessions.

    The trunk reports a forward's one duration to each session in it. So a duration that all sessions report is that of
    a step with all of them.
    """
    reported = Counter(value for each in times for value in set(each.trunk_s[WARM_UP:]))
    whole = [value for value, sessions in reported.items() if sessions == len(times)]
    tpot = median(fmean(each.intervals()[WARM_UP:]) for each in times)
    return Run(median(whole) if whole else None, len(whole) * len(times) / reported.total(), tpot)

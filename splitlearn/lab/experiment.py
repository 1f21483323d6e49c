"""Runs an experiment: warm-up, blocks in random order, looks at the verdicts, and the decision to stop.

    with Store.create(path, setup) as store:
        for state in Experiment(runs, store).go(): ...

Each block runs every arm once, in an order shuffled anew, on one prompt, to a fixed number of tokens. An interrupted
block (a kill, a cancellation) runs again, since the two runs of a pair must lie close in time; whole blocks stay.
Nothing is yielded while a run is timed, so a page that draws does not disturb it.
"""

import os
import random
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import gettempdir

from filelock import FileLock, Timeout

from splitlearn.arms.runs import ArmReport, Restart, Runs
from splitlearn.checkpoints.catalogue import cache_folder
from splitlearn.config import Config
from splitlearn.errors import InputError, SetupError, SplitlearnError
from splitlearn.events import GenerationRequest
from splitlearn.lab.analysis.findings import Findings, analyse, good_blocks
from splitlearn.lab.design import SAMPLED, Arm
from splitlearn.lab.environment import fingerprint, trunk_pid
from splitlearn.lab.logit_fidelity import changes
from splitlearn.lab.records import Trial
from splitlearn.lab.stats import looks
from splitlearn.lab.store import Store
from splitlearn.runtime.load import Reading, reading
from splitlearn.sampling import SamplingParams

# Warm-up: short runs until two in a row differ in TPOT by less than STABLE, or there were MOST_WARM_UPS.
STABLE = 0.05
MOST_WARM_UPS = 4
WARM_UP_TOKENS = 16
# A block runs again if other programs took more cores than this, or the clock fell below this share.
MOST_OTHERS_CPU = 0.25
LEAST_CLOCK = 0.9
MOST_ATTEMPTS = 3


@dataclass(frozen=True)
class State:
    """The progress of an experiment. `remaining_s` is None before the first block is done."""

    phase: str
    runs: int
    blocks: int
    elapsed_s: float
    remaining_s: float | None
    findings: Findings | None


@contextmanager
def exclusive(config: Config) -> Iterator[None]:
    """Inside, no other experiment of this user runs on this machine: two would measure each other."""
    try:
        with FileLock(_lock_file(config), thread_local=False).acquire(blocking=False):
            yield
    except Timeout:
        raise SetupError(
            "Another experiment is running on this machine; two at once would measure each other."
        ) from None


def _lock_file(config: Config) -> Path:
    """A file in the cache folder, or among temporary files if that cannot be written."""
    folder = cache_folder(config.model)
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    if os.access(folder, os.W_OK):
        return folder / "lab.lock"
    return Path(gettempdir()) / f"splitlearn-lab-{os.getuid()}.lock"


class Experiment:
    """One experiment on `runs`, kept in `store`. Setting `stop` ends it after the current run."""

    def __init__(self, runs: Runs, store: Store, stop: threading.Event | None = None) -> None:
        self.runs, self.store, self.setup = runs, store, store.setup
        self.stop = stop or threading.Event()
        self._looks = (self.setup.pairs,) if self.setup.pairs else looks(self.setup.max_pairs)
        self._began = self._measuring_since = time.monotonic()
        self._block_s: list[float] = []
        self._findings: Findings | None = None
        self._failed: dict[str, str] = {}

    def go(self) -> Iterator[State]:
        """Run until finished or stopped. Raises InputError for settings that no arm can run."""
        if self.store.finished:
            raise InputError("--resume", str(self.store.path), "an experiment that has not finished")
        digest = self.setup.environment["digest"]
        if digest != self.runs.files.digest:
            raise InputError(
                "model.name", self.runs.files.name, f"the model of the experiment, with digest {digest[:12]}"
            )
        self._discard_interrupted()
        self.store.note(f"environment {time.time():.0f}", fingerprint(self.runs))
        yield from self._warm_up()
        self._measuring_since = time.monotonic()
        while (reason := self._reason()) is None and not self.stop.is_set():
            yield from self._block()
        if reason is not None:
            yield from self._fidelity()
            self.store.finish(reason)
            self._look()
            yield self._state("finished")

    def _discard_interrupted(self) -> None:
        """Discard blocks that lack runs: they were interrupted when the program ended."""
        whole = {(block, attempt) for block, attempt in good_blocks(self.store)}
        for block, attempt in {(trial.block, trial.attempt) for trial in self.store.trials() if not trial.bad} - whole:
            self.store.discard(block, attempt, "interrupted")

    def _warm_up(self) -> Iterator[State]:
        """Run every arm until its TPOT is stable. An arm that fails is left out, with its error as the reason."""
        for arm in self.setup.plan.arms:
            if self.stop.is_set():
                return
            yield self._state(f"warm-up: {arm.name}")
            try:
                self.store.note(f"warm-up {arm.name}", self._until_stable(arm))
            except InputError:
                raise
            except SplitlearnError as error:
                self._failed[arm.name] = str(error)
                self.store.note("failed", self._failed)
        if not self._arms():
            raise SplitlearnError(f"No arm can be run. {next(iter(self._failed.values()), '')}")

    def _until_stable(self, arm: Arm) -> list[float]:
        """TPOTs of the warm-up runs, in seconds."""
        found: list[float] = []
        request = self._request(arm, self.setup.prompts[0], min(WARM_UP_TOKENS, self.setup.max_new_tokens))
        while len(found) < MOST_WARM_UPS and not self.stop.is_set():
            report = self._run(arm, request)
            if report is not None:
                found.append(report.metrics.tpot_s or report.metrics.ttft_s)
            if len(found) > 1 and abs(found[-1] / found[-2] - 1) < STABLE:
                break
        return found

    def _block(self) -> Iterator[State]:
        """Run one block and store it run by run."""
        number, attempt = self._next()
        order = random.Random(f"{self.setup.seed} {number} {attempt}")
        prompt = self.setup.prompts[number % len(self.setup.prompts)]
        arms = self._arms()
        trunk = None if self.runs.config.trunk.embedded else trunk_pid(self.runs.trunk_address())
        before, started, recovered = reading(None, trunk), time.monotonic(), False
        for place, arm in enumerate(order.sample(arms, len(arms))):
            yield self._state(f"block {number + 1}: {arm.name}")
            if self.stop.is_set():
                self.store.discard(number, attempt, "interrupted")
                return
            report = self._run(arm, self._request(arm, prompt, self.setup.max_new_tokens))
            if report is None:
                continue
            recovered = recovered or bool(report.metrics.recoveries)
            self.store.add(Trial.of(report, arm.name, number, attempt, place, time.time(), ""))
        wrong = _disturbance(before, reading(before, trunk)) or ("the trunk was lost" if recovered else "")
        if wrong and attempt < MOST_ATTEMPTS:
            self.store.discard(number, attempt, wrong)
        elif wrong:
            self.store.note(f"disturbed block {number}", wrong)
        self._block_s.append(time.monotonic() - started)
        if len(good_blocks(self.store)) in self._looks:
            self._look()

    def _next(self) -> tuple[int, int]:
        """The block and attempt to run next: the first block without a whole attempt."""
        whole = {block for block, _ in good_blocks(self.store)}
        number = next(block for block in range(len(whole) + 1) if block not in whole)
        return number, 1 + max((t.attempt for t in self.store.trials() if t.block == number), default=0)

    def _run(self, arm: Arm, request: GenerationRequest) -> ArmReport | None:
        """One run. No report if it was stopped; after a compilation the run begins again."""
        found: ArmReport | None = None
        for item in self.runs.stream(arm.kind, arm.flags, request, self.stop, arm.copy):
            if isinstance(item, Restart):
                found = None
            elif isinstance(item, ArmReport):
                found = item
        return None if self.stop.is_set() else found

    def _request(self, arm: Arm, prompt: str, tokens: int) -> GenerationRequest:
        sampling = SAMPLED if arm.sampled else SamplingParams()
        chat = self.runs.config.generation.chat
        return GenerationRequest(prompt, tokens, chat, ignore_eos=True, sampling=sampling)

    def _reason(self) -> str | None:
        """Why the experiment is over, or None."""
        blocks = len(good_blocks(self.store))
        minutes = self.setup.minutes
        if minutes is not None and time.monotonic() - self._measuring_since >= 60 * minutes:
            self._look()
            return f"the limit of {minutes:g} minutes"
        if blocks >= self._looks[-1]:
            return f"{blocks} pairs, as asked" if self.setup.pairs else f"the limit of {blocks} pairs"
        if self.setup.pairs is None and self._findings is not None and self._findings.decided:
            return f"every verdict was decided after {blocks} pairs"
        return None

    def _look(self) -> None:
        self._findings = analyse(self.setup, self.store.trials(), self.store.notes())

    def _fidelity(self) -> Iterator[State]:
        """Note what flags that may change the numbers do to the logits."""
        found: dict[str, dict[str, object]] = {}
        yield self._state("fidelity of the flags that may change the numbers")
        for question, changed in changes(self.runs, self.setup.plan):
            found.setdefault(question.flag, {})[question.kind] = changed
            yield self._state(f"fidelity: {question.key}")
        self.store.note("fidelity", found)

    def _arms(self) -> list[Arm]:
        return [arm for arm in self.setup.plan.arms if arm.name not in self._failed]

    def _state(self, phase: str) -> State:
        stored = self.store.trials()
        elapsed = time.monotonic() - self._began
        return State(phase, len(stored), len(good_blocks(self.store)), elapsed, self._remaining_s(), self._findings)

    def _remaining_s(self) -> float | None:
        """An estimate: the blocks still to run times a block's median duration."""
        if not self._block_s:
            return None
        blocks = len(good_blocks(self.store))
        wanted = self._findings.more_pairs if self._findings and not self.setup.pairs else None
        left = self._looks[-1] - blocks if wanted is None else min(wanted, self._looks[-1] - blocks)
        seconds = max(0, left) * statistics.median(self._block_s)
        if self.setup.minutes is None:
            return seconds
        return min(seconds, max(0.0, 60 * self.setup.minutes - (time.monotonic() - self._measuring_since)))


def _disturbance(before: Reading, after: Reading) -> str:
    """What disturbed the block between two readings, or ""."""
    if after.others_cpu > MOST_OTHERS_CPU:
        return f"other programs used {after.others_cpu:.2f} cores"
    if after.stolen_cpu > MOST_OTHERS_CPU:
        return f"the host of this virtual machine withheld {after.stolen_cpu:.2f} cores"
    if before.throttled is not None and after.throttled is not None and after.throttled > before.throttled:
        return "the processor was throttled"
    if before.cpu_mhz and after.cpu_mhz and after.cpu_mhz < LEAST_CLOCK * before.cpu_mhz:
        return f"the processor's clock fell from {before.cpu_mhz:.0f} to {after.cpu_mhz:.0f} MHz"
    return ""

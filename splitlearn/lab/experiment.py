"""Runs an experiment: a quick first pass, blocks in random order, looks at the verdicts, and the decision to stop.

    with Store.create(path, setup) as store:
        for progress in Experiment(runs, store).go(): ...

The first pass runs each arm once with few tokens: the baselines, then no flags, then one flag after the other. It loads
and warms each arm, and gives the first figures; its order is fixed, so no verdict rests on it.

Each block runs the arms of the questions that are still open, once each, in an order shuffled anew, on one prompt, to a
fixed number of tokens. Before that come PREFILLS rounds for TTFT: in each, every arm generates one token, in the
block's order and in the reverse of it by turns (A B B A A B ...), so that the prefills of a pair lie close in time. The
A/A check runs in each block until it is passed at a look, then in one block of AA_EVERY. Other programs' load discards
nothing: it is stored with the run, and the random order protects the pairs. A block in which the trunk was lost runs
again, and so does an interrupted one (a kill, a cancellation), since the two runs of a pair must lie close in time;
whole blocks stay. Nothing is yielded while a run is timed, so a page that draws does not disturb it.
"""

import os
import random
import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import gettempdir

from filelock import FileLock, Timeout

from splitlearn.arms.report import ArmReport, Restart
from splitlearn.arms.runs import Runs
from splitlearn.checkpoints.catalogue import cache_folder
from splitlearn.config import Config
from splitlearn.errors import InputError, SetupError, SplitlearnError
from splitlearn.events import GenerationRequest, Kind
from splitlearn.lab.analysis.findings import Findings, findings_of, good_blocks
from splitlearn.lab.design import AA, SAMPLED, Arm, Question, first_pass
from splitlearn.lab.environment import fingerprint, trunk_pid
from splitlearn.lab.logit_fidelity import changes
from splitlearn.lab.records import FIRST_PASS, LOST, Load, Place, Trial
from splitlearn.lab.store import Store
from splitlearn.runtime.load import Reading, reading
from splitlearn.sampling import SamplingParams

FIRST_PASS_TOKENS, FIRST_PASS_PREFILLS = 16, 1
# Rounds of one token in a block. Of eight and the run itself, other programs leave one in peace in most blocks, also
# where they take most of the machine (docs/lab.md).
PREFILLS = 8
# Once the A/A check is passed, one block in so many goes on with it.
AA_EVERY = 4
# Worth a word beside a run: the clock fell below this share.
LEAST_CLOCK = 0.9


@dataclass(frozen=True)
class ExperimentProgress:
    """The progress of an experiment.

    `findings` is what the runs stored so far say. `remaining_s` is None before the first block is done. `discarded`
    says of the latest block that did not count which it was and why, or is "".
    """

    phase: str
    runs: int
    blocks: int
    elapsed_s: float
    remaining_s: float | None
    findings: Findings
    discarded: str = ""


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
        self._began = time.monotonic()
        self._block_s: list[float] = []
        self._failed: dict[str, str] = dict(store.notes().get("failed", {}))
        self._discarded = ""

    def go(self) -> Iterator[ExperimentProgress]:
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
        yield from self._first_pass()
        while (reason := self._reason()) is None and not self.stop.is_set():
            yield from self._block()
        if reason is not None:
            yield from self._fidelity()
            self.store.finish(reason)
            yield self._progress("finished")

    def _discard_interrupted(self) -> None:
        """Discard blocks that lack runs: they were interrupted when the program ended."""
        whole = {(block, attempt) for block, attempt in good_blocks(self.store)}
        begun = {(t.block, t.attempt) for t in self.store.trials() if not t.bad and t.block != FIRST_PASS}
        for block, attempt in begun - whole:
            self.store.discard(block, attempt, "interrupted")

    def _first_pass(self) -> Iterator[ExperimentProgress]:
        """Run each arm that has not run yet. An arm that fails is left out, with its error as the reason."""
        ran = {trial.arm for trial in self.store.trials()}
        tokens = min(FIRST_PASS_TOKENS, self.setup.max_new_tokens)
        arms = first_pass(self.setup.plan)
        for order, arm in enumerate(arms):
            if arm.name in ran or arm.name in self._failed:
                continue
            yield self._progress(f"first pass, {order + 1} of {len(arms)}: {arm.name}")
            if self.stop.is_set():
                return
            try:
                prompt, place = self.setup.prompts[0], Place(FIRST_PASS, 0, order, len(arms))
                self._run(arm, place, prompt, tokens, self._prefill([arm] * FIRST_PASS_PREFILLS, prompt))
            except InputError:
                raise
            except SplitlearnError as error:
                self._failed[arm.name] = str(error)
                self.store.note("failed", self._failed)
        if len(self._failed) == len(self.setup.plan.arms):
            raise SplitlearnError(f"No arm can be run. {next(iter(self._failed.values()), '')}")

    def _block(self) -> Iterator[ExperimentProgress]:
        """Run one block and store it run by run."""
        number, attempt = self._next()
        order = random.Random(f"{self.setup.seed} {number} {attempt}")
        prompt, arms = self.setup.prompts[number % len(self.setup.prompts)], self._arms(number)
        started, lost = time.monotonic(), False
        name = f"block {number + 1}{f' (attempt {attempt})' if attempt > 1 else ''}"
        arms = order.sample(arms, len(arms))
        yield self._progress(f"{name}: first tokens of {len(arms)} arms")
        prefills: list[tuple[Arm, float]] = []
        for turn in range(PREFILLS):
            prefills += self._prefill(arms[:: -1 if turn % 2 else 1], prompt)
        for at, arm in enumerate(arms):
            yield self._progress(f"{name}, {at + 1} of {len(arms)}: {arm.name}")
            if self.stop.is_set():
                self.store.discard(number, attempt, "interrupted")
                return
            place = Place(number, attempt, at, len(arms))
            trial = self._run(arm, place, prompt, self.setup.max_new_tokens, prefills)
            lost = lost or (trial is not None and bool(trial.bad))
        if lost:
            self.store.discard(number, attempt, LOST)
            self._discarded = f"block {number + 1} did not count and runs again: {LOST}"
        self._block_s.append(time.monotonic() - started)

    def _next(self) -> tuple[int, int]:
        """The block and attempt to run next: the first block without a whole attempt."""
        whole = {block for block, _ in good_blocks(self.store)}
        number = next(block for block in range(len(whole) + 1) if block not in whole)
        return number, 1 + max((t.attempt for t in self.store.trials() if t.block == number), default=0)

    def _arms(self, number: int) -> list[Arm]:
        """The arms of block `number`: those of the questions still open, and of the A/A check where it is due."""
        findings = findings_of(self.store)
        questions = [q for q in self.setup.plan.questions if q.flag != AA and self._open(q, findings)]
        kinds = {question.kind for question in questions}
        questions += [
            q
            for q in self.setup.plan.questions
            if q.flag == AA and q.kind in kinds and (number % AA_EVERY == 0 or not self._passed(q.kind, findings))
        ]
        named = {name for question in questions for name in (question.treated, question.control)}
        return [arm for arm in self.setup.plan.arms if arm.name in named - set(self._failed)]

    def _open(self, question: Question, findings: Findings) -> bool:
        """A fixed number of pairs is for every question."""
        return bool(self.setup.pairs) or question in findings.open_questions

    def _passed(self, kind: Kind, findings: Findings) -> bool:
        """Whether the A/A check was passed, at a look or after the first."""
        return findings.blocks >= self.setup.looks[0] and findings.passed(kind)

    def _prefill(self, arms: Sequence[Arm], prompt: str) -> list[tuple[Arm, float]]:
        """The TTFT of a run of one token, of each of `arms` in their order; fewer if it was stopped."""
        reports = [(arm, self._report(arm, self._request(arm, prompt, 1))) for arm in arms]
        return [(arm, report.metrics.ttft_s) for arm, report in reports if report]

    def _run(
        self, arm: Arm, place: Place, prompt: str, tokens: int, prefills: Sequence[tuple[Arm, float]]
    ) -> Trial | None:
        """One run, stored with its own of the `prefills` before it. None if it was stopped."""
        before = reading(None, self._trunk)
        report = self._report(arm, self._request(arm, prompt, tokens))
        if report is None:
            return None
        after = reading(before, self._trunk)
        load = Load(after.at_s, after.others_cpu + after.stolen_cpu, _disturbance(before, after))
        own = tuple(ttft_s for each, ttft_s in prefills if each == arm)
        trial = Trial.of(report, own, arm.name, place, load)
        self.store.add(trial)
        return trial

    @cached_property
    def _trunk(self) -> list[int]:
        """The processes of a trunk on this machine that was started by hand: their work is no disturbance."""
        hops = () if self.runs.config.trunk.embedded else self.runs.hops()
        found = [trunk_pid(hop.address()) for hop in hops]
        return [pid for pid in found if pid is not None]

    def _report(self, arm: Arm, request: GenerationRequest) -> ArmReport | None:
        """One generation. No report if it was stopped; after a compilation it begins again."""
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
        findings = findings_of(self.store)
        minutes, last = self.setup.minutes, self.setup.looks[-1]
        if minutes is not None and time.monotonic() - self._began >= 60 * minutes:
            return f"the limit of {minutes:g} min"
        if findings.blocks >= last:
            return f"{findings.blocks} pairs, as asked" if self.setup.pairs else f"the limit of {last} pairs"
        if self.setup.pairs is None and findings.blocks and findings.decided:
            return f"every verdict was decided after {findings.blocks} pairs"
        return None

    def _fidelity(self) -> Iterator[ExperimentProgress]:
        """Note what flags that may change the numbers do to the logits."""
        found: dict[str, dict[str, object]] = {}
        yield self._progress("fidelity of the flags that may change the numbers")
        for question, changed in changes(self.runs, self.setup.plan):
            found.setdefault(question.flag, {})[question.kind] = changed
            yield self._progress(f"fidelity: {question.key}")
        self.store.note("fidelity", found)

    def _progress(self, phase: str) -> ExperimentProgress:
        findings = findings_of(self.store)
        elapsed, left, runs = time.monotonic() - self._began, self._remaining_s(findings), len(findings.trials)
        return ExperimentProgress(phase, runs, findings.blocks, elapsed, left, findings, self._discarded)

    def _remaining_s(self, findings: Findings) -> float | None:
        """An estimate: the blocks still to run times a block's median duration of late."""
        if not self._block_s:
            return None
        left = self.setup.looks[-1] - findings.blocks
        if not self.setup.pairs and findings.more_pairs is not None:
            ends = [look for look in self.setup.looks if look >= findings.blocks + findings.more_pairs]
            left = min(ends, default=self.setup.looks[-1]) - findings.blocks
        seconds = max(0, left) * statistics.median(self._block_s[-5:])
        if self.setup.minutes is None:
            return seconds
        return min(seconds, max(0.0, 60 * self.setup.minutes - (time.monotonic() - self._began)))


def _disturbance(before: Reading, after: Reading) -> str:
    """What happened to the processor between two readings, or ""."""
    if before.throttled is not None and after.throttled is not None and after.throttled > before.throttled:
        return "the processor was throttled"
    if before.cpu_mhz and after.cpu_mhz and after.cpu_mhz < LEAST_CLOCK * before.cpu_mhz:
        return f"the processor's clock fell from {before.cpu_mhz:.0f} to {after.cpu_mhz:.0f} MHz"
    return ""

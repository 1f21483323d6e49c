"""Speculative start of the next decode step: while the client computes the rest of the LM head, the trunk already runs
the likeliest token.

The head has a logit for each token of the vocabulary, and reads as many weights as several layers. A tokenizer learns
low ids first, from the commonest text. So the likeliest token of the first quarter is the likeliest of all for nine
tokens in ten (docs/notes/token-time.md). That token starts through the stages up to the trunk as soon as the first
logits are computed. If another token is sampled, the client drops the step at the trunk and starts the right one. So
the answer does not change.
"""

import time
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from statistics import median_low

import torch

from splitlearn.generation.chain import Step
from splitlearn.generation.speculation import TIMES, Record
from splitlearn.generation.step_timing import Ledger
from splitlearn.stages.base import LogitsInParts, PendingStep, Stage, WorksAhead


@dataclass
class OverlapPolicy:
    """Decides whether it pays to start a step before its token is sampled.

    A right guess saves the time of the head's rest. A wrong one that the trunk cannot drop costs a step's time, less
    the rest, which runs anyway. With a share `a` of right guesses it pays if a * rest > (1 - a) * (step - rest), which
    is rest > (1 - a) * step. `rests` and `steps` are the last measured seconds of each.
    """

    guesses: Record = field(default_factory=lambda: Record(right=9, tried=10))
    rests: deque[float] = field(default_factory=lambda: deque(maxlen=TIMES))
    steps: deque[float] = field(default_factory=lambda: deque(maxlen=TIMES))

    def pays(self) -> bool:
        """Whether it pays by the measured times; True before any, since nine guesses in ten are right."""
        if not self.rests or not self.steps:
            return True
        return median_low(self.rests) > (1 - self.guesses.share) * median_low(self.steps)


@dataclass(frozen=True)
class _Guess:
    """The likeliest token of the first logits, when it was found, and its step if one was started."""

    token: int
    at: float
    pending: PendingStep | None


@dataclass
class HeadOverlap:
    """Decodes one greedy answer through the stages `near`, `remote`, `far` and the LM `head`. No step follows a token
    of `ends`."""

    near: Sequence[Stage]
    remote: WorksAhead
    far: Sequence[Stage]
    head: LogitsInParts
    ledger: Ledger
    ends: Collection[int]
    policy: OverlapPolicy = field(default_factory=OverlapPolicy)
    _worth: bool = True
    """Whether to start the next guess. Computed while the trunk works, since time between its steps is lost."""
    _guess: _Guess | None = None

    def __call__(self, steps: Sequence[Step]) -> list[torch.Tensor]:
        """The logits of the only step. The next step starts while the rest of them is computed."""
        (step,) = steps
        x, number = self._up_to_remote(step), len(self.near) + 1
        for at, stage in enumerate(self.far, number):
            x = self.ledger.noted(0, stage.step([step.item(at, x)])[0])
        item = step.item(number + len(self.far), x)
        pending = self.head.logits_in_parts(item) if step.more else None
        if pending is None:
            return [self.ledger.noted(0, self.head.step([item])[0])[0, -step.rows :]]
        self.ledger.add(step.sample, pending.timing)
        self._start_next(step, pending.first)
        return [self.ledger.noted(0, pending.finish())[0]]

    def _up_to_remote(self, step: Step) -> torch.Tensor:
        """The output of the remote stage: of the step that was started early, if its guess was right."""
        guess, self._guess, early = self._guess, None, None
        if guess is not None:
            early, right = guess.pending, guess.token == int(step.ids[0, -1])
            self.policy.rests.append(time.perf_counter() - guess.at)
            self.policy.guesses.add(int(right), int(not right))
            if early is not None:
                self.ledger.started_right = right
                if right:
                    return self._finished(early)
                began = time.perf_counter()
                early.drop()
                self.ledger.spend("encode", time.perf_counter() - began)
        pending = self._start(step, uncertain=False)
        if early is not None:  # answers come in the order in which steps were started
            self.ledger.add(step.sample, early.finish().timing)
        return self._finished(pending)

    def _start_next(self, step: Step, logits: torch.Tensor) -> None:
        """Start the step of the likeliest token of the first `logits` [1, 1, k], if that pays."""
        began = time.perf_counter()
        token, pending = _likeliest(logits), None
        self.ledger.spend("sample", time.perf_counter() - began)
        if self._worth and token not in self.ends:
            ahead = Step(step.sample, step.chain, step.end, torch.tensor([[token]]))
            pending = self._start(ahead, uncertain=True)
        self._worth = self.policy.pays()
        self._guess = _Guess(token, time.perf_counter(), pending)

    def _start(self, step: Step, *, uncertain: bool) -> PendingStep:
        x = step.ids
        for at, stage in enumerate(self.near):
            x = self.ledger.noted(0, stage.step([step.item(at, x)])[0])
        pending = self.remote.begin(step.item(len(self.near), x), uncertain=uncertain)
        self.ledger.add(step.sample, pending.timing)
        return pending

    def _finished(self, pending: PendingStep) -> torch.Tensor:
        output = pending.finish()
        if output.x.shape[1] == 1 and not output.timing.recoveries:
            spent = output.timing.ledger
            self.policy.steps.append(spent.get("queue", 0.0) + spent.get("trunk", 0.0) + output.timing.overlapped_s)
        return self.ledger.noted(0, output)


def overlapped(stages: Sequence[Stage], ledger: Ledger, ends: Collection[int]) -> HeadOverlap | None:
    """The overlap over a chain of stages. None if no stage is remote, or if the last is not an LM head."""
    at, head = next((at for at, stage in enumerate(stages) if isinstance(stage, WorksAhead)), -1), stages[-1]
    remote = stages[at]
    if not isinstance(remote, WorksAhead) or not isinstance(head, LogitsInParts):
        return None
    return HeadOverlap(stages[:at], remote, stages[at + 1 : -1], head, ledger, ends)


def _likeliest(logits: torch.Tensor) -> int:
    """The index of the largest. numpy's argmax takes 0.03 ms, torch's 0.08, since its code is cold between steps."""
    known = logits if logits.dtype == torch.float32 else logits.float()
    return int(known.numpy().argmax())

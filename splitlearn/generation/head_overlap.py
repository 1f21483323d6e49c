"""A decoded token's step, begun before the token is sure: the trunk works on it beside the client's LM head.

The head has a logit for each word of the vocabulary, and reads as many weights as several layers. Low ids are those
that a tokenizer learned first, from what is said most: the likeliest of the first quarter of them is the likeliest of
all for nine tokens in ten (docs/notes). So when the stage has the first logits, that token goes through the stages
up to the trunk, and the client computes the other logits while it is on its way. If one of them is larger, the step is
rolled back, and the trunk told to give it up: the tokens are those that there would have been.
"""

import time
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from statistics import median_low

import torch

from splitlearn.generation.chain import Feed, Piece
from splitlearn.generation.speculation import TIMES, Record
from splitlearn.generation.step_timing import Ledger
from splitlearn.stages.base import UnderWay


@dataclass
class HeadStart:
    """Of one answer whose tokens are the likeliest ones. `near` are the stages up to the first that works elsewhere;
    after one of `ends` nothing comes.

    A step that was begun in vain keeps the trunk for a step's time, if that cannot give it up, of which the head's rest
    went by anyway; one with the right token saves the head's rest. With a share `a` of guesses right it pays where
    a * rest > (1 - a) * (step - rest), which is rest > (1 - a) * step.
    """

    near: Sequence[Feed]
    ledger: Ledger
    ends: Collection[int]
    came_true: bool | None = None
    """Whether the last step had been begun with the right token; None if it had not been begun early."""
    _position: int = 0
    """Where the token goes whose logits come next."""
    _worth: bool = True
    """Whether the next guess is begun: looked up while the trunk is at work, since all waits between its steps."""
    _guess: int | None = None
    _begun: UnderWay | None = None
    _guessed: float = 0.0
    _record: Record = field(default_factory=lambda: Record(right=9, tried=10))
    _rests: deque[float] = field(default_factory=lambda: deque(maxlen=TIMES))
    _steps: deque[float] = field(default_factory=lambda: deque(maxlen=TIMES))

    def step(self, position: int, ids: torch.Tensor) -> Piece:
        """What comes out of the near stages for `ids` [1, T], and the first position of it: of the step that was begun
        for them, where there is one."""
        guess, begun, token = self._guess, self._begun, int(ids[0, -1])
        self._guess, self._begun, self._position = None, None, position + ids.shape[1]
        if guess is not None:
            self._rests.append(time.perf_counter() - self._guessed)
            self._record.add(int(guess == token), int(guess != token))
        self.came_true = None if begun is None else guess == token
        if begun is not None and self.came_true:
            return position, self._finished(begun)
        if begun is not None:
            began = time.perf_counter()
            begun.drop()
            self.ledger.spend("encode", time.perf_counter() - began)
        for feed in self.near:
            feed.roll_back(position)
        position, wanted = self._begin(position, ids, uncertain=False)
        if begun is not None:  # answers come in the order in which steps were begun
            self.ledger.add(0, begun.finish().timing)
        return position, self._finished(wanted)

    def guess(self, logits: torch.Tensor) -> None:
        """Begin the next step with the largest of the first `logits` [1, 1, k], where that pays."""
        began = time.perf_counter()
        self._guess = _likeliest(logits)
        guessed = time.perf_counter()
        if self._worth and self._guess not in self.ends:
            _, self._begun = self._begin(self._position, torch.tensor([[self._guess]]), uncertain=True)
        self.ledger.spend("sample", guessed - began)
        self._worth = self._pays()
        self._guessed = time.perf_counter()

    def _pays(self) -> bool:
        """As far as one knows: yes, before anything is known, since nine guesses in ten are right."""
        if not self._rests or not self._steps:
            return True
        return median_low(self._rests) > (1 - self._record.share) * median_low(self._steps)

    def _begin(self, position: int, x: torch.Tensor, *, uncertain: bool) -> tuple[int, UnderWay]:
        *here, last = self.near
        for feed in here:
            position, output = feed.step(position, x)
            self.ledger.add(0, output.timing)
            x = output.x
        position, begun = last.begin(position, x, uncertain=uncertain)
        self.ledger.add(0, begun.timing)
        return position, begun

    def _finished(self, begun: UnderWay) -> torch.Tensor:
        output = begun.finish()
        self.ledger.add(0, output.timing)
        if output.x.shape[1] == 1 and not output.timing.recoveries:
            spent = output.timing.ledger
            self._steps.append(spent.get("queue", 0.0) + spent.get("trunk", 0.0) + output.timing.overlapped_s)
        return output.x


def _likeliest(logits: torch.Tensor) -> int:
    """The place of the largest. numpy's takes 0.03 ms where torch's takes 0.08, its code being cold between steps."""
    known = logits if logits.dtype == torch.float32 else logits.float()
    return int(known.numpy().argmax())

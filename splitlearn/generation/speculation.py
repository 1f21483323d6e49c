"""Draft tokens: guesses at what comes next, of which one trip through the stages verifies several.

The decode loop feeds the last token and the drafts in one step, and samples at each of their places in turn, from the
model's own logits and with the one draw that the token there would have had anyway, for as long as what it samples is
the draft that was fed. So tokens are those of decoding one by one, under a seed as well as greedily: this is the
speculative sampling of Leviathan et al. 2023 (arXiv:2211.17192) for a proposal that is certain of its draft (accept it
with the model's probability for it, else draw from what is left).
"""

from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median_low
from typing import Protocol

COUNTS = (0, 1, 2, 4, 8, 16)
"""How many drafts a step may have: few numbers, so that the time of each is soon known."""
LONGEST, SHORTEST = 4, 2
TIMES = 5
FORGET = 0.95


class Proposer(Protocol):
    """Guesses how one sequence goes on."""

    @property
    def costs(self) -> bool:
        """Whether to look at a guess takes time: then one that was not fed is not held against what came."""

    def propose(self, sequence: Sequence[int]) -> tuple[Sequence[int], int]:
        """Token ids that may follow, the most likely one at each place, and which kind of guess this is: guesses of one
        kind are expected to be right as often as earlier ones of it."""


class PromptLookup:
    """Guesses that what followed the last few tokens before will follow again (Saxena 2023, "Prompt Lookup Decoding").

    transformers' PromptLookupCandidateGenerator searches the whole sequence at each step, and for a single token where
    it finds no more, which is wrong too often to pay here. The kind of a guess is the number of tokens that recurred.
    """

    costs = False

    def __init__(self) -> None:
        self._follows: dict[tuple[int, ...], int] = {}
        self._known = 0

    def propose(self, sequence: Sequence[int]) -> tuple[Sequence[int], int]:
        """What followed the last occurrence of the longest end of `sequence` that occurred before; else nothing."""
        self._learn(sequence)
        for length in range(LONGEST, SHORTEST - 1, -1):
            at = self._follows.get(tuple(sequence[-length:]))
            if at is not None:
                return sequence[at : at + COUNTS[-1]], length
        return (), 0

    def _learn(self, sequence: Sequence[int]) -> None:
        """Note where each run of tokens went on; the run at the very end did not yet."""
        for at in range(max(self._known, SHORTEST), len(sequence)):
            for length in range(SHORTEST, min(LONGEST, at) + 1):
                self._follows[tuple(sequence[at - length : at])] = at
        self._known = len(sequence)


@dataclass
class Record:
    """How often guesses of one kind were right; before anything is known, every other time."""

    right: float = 1.0
    tried: float = 2.0

    def add(self, right: int, wrong: int) -> None:
        self.right = FORGET * self.right + right
        self.tried = FORGET * self.tried + right + wrong

    @property
    def share(self) -> float:
        """Of those that were tried, lately above all."""
        return self.right / self.tried


@dataclass
class Speculation:
    """The drafts of one answer: as many at each step as promise the most tokens per second, none where none do. They
    are of the first of `proposers` that has a guess.

    With a share `a` of drafts right, `k` of them give 1 + a + ... + a**k tokens on average (Leviathan et al., equation
    1). What a step with k drafts takes, round trip included, is measured as they are used; an untried number is taken
    to cost what the next smaller one that was tried does, and so is tried when more tokens would be worth it.
    """

    proposers: Sequence[Proposer]
    _records: defaultdict[tuple[int, int], Record] = field(default_factory=lambda: defaultdict(Record))
    _seconds: defaultdict[int, deque[float]] = field(default_factory=lambda: defaultdict(lambda: deque(maxlen=TIMES)))
    _guess: Sequence[int] = ()
    _kind: tuple[int, int] = (0, 0)

    def drafts(self, sequence: Sequence[int], most: int) -> list[int]:
        """At most `most` draft tokens for the step that follows `sequence`."""
        for number, proposer in enumerate(self.proposers):
            self._guess, kind = proposer.propose(sequence)
            self._kind = number, kind
            if self._guess:
                break
        if not self._seconds[0]:  # what one token takes is found first
            return []
        limit = min(len(self._guess), most)
        return list(self._guess[: max((count for count in COUNTS if count <= limit), key=self._rate, default=0)])

    def came(self, new: Sequence[int], fed: int, seconds: float) -> None:
        """The step brought the tokens `new`, of which all but the last were among the `fed` drafts, in `seconds`."""
        self._seconds[fed].append(seconds)
        if self._guess and (fed or not self.proposers[self._kind[0]].costs):
            right = len(new) - 1 if fed else int(new[0] == self._guess[0])
            self._records[self._kind].add(right, wrong=int(right < max(1, fed)))

    def _rate(self, count: int) -> float:
        """Tokens per second that a step with `count` drafts promises."""
        share = self._records[self._kind].share
        known = max(each for each in COUNTS if each <= count and self._seconds[each])
        return sum(share**power for power in range(count + 1)) / median_low(self._seconds[known])

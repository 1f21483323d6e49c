"""Draft tokens: guesses at the next tokens, of which one step through the stages verifies several.

The decode loop feeds the last token and the drafts in one step. Then it samples at each position in turn, from the
model's own logits, with the draw that this position would have had anyway. It stops at the first token that differs
from its draft. So tokens are those of decoding one by one, with a seed as well as greedily. This is the speculative
sampling of Leviathan et al. 2023 (arXiv:2211.17192) for a proposal with probability 1 for its draft: accept it with the
model's probability, else draw from the other tokens.
"""

from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median_low
from typing import Protocol

COUNTS = (0, 1, 2, 4, 8, 16)
"""The possible numbers of drafts in a step. There are few, so that the time of each is soon measured."""
LONGEST, SHORTEST = 4, 2
TIMES = 5
FORGET = 0.95


class Proposer(Protocol):
    """Guesses the next tokens of one sequence."""

    @property
    def costs(self) -> bool:
        """Whether proposing takes compute. Then proposals that were not fed are not scored."""

    def propose(self, sequence: Sequence[int]) -> tuple[Sequence[int], int]:
        """The likeliest next token ids, and the kind of this guess. Guesses of one kind are expected to be right as
        often as earlier ones of that kind."""


class PromptLookup:
    """Guesses the tokens that followed an earlier occurrence of the last few (Saxena 2023, "Prompt Lookup Decoding").

    transformers' PromptLookupCandidateGenerator searches the whole sequence at each step. It also accepts a match of a
    single token, which is wrong too often to pay here. The kind of a guess is the number of matching tokens.
    """

    costs = False

    def __init__(self) -> None:
        self._follows: dict[tuple[int, ...], int] = {}
        self._known = 0

    def propose(self, sequence: Sequence[int]) -> tuple[Sequence[int], int]:
        """The tokens after the last earlier occurrence of the end of `sequence`, the longest that occurred; or none."""
        self._learn(sequence)
        for length in range(LONGEST, SHORTEST - 1, -1):
            at = self._follows.get(tuple(sequence[-length:]))
            if at is not None:
                return sequence[at : at + COUNTS[-1]], length
        return (), 0

    def _learn(self, sequence: Sequence[int]) -> None:
        """Record the position after each n-gram, except the one at the very end."""
        for at in range(max(self._known, SHORTEST), len(sequence)):
            for length in range(SHORTEST, min(LONGEST, at) + 1):
                self._follows[tuple(sequence[at - length : at])] = at
        self._known = len(sequence)


@dataclass
class Record:
    """How often guesses of one kind were right, with more weight for recent ones. Starts at one half."""

    right: float = 1.0
    tried: float = 2.0

    def add(self, right: int, wrong: int) -> None:
        self.right = FORGET * self.right + right
        self.tried = FORGET * self.tried + right + wrong

    @property
    def share(self) -> float:
        """The share of right guesses."""
        return self.right / self.tried


@dataclass
class Speculation:
    """Chooses the drafts of one answer: at each step the number of them that promises the most tokens per second. They
    come from the first of `proposers` that has a guess.

    With a share `a` of right drafts, `k` of them give 1 + a + ... + a**k tokens on average (Leviathan et al., equation
    1). The time of a step with k drafts, including the round trip, is measured when they are used. An untried number is
    assumed to cost as much as the next smaller one that was tried. So it is tried when its tokens would be worth it.
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
        if not self._seconds[0]:  # measure a step without drafts first
            return []
        limit = min(len(self._guess), most)
        return list(self._guess[: max((count for count in COUNTS if count <= limit), key=self._rate, default=0)])

    def came(self, new: Sequence[int], fed: int, seconds: float) -> None:
        """Record a step of `seconds` that gave the tokens `new`. All but the last were among its `fed` drafts."""
        self._seconds[fed].append(seconds)
        if self._guess and (fed or not self.proposers[self._kind[0]].costs):
            right = len(new) - 1 if fed else int(new[0] == self._guess[0])
            self._records[self._kind].add(right, wrong=int(right < max(1, fed)))

    def _rate(self, count: int) -> float:
        """The expected tokens per second of a step with `count` drafts."""
        share = self._records[self._kind].share
        known = max(each for each in COUNTS if each <= count and self._seconds[each])
        return sum(share**power for power in range(count + 1)) / median_low(self._seconds[known])

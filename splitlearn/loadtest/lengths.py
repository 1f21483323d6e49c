"""Distributions of lengths, in words of a prompt or tokens of an answer, and how a person writes them."""

import math
import random
import re
from dataclasses import dataclass
from typing import Literal

from splitlearn.errors import InputError

MAX_LENGTH = 1_000_000
FORMS = "a length such as 128, a range 64-256, normal:MEAN:SD or lognormal:MEDIAN:SIGMA"
SIGMAS = 3.0
"""Lengths further from the middle than this many standard deviations are cut to it."""
_NUMBER = r"([0-9]{1,9}(?:\.[0-9]{1,9})?)"
_RANGE = re.compile(r"([0-9]{1,9})(?:-([0-9]{1,9}))?", re.ASCII)
_CURVE = re.compile(f"(normal|lognormal):{_NUMBER}:{_NUMBER}", re.ASCII)


@dataclass(frozen=True)
class Lengths:
    """A distribution of whole numbers from 1.

    uniform: from `middle` to `spread`, both included. normal: mean and standard deviation. lognormal: the median, and
    the standard deviation of the logarithm. Raises InputError for numbers out of range.
    """

    kind: Literal["uniform", "normal", "lognormal"]
    middle: float
    spread: float

    def __post_init__(self) -> None:
        ordered = self.kind != "uniform" or self.middle <= self.spread
        if self.middle < 1 or self.spread > MAX_LENGTH or not ordered or self._most() > MAX_LENGTH:
            raise InputError("lengths", str(self), f"{FORMS}, from 1 to {MAX_LENGTH}")

    @classmethod
    def parse(cls, text: str, field: str) -> "Lengths":
        """The inverse of `str`. Raises InputError, which names `field`."""
        try:
            if found := _RANGE.fullmatch(text.strip()):
                return cls("uniform", float(found[1]), float(found[2] or found[1]))
            if found := _CURVE.fullmatch(text.strip()):
                return cls("normal" if found[1] == "normal" else "lognormal", float(found[2]), float(found[3]))
        except InputError as error:
            raise InputError(field, text, error.expected) from None
        raise InputError(field, text, FORMS)

    def __str__(self) -> str:
        if self.kind != "uniform":
            return f"{self.kind}:{self.middle:g}:{self.spread:g}"
        low, high = int(self.middle), int(self.spread)
        return f"{low}-{high}" if high > low else f"{low}"

    @property
    def longest(self) -> int:
        """The longest length that can be drawn."""
        return math.ceil(self._most())

    def draw(self, dice: random.Random) -> int:
        """A length."""
        if self.kind == "uniform":
            return dice.randint(int(self.middle), int(self.spread))
        turn = dice.gauss(0.0, 1.0)
        return min(self.longest, max(1, round(self._at(max(-SIGMAS, turn)))))

    def _most(self) -> float:
        return self.spread if self.kind == "uniform" else self._at(SIGMAS)

    def _at(self, deviations: float) -> float:
        """The length at so many standard deviations from the middle."""
        if self.kind == "normal":
            return self.middle + deviations * self.spread
        return self.middle * math.exp(min(deviations * self.spread, 700.0))

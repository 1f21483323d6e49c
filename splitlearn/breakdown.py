"""What a split model costs beside the full one, from pairs of runs: the ratio, and where its difference comes from."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from splitlearn.errors import InputError
from splitlearn.metrics import RunMetrics

LAYERS = ("model", "bottom", "trunk", "top")
TRIP = ("encode", "wire", "queue", "decode")
MOST_PAIRS = 100


def check_pairs(pairs: object) -> None:
    """Raise InputError unless `pairs` is a number of pairs that can be run."""
    if isinstance(pairs, bool) or not isinstance(pairs, int) or not 1 <= pairs <= MOST_PAIRS:
        raise InputError("pairs", pairs, f"a whole number from 1 to {MOST_PAIRS}")


@dataclass(frozen=True)
class Ratio:
    """split / full over `n` pairs: the geometric mean, the least and the most."""

    mean: float
    least: float
    most: float
    n: int

    @classmethod
    def of(cls, pairs: Iterable[tuple[float | None, float | None]]) -> "Ratio | None":
        """The ratio of pairs of (full, split). None where nothing can be divided."""
        found = [split / full for full, split in pairs if full and split]
        if not found:
            return None
        return cls(math.exp(fmean(map(math.log, found))), min(found), max(found), len(found))

    @property
    def covers_one(self) -> bool:
        """Whether some pairs say faster and some say slower."""
        return self.least <= 1 <= self.most


@dataclass(frozen=True)
class Difference:
    """Seconds per token that split takes beyond full, and their parts: `layers` for computing them, `trip` for the way
    to the trunk and back, `rest` for all else. Negative where split takes less."""

    layers: float
    trip: float
    rest: float

    @property
    def total(self) -> float:
        """TPOT of split less TPOT of full."""
        return self.layers + self.trip + self.rest

    @classmethod
    def of(cls, full: Sequence[RunMetrics], split: Sequence[RunMetrics]) -> "Difference | None":
        """The mean difference of the runs. None without a token after the first."""
        one, other = (_mean(run.per_token for run in runs) for runs in (full, split))
        if not one or not other:
            return None
        layers = _sum(other, LAYERS) - _sum(one, LAYERS)
        trip = _sum(other, TRIP) - _sum(one, TRIP)
        return cls(layers, trip, sum(other.values()) - sum(one.values()) - layers - trip)

    def sentence(self) -> str:
        """For people: how much more or less a token takes in split, and what for."""
        more = "more" if self.total >= 0 else "less"
        parts = {
            "the way to the trunk and back": self.trip,
            "computing the layers in parts": self.layers,
            "the rest": self.rest,
        }
        said = ", ".join(f"{_signed(spent)} for {name}" for name, spent in parts.items())
        return f"On average, split takes {abs(self.total) * 1e3:.1f} ms {more} for each token: {said}."


def _signed(seconds: float) -> str:
    return f"{seconds * 1e3:+.1f} ms".replace("-", "\N{MINUS SIGN}")


def _sum(parts: Mapping[str, float], names: Iterable[str]) -> float:
    return sum(parts.get(name, 0.0) for name in names)


def _mean(found: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """The mean of each part over the runs that have tokens after the first."""
    listed = [each for each in found if each]
    names = {name for each in listed for name in each}
    return {name: fmean(each.get(name, 0.0) for each in listed) for name in names}

"""Paired ratios: what is compared runs in random order in each block, and the blocks' log ratios are averaged."""

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import TypeVar

from scipy import stats

Result = TypeVar("Result")


@dataclass(frozen=True)
class Ratio:
    """The geometric mean ratio of a pair's two values, with its 95% interval (paired t on log ratios)."""

    mean: float
    low: float
    high: float
    pairs: int

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}], {self.pairs} pairs"


def ratio(values: Sequence[float], baselines: Sequence[float]) -> Ratio:
    """values / baselines, pair by pair; at least two pairs."""
    logs = [math.log(value / baseline) for value, baseline in zip(values, baselines, strict=True)]
    middle = fmean(logs)
    half = float(stats.t.ppf(0.975, len(logs) - 1)) * stdev(logs) / math.sqrt(len(logs))
    return Ratio(math.exp(middle), math.exp(middle - half), math.exp(middle + half), len(logs))


def blocks(
    arms: Mapping[str, Callable[[], Result]], count: int, seed: int = 0, say: Callable[[str], None] = print
) -> dict[str, list[Result]]:
    """Run every arm once in each of `count` blocks, in an order shuffled anew."""
    order = random.Random(seed)
    found: dict[str, list[Result]] = {name: [] for name in arms}
    for block in range(count):
        for name in order.sample(list(arms), len(arms)):
            found[name].append(arms[name]())
        say(f"block {block + 1} of {count}")
    return found

"""Statistics of paired timings: pure functions over numbers.

All intervals are paired t intervals on log ratios. Each block gives one ratio treated / control; the logarithms are
taken as independent draws about the log of the true ratio. What a block's runs share (slow drift, the state of the
machine) cancels in the ratio. The shuffled order within a block makes the rest as likely to favour one arm as the
other.

Sequential use: look at the data only after the numbers of pairs that `looks(max_pairs)` lists. Each look spends alpha /
(number of looks), so the intervals of all looks together cover at the stated level however the looks depend on each
other (Bonferroni; the "repeated confidence intervals" of Jennison and Turnbull, Group Sequential Methods, 2000, chapter
9, with equal spending). An experiment that runs out of time looks once more, and has still used no more looks than
planned. The number of looks is fixed before the first pair.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import special

from splitlearn.errors import InputError

Verdict = Literal["faster", "slower", "no measurable effect", "inconclusive"]
Logs = NDArray[np.float64]
MIN_PAIRS = 2
# Pairs at the first look. By chance the same arm comes first in all n blocks with probability 2 ** (1 - n); an effect
# of the place in the block then looks like one of the flag. This must be rarer than what a look may spend.
FIRST_LOOK = 8
GROWTH = 1.5  # the factor from look to look; closer looks cost more in alpha than they save in pairs
POWER = 0.9


@dataclass(frozen=True)
class Effect:
    """The geometric mean of treated / control over `pairs` pairs, with its interval, all as ratios.

    The interval from `low` to `high` covers the true ratio at the rate `level`; under sequential use, at all looks
    together. `p_value` is that of "the ratio is 1", in the same terms: below 1 - `level` exactly where the interval
    excludes 1. `sd` is the standard deviation of the log ratios.
    """

    ratio: float
    low: float
    high: float
    level: float
    pairs: int
    p_value: float
    sd: float

    @property
    def excludes_one(self) -> bool:
        """Whether the interval excludes equal times."""
        return self.low > 1 or self.high < 1

    def beyond(self, noise: "Effect") -> bool:
        """Whether the interval is farther from 1, on its side, than any end of the interval of `noise` on either."""
        edge = max(noise.high, 1 / noise.low)
        return self.low > edge or self.high < 1 / edge

    def inside(self, delta: float) -> bool:
        """Whether the interval lies inside 1 / (1 + delta) to 1 + delta, which is symmetric on the log scale."""
        return 1 / (1 + delta) < self.low and self.high < 1 + delta

    def __str__(self) -> str:
        return f"{self.ratio:.3f} [{self.low:.3f}, {self.high:.3f}], {self.pairs} pairs"


@dataclass(frozen=True)
class Decision:
    """The verdict on one question, and the effect that it rests on.

    `more_pairs` is how many more pairs an inconclusive question probably needs; None for the others.
    """

    effect: Effect
    verdict: Verdict
    more_pairs: int | None


@dataclass(frozen=True)
class Drift:
    """The factor by which values grow from one pair to the next, and the p-value of "they do not"."""

    per_pair: float
    p_value: float


def effect(treated: Sequence[float], control: Sequence[float], level: float = 0.95) -> Effect:
    """The effect over pairs of positive values of one unit, the i-th of each from the same block.

    Raises InputError for fewer than two pairs, for sequences of different length, and for values that are not positive
    and finite.
    """
    return _effect(_log_ratios(treated, control), level, 1)


def looks(max_pairs: int) -> tuple[int, ...]:
    """The numbers of pairs at which to look at the data: a geometric series that ends at `max_pairs`.

    It begins at 8 to 12 pairs; a `max_pairs` below 12 is the only look. Raises InputError for fewer than two pairs.
    """
    if max_pairs < MIN_PAIRS:
        raise InputError("pairs", max_pairs, f"at least {MIN_PAIRS}")
    schedule = [max_pairs]
    while (earlier := round(max_pairs / GROWTH ** len(schedule))) >= FIRST_LOOK:
        schedule.append(earlier)
    return tuple(reversed(schedule))


def decide(
    ratios: Mapping[str, tuple[Sequence[float], Sequence[float]]], delta: float, looks: int, alpha: float = 0.05
) -> dict[str, Decision]:
    """A decision for each question of one family: `ratios` maps its name to its (treated, control) values.

    * no measurable effect: the interval lies inside 1 / (1 + delta) to 1 + delta, even if it excludes 1;
    * faster, slower: it excludes 1 and does not lie inside;
    * inconclusive: neither.

    `looks` is how many looks there will be in all; 1 for a number of pairs that was fixed before. The questions are the
    same at each look.

    The intervals are those of Holm's procedure (Scandinavian Journal of Statistics 6, 1979): of m questions the one
    with the smallest p-value gets the level 1 - alpha / m, and as long as 1 is excluded the next gets
    1 - alpha / (m - 1), and so on; the rest get the level at which that ended. So the chance that any question whose
    true ratio is 1 is called faster or slower, at any look, is at most `alpha`. The chance that an effect of `delta` or
    more is called no measurable effect is at most alpha / 2 for each question by itself.

    Raises InputError as `effect` does, and for a `delta` that is not positive or for no look.
    """
    if delta <= 0:
        raise InputError("delta", delta, "a number above 0")
    if looks < 1:
        raise InputError("looks", looks, "at least 1")
    logs = {name: _log_ratios(*values) for name, values in ratios.items()}
    found: dict[str, Decision] = {}
    sharing = len(logs)
    for name in sorted(logs, key=lambda name: _p_value(logs[name])):
        estimate = _effect(logs[name], 1 - alpha / sharing, looks)
        found[name] = _decision(estimate, delta, looks)
        # If one does not exclude 1, no later one does at the same level: their p-values are larger.
        sharing -= estimate.excludes_one
    return {name: found[name] for name in ratios}


def withheld(noise: Effect, delta: float) -> str | None:
    """Why this A/A effect does not pass the check, or None if it does.

    Its interval must cover 1, and on the log scale half its width must be at most log(1 + delta). If it does not pass,
    a verdict stands only where the effect is `beyond` it.
    """
    interval = f"the interval of the same arm against itself, {noise.low:.4f} to {noise.high:.4f},"
    if noise.excludes_one:
        return f"{interval} does not cover 1: something other than the flags differs between runs"
    width = math.sqrt(noise.high / noise.low) - 1
    if width > delta:
        return f"{interval} is ±{width:.1%}, wider than the ±{delta:.1%} that counts as no effect"
    return None


def drift(values: Sequence[float]) -> Drift:
    """The trend of positive values in the order of their pairs: Theil-Sen slope of the logs, Mann-Kendall p-value.

    Both bear slow outliers. The p-value takes the values as independent about the trend: where they are not (the
    machine's state lasts for some blocks) it is too small. Raises InputError as `effect` does.
    """
    from scipy import stats  # here: it takes as long to import as half of the page

    logs = _logs(values)
    _check_count(len(logs))
    times = np.arange(len(logs))
    p_value = float(stats.kendalltau(times, logs).pvalue)
    # Equal values have no rank correlation, and no drift.
    return Drift(_exp(float(stats.theilslopes(logs, times).slope)), 1.0 if math.isnan(p_value) else p_value)


def _log_ratios(treated: Sequence[float], control: Sequence[float]) -> Logs:
    if len(treated) != len(control):
        raise InputError("pairs", f"{len(treated)} and {len(control)} values", "as many of the one as of the other")
    _check_count(len(treated))
    return _logs(treated) - _logs(control)


def _logs(values: Sequence[float]) -> Logs:
    given = np.asarray(values, dtype=np.float64)
    wrong = given[~((given > 0) & np.isfinite(given))]
    if len(wrong):
        raise InputError("timing", float(wrong[0]), "a positive number")
    return np.log(given)


def _check_count(pairs: int) -> None:
    if pairs < MIN_PAIRS:
        raise InputError("pairs", pairs, f"at least {MIN_PAIRS}")


def _effect(logs: Logs, level: float, looks: int) -> Effect:
    mean, sd, pairs = float(np.mean(logs)), float(np.std(logs, ddof=1)), len(logs)
    half = _quantile(level, looks, pairs) * sd / math.sqrt(pairs)
    p_value = min(1.0, _p_value(logs) * looks)
    return Effect(_exp(mean), _exp(mean - half), _exp(mean + half), level, pairs, p_value, sd)


def _quantile(level: float, looks: int, pairs: int) -> float:
    """The t quantile of one look's two-sided interval."""
    return -float(special.stdtrit(pairs - 1, (1 - level) / looks / 2))


def _p_value(logs: Logs) -> float:
    """The p-value of "the mean is 0", for one look by itself."""
    mean, sd, pairs = float(np.mean(logs)), float(np.std(logs, ddof=1)), len(logs)
    if sd == 0:  # made-up values: every ratio is the same
        return float(mean == 0)
    return 2 * float(special.stdtr(pairs - 1, -abs(mean) / sd * math.sqrt(pairs)))


def _decision(estimate: Effect, delta: float, looks: int) -> Decision:
    if estimate.inside(delta):
        return Decision(estimate, "no measurable effect", None)
    if estimate.excludes_one:
        return Decision(estimate, "faster" if estimate.ratio < 1 else "slower", None)
    mean, edge = abs(math.log(estimate.ratio)), math.log1p(delta)
    # To leave 1 outside, or to lie inside delta (where either side may fail, so each gets half the chance of failing).
    wanted = ((mean, POWER), (edge - mean, (1 + POWER) / 2))
    enough = min(_pairs_for(distance, power, estimate, looks) for distance, power in wanted if distance > 0)
    return Decision(estimate, "inconclusive", max(1, enough - estimate.pairs))


def _pairs_for(distance: float, power: float, estimate: Effect, looks: int) -> int:
    """The least number of pairs with which the mean keeps `distance` (> 0, log scale) from its interval's end.

    With the chance `power`, at the sd and level of `estimate`: the usual sample size of a t test,
    n = ((t_n + z_power) sd / distance) ** 2, where t_n, being larger than the normal quantile, is found from below.
    """
    margin = float(special.ndtri(power))
    normal = -float(special.ndtri((1 - estimate.level) / looks / 2))
    pairs = max(MIN_PAIRS, math.ceil(((normal + margin) * estimate.sd / distance) ** 2))
    while (_quantile(estimate.level, looks, pairs) + margin) * estimate.sd > distance * math.sqrt(pairs):
        pairs += 1
    return pairs


def _exp(log: float) -> float:
    """exp, kept finite: with two pairs a high level's interval can reach beyond what a float holds."""
    return math.exp(max(-700.0, min(700.0, log)))

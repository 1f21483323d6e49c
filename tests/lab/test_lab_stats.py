"""The lab's statistics: the rules of the verdicts, and by simulation that the verdicts can be believed.

Simulated experiments (seeds fixed): blocks of arms in shuffled order; each run's log time is a drift of 30% over the
experiment, the machine's state (AR(1) over successive runs, sd 3%, correlation 0.9), 1% of its own noise, and, in 5% of
runs, an outlier that is 1.3 to 2 times slower. The numbers of experiments are such that the bounds asserted lie at
least two standard errors from the rates that longer simulations gave.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import signal, stats

from splitlearn.errors import InputError
from splitlearn.lab.stats import Decision, Effect, decide, drift, effect, looks, withheld

Times = NDArray[np.float64]
DELTA = 0.02
RECORDED = json.loads((Path(__file__).parents[1] / "data" / "recorded_tpot.json").read_text())
BUSY = np.array(json.loads((Path(__file__).parents[1] / "data" / "recorded_ttft.json").read_text())["ttft_s"])
CALLED = ("faster", "slower")


def _simulated(seed: int, experiments: int, pairs: int, effects: Sequence[float], outliers: float = 0.05) -> Times:
    """Times [experiments, pairs, arms], where arm i takes effects[i] times as long as it would at rest."""
    rng = np.random.default_rng(seed)
    shape = (experiments, pairs * len(effects))
    innovations = rng.standard_normal(shape) * 0.03 * math.sqrt(1 - 0.9**2)
    innovations[:, 0] /= math.sqrt(1 - 0.9**2)
    state = signal.lfilter([1], [1, -0.9], innovations)
    logs = state + np.linspace(0, math.log(1.3), shape[1]) + 0.01 * rng.standard_normal(shape)
    logs += np.where(rng.random(shape) < outliers, np.log(rng.uniform(1.3, 2, shape)), 0)
    in_order = logs.reshape(experiments, pairs, len(effects))
    order = rng.random(in_order.shape).argsort(-1)
    times: Times = np.exp(np.take_along_axis(in_order, order, -1)) * np.asarray(effects)
    return times


def _resampled(seed: int, experiments: int, pairs: int, planted: float) -> Times:
    """Times [experiments, pairs, 2] from the recorded ones: stretches of 10 successive blocks, so that what one block
    has of the next is kept; which of the two identical arms is the treated one is drawn anew, and slowed by `planted`.
    """
    rng = np.random.default_rng(seed)
    recorded = np.array([RECORDED["treated_s"], RECORDED["control_s"]]).T
    starts = rng.integers(len(recorded), size=(experiments, math.ceil(pairs / 10), 1))
    blocks = ((starts + np.arange(10)) % len(recorded)).reshape(experiments, -1)[:, :pairs]
    sides = rng.integers(2, size=blocks.shape)
    return np.stack([recorded[blocks, sides] * planted, recorded[blocks, 1 - sides]], axis=-1)


def _quickest(seed: int, experiments: int, pairs: int, planted: float, prefills: int = 9) -> Times:
    """Times [experiments, pairs, 2], each the quickest of so many prefills in turns, from those recorded on a busy
    machine: stretches of 6 successive rounds; two of the three arms, drawn anew, the first slowed by `planted`."""
    rng = np.random.default_rng(seed)
    count = pairs * prefills
    starts = rng.integers(len(BUSY), size=(experiments, math.ceil(count / 6), 1))
    rounds = ((starts + np.arange(6)) % len(BUSY)).reshape(experiments, -1)[:, :count]
    arms = rng.random((experiments, pairs, 1, 3)).argsort(-1)[..., :2]
    times: Times = BUSY[rounds.reshape(experiments, pairs, prefills, 1), arms].min(axis=2) * np.array([planted, 1])
    return times


def _one(treated: list[float], control: list[float], looks_in_all: int = 1) -> Decision:
    return decide({"q": (treated, control)}, DELTA, looks_in_all)["q"]


def _experiment(times: Times) -> Decision:
    """A sequential experiment of one question over `times` [pairs, 2], as it ends."""
    treated, control = times.T.tolist()
    schedule = looks(len(treated))
    for pairs in schedule:
        decision = _one(treated[:pairs], control[:pairs], len(schedule))
        if decision.verdict != "inconclusive":
            break
    return decision


def _share(times: Times, *verdicts: str) -> float:
    """Of the experiments in `times` [experiments, pairs, 2], those that end in one of `verdicts`."""
    return float(np.mean([_experiment(one).verdict in verdicts for one in times]))


def _with_moments(mean: float, sd: float, pairs: int) -> tuple[list[float], list[float]]:
    """Pairs whose log ratios have exactly this mean and sd."""
    logs = np.random.default_rng(0).standard_normal(pairs)
    logs = (logs - logs.mean()) / logs.std(ddof=1) * sd + mean
    return np.exp(logs).tolist(), [1.0] * pairs


# Believing the verdicts


def test_identical_arms_are_called_different_in_at_most_5_percent_of_experiments() -> None:
    assert _share(_simulated(1, 400, 365, (1, 1)), *CALLED) <= 0.05
    assert _share(_simulated(2, 400, 72, (1, 1), outliers=0), *CALLED) <= 0.05


def test_identical_arms_of_the_record_are_called_different_in_at_most_5_percent_of_experiments() -> None:
    assert _share(_resampled(3, 400, 160, 1), *CALLED) <= 0.05
    assert _one(RECORDED["treated_s"], RECORDED["control_s"]).verdict not in CALLED


@pytest.mark.parametrize(("outliers", "max_pairs"), [(0.0, 72), (0.05, 365)])
def test_5_percent_is_found_in_at_least_90_percent_of_experiments(outliers: float, max_pairs: int) -> None:
    assert _share(_simulated(4, 200, max_pairs, (1.05, 1), outliers), "slower") >= 0.9
    assert _share(_simulated(5, 200, max_pairs, (1, 1.05), outliers), "faster") >= 0.9


@pytest.mark.parametrize(("outliers", "max_pairs"), [(0.0, 72), (0.05, 2400)])
def test_3_percent_is_found_and_a_fifth_of_a_percent_is_not_measurable(outliers: float, max_pairs: int) -> None:
    assert _share(_simulated(6, 100, max_pairs, (1.03, 1), outliers), "slower") >= 0.9
    assert _share(_simulated(7, 100, max_pairs, (1.002, 1), outliers), "no measurable effect") >= 0.9


def test_planted_effects_are_found_in_the_record() -> None:
    assert _share(_resampled(8, 100, 1200, 1.05), "slower") >= 0.9
    assert _share(_resampled(9, 100, 2400, 1.03), "slower") >= 0.9
    assert _share(_resampled(10, 100, 2400, 1.002), "no measurable effect") >= 0.9


def test_5_percent_of_ttft_is_found_beside_other_programs_and_nothing_where_there_is_nothing() -> None:
    assert _share(_quickest(13, 200, 72, 1), *CALLED) <= 0.05
    assert _share(_quickest(14, 100, 72, 1.05), "slower") >= 0.8


@pytest.mark.parametrize(("mean", "verdict"), [(0.05, "slower"), (-0.03, "faster"), (0.001, "no measurable effect")])
def test_the_pairs_asked_for_give_the_verdict_9_times_in_10_and_half_as_many_do_not(mean: float, verdict: str) -> None:
    sd = 0.06
    pilot = _one(*_with_moments(mean, sd, 6))
    assert pilot.verdict == "inconclusive" and pilot.more_pairs is not None
    asked, rng = 6 + pilot.more_pairs, np.random.default_rng(11)
    for pairs, at_least, at_most in ((asked, 0.86, 0.95), (asked // 2, 0.0, 0.75)):
        ratios = np.exp(mean + sd * rng.standard_normal((800, pairs))).tolist()
        assert at_least <= np.mean([_one(one, [1.0] * pairs).verdict == verdict for one in ratios]) <= at_most


def test_intervals_cover_at_their_stated_rate() -> None:
    rng = np.random.default_rng(12)
    for pairs in (2, 6, 40):
        ratios = np.exp(0.05 + 0.03 * rng.standard_normal((3000, pairs))).tolist()
        found = [effect(one, [1.0] * pairs, 0.9) for one in ratios]
        assert np.mean([one.low <= math.exp(0.05) <= one.high for one in found]) == pytest.approx(0.9, abs=0.02)


@pytest.mark.parametrize("pairs", [6, 14, 72])
def test_intervals_cover_under_drift_outliers_and_autocorrelation(pairs: int) -> None:
    for times in (_simulated(13, 1000, pairs, (1.05, 1)), _resampled(14, 1000, pairs, 1.05)):
        found = [effect(*one.T.tolist()) for one in times]
        assert np.mean([one.low <= 1.05 <= one.high for one in found]) >= 0.92


def test_the_intervals_of_all_looks_together_cover_at_the_stated_rate() -> None:
    schedule = looks(72)
    for times in (_simulated(15, 400, 72, (1.01, 1), outliers=0), _resampled(16, 400, 72, 1.01)):
        covered = 0
        for one in times:
            treated, control = one.T.tolist()
            found = [_one(treated[:pairs], control[:pairs], len(schedule)).effect for pairs in schedule]
            covered += all(each.low <= 1.01 <= each.high for each in found)
        assert covered / len(times) >= 0.95


def test_of_many_flags_any_without_effect_is_called_in_at_most_5_percent_of_experiments() -> None:
    effects = (1, 1, 1, 1, 1, 1.05, 1.1, 0.9, 1)  # the last is the baseline that all are held against
    wrong, found = 0, 0
    for one in _simulated(17, 200, 32, effects, outliers=0):
        arms = one.T.tolist()
        questions = {str(arm): (arms[arm], arms[-1]) for arm in range(8)}
        schedule = looks(32)
        called = set()
        for pairs in schedule:
            cut = {name: (treated[:pairs], control[:pairs]) for name, (treated, control) in questions.items()}
            called |= {name for name, each in decide(cut, DELTA, len(schedule)).items() if each.verdict in CALLED}
        wrong += bool(called & set("01234"))
        found += called >= set("567")
    assert wrong / 200 <= 0.05
    assert found / 200 >= 0.9


def _adaptive(times: Times, max_pairs: int) -> dict[str, Decision]:
    """An experiment as the lab runs it, over `times` [pairs, arms], of which the last two are the baseline and the
    baseline again: questions that a look decides keep their pairs and drop out; the A/A check is gone on with in one
    block of four once it is passed; a verdict stands only where the check is passed or the effect is beyond it."""
    arms, schedule = times.T.tolist(), looks(max_pairs)
    pairs_of, checked = {str(arm): 0 for arm in range(len(arms) - 2)}, list[int]()
    going_on, standing = set(pairs_of), dict[str, Decision]()
    for block in range(max_pairs):
        last = _noise(arms, checked)
        passed = block >= schedule[0] and last is not None and withheld(last, DELTA) is None
        checked += [block] * (not passed or block % 4 == 0)
        pairs_of |= dict.fromkeys(going_on, block + 1)
        if block + 1 not in schedule:
            continue
        floor = _noise(arms, checked)
        assert floor is not None
        cut = {name: (arms[int(name)][:count], arms[-2][:count]) for name, count in pairs_of.items()}
        found = decide(cut, DELTA, len(schedule))
        standing = {n: d for n, d in found.items() if withheld(floor, DELTA) is None or d.effect.beyond(floor)}
        going_on = set(pairs_of) - {name for name, each in standing.items() if each.verdict != "inconclusive"}
        if not going_on:
            break
    return standing


def _noise(arms: list[list[float]], blocks: list[int]) -> Effect | None:
    if len(blocks) < 2:
        return None
    return effect([arms[-1][block] for block in blocks], [arms[-2][block] for block in blocks])


@pytest.mark.parametrize(("seed", "outliers"), [(21, 0.0), (22, 0.05)])
def test_flags_that_drop_out_when_decided_and_a_thinned_check_keep_false_verdicts_below_5_percent(
    seed: int, outliers: float
) -> None:
    wrong = found = 0
    for one in _simulated(seed, 200, 72, (1, 1, 1, 1, 1.05, 1.8, 1, 1), outliers):
        standing = _adaptive(one, 72)
        called = {name for name, each in standing.items() if each.verdict in CALLED}
        missed = {n for n, each in standing.items() if n in "45" and each.verdict == "no measurable effect"}
        wrong += bool(called & set("0123") or missed)
        found += "5" in called
    assert wrong / 200 <= 0.05
    assert found / 200 >= 0.95


def test_a_large_effect_stands_beside_a_noisy_check_and_a_small_one_does_not() -> None:
    noise = effect(*_with_moments(0, 0.1, 20))
    assert withheld(noise, DELTA) is not None
    assert effect(*_with_moments(0.6, 0.1, 20)).beyond(noise)
    assert effect(*_with_moments(-0.6, 0.1, 20)).beyond(noise)
    assert not effect(*_with_moments(0.04, 0.01, 20)).beyond(noise)


def test_an_effect_of_delta_is_called_not_measurable_in_at_most_its_half_of_alpha() -> None:
    ratios = np.exp(math.log1p(DELTA) + 0.02 * np.random.default_rng(18).standard_normal((2000, 50))).tolist()
    assert np.mean([_one(one, [1.0] * 50).verdict == "no measurable effect" for one in ratios]) <= 0.04


# The rules


def test_the_effect_is_the_paired_t_interval_of_scipy_on_log_ratios() -> None:
    treated, control = [1.1, 2.3, 2.9, 4.4], [1.0, 2.0, 3.0, 4.0]
    logs = np.log(treated) - np.log(control)
    expected = stats.ttest_1samp(logs, 0)
    interval = expected.confidence_interval(0.99)
    found = effect(treated, control, 0.99)
    assert found.ratio == pytest.approx(math.exp(logs.mean()))
    assert (found.low, found.high) == pytest.approx((math.exp(interval.low), math.exp(interval.high)))
    assert (found.p_value, found.sd) == pytest.approx((expected.pvalue, logs.std(ddof=1)))
    assert (found.level, found.pairs) == (0.99, 4)


@pytest.mark.parametrize(
    ("mean", "sd", "verdict"),
    [
        (0.010, 0.001, "no measurable effect"),  # inside delta, though it excludes 1
        (0.030, 0.001, "slower"),
        (-0.030, 0.001, "faster"),
        (0.019, 0.004, "slower"),  # excludes 1 and reaches out of delta
        (0.000, 0.050, "inconclusive"),
        (0.100, 0.500, "inconclusive"),
    ],
)
def test_the_verdict_follows_from_the_interval_that_is_shown(mean: float, sd: float, verdict: str) -> None:
    decision = _one(*_with_moments(mean, sd, 10))
    assert decision.verdict == verdict
    assert (decision.more_pairs is None) == (verdict != "inconclusive")


def test_the_questions_rejected_are_those_of_holm_by_the_p_values() -> None:
    rng = np.random.default_rng(19)
    for _ in range(30):
        logs = {str(i): rng.normal(rng.choice([0, 0.02, 0.04]), 0.03, 12) for i in range(6)}
        decisions = decide({name: (np.exp(each).tolist(), [1.0] * 12) for name, each in logs.items()}, 0.001, 1)
        rejected = set()
        for rank, name in enumerate(sorted(logs, key=lambda name: stats.ttest_1samp(logs[name], 0).pvalue)):
            if stats.ttest_1samp(logs[name], 0).pvalue > 0.05 / (6 - rank):
                break
            rejected.add(name)
        assert {name for name, each in decisions.items() if each.effect.excludes_one} == rejected
        left = {each.effect.level for name, each in decisions.items() if name not in rejected}
        assert left <= {1 - 0.05 / (6 - len(rejected))}
        assert all(
            (each.effect.p_value < 1 - each.effect.level) == each.effect.excludes_one for each in decisions.values()
        )


def test_more_looks_and_more_questions_widen_the_interval() -> None:
    values = _with_moments(0, 0.05, 20)
    alone, looked_at, beside = _one(*values), _one(*values, 7), decide({"q": values, "r": values}, DELTA, 1)["q"]
    assert alone.effect.high < looked_at.effect.high and alone.effect.level == looked_at.effect.level
    assert alone.effect.high < beside.effect.high


@pytest.mark.parametrize("max_pairs", [2, 7, 8, 10, 72, 100, 1000])
def test_looks_rise_to_the_limit_in_steps_of_about_half(max_pairs: int) -> None:
    schedule = looks(max_pairs)
    assert schedule[-1] == max_pairs
    assert all(1.3 < after / before < 1.8 for before, after in zip(schedule, schedule[1:], strict=False))
    assert min(8, max_pairs) <= schedule[0] <= 12
    assert looks(72) == (9, 14, 21, 32, 48, 72)


def test_verdicts_are_withheld_where_the_noise_is_wider_than_delta_or_not_about_1() -> None:
    assert withheld(effect(*_with_moments(0.001, 0.02, 20)), DELTA) is None
    assert "wider" in (withheld(effect(*_with_moments(0, 0.1, 20)), DELTA) or "")
    assert "does not cover 1" in (withheld(effect(*_with_moments(0.01, 0.001, 20)), DELTA) or "")


def test_a_drift_is_found_among_outliers_and_none_where_there_is_none() -> None:
    rng = np.random.default_rng(20)
    noise = np.exp(0.01 * rng.standard_normal((150, 60))) * np.where(rng.random((150, 60)) < 0.05, 1.6, 1)
    found = [drift((each * 1.001 ** np.arange(60)).tolist()) for each in noise]
    assert np.median([each.per_pair for each in found]) == pytest.approx(1.001, abs=0.0001)
    assert np.mean([each.p_value < 0.01 for each in found]) >= 0.95
    assert np.mean([drift(each.tolist()).p_value < 0.05 for each in noise]) <= 0.12
    assert drift([2.0, 2.0, 2.0]).p_value == 1


def test_equal_ratios_and_hopeless_ones_give_finite_numbers() -> None:
    assert _one([1.0, 2.0], [1.0, 2.0]).verdict == "no measurable effect"
    assert _one([1.5, 3.0], [1.0, 2.0]).verdict == "slower"
    hopeless = decide({str(name): ([1.0, 9.0], [9.0, 1.0]) for name in range(10)}, DELTA, 14)["0"]
    assert hopeless.verdict == "inconclusive" and math.isfinite(hopeless.effect.high)


def test_what_cannot_be_used_is_refused_by_name() -> None:
    good = [1.0, 2.0]
    for treated, control in (([1.0], [1.0]), ([1.0, 0.0], good), ([1.0, math.nan], good), ([1.0, 2.0, 3.0], good)):
        with pytest.raises(InputError, match="pairs|timing"):
            effect(treated, control)
    with pytest.raises(InputError, match="delta"):
        decide({"q": (good, good)}, 0, 1)
    with pytest.raises(InputError, match="looks"):
        decide({"q": (good, good)}, DELTA, 0)
    with pytest.raises(InputError, match="pairs"):
        looks(1)

"""Pairs up the runs of an experiment.

It says which blocks count, whether both sides of a pair did the same work, where a token's time went, and gives the
figures of each arm.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median

from splitlearn.errors import InputError
from splitlearn.lab.design import Arm, Question
from splitlearn.lab.records import FIRST_PASS, Trial
from splitlearn.metrics import LEDGER_ORDER, UNATTRIBUTED, first_divergence
from splitlearn.reporting.percentile import percentile

# The time breakdown must explain all but this share of the wall time.
UNATTRIBUTED_LIMIT = 0.005
Block = Mapping[str, Trial]


@dataclass(frozen=True)
class ServiceLevel:
    """A service level: the first token under `ttft_s` seconds, then more than `decode_tps` tokens per second.

    Raises InputError unless both are above 0.
    """

    ttft_s: float = 0.5
    decode_tps: float = 20.0

    def __post_init__(self) -> None:
        for name, value in (("ttft", self.ttft_s), ("tps", self.decode_tps)):
            if not 0 < value < math.inf:
                raise InputError(name, value, "a number above 0")


@dataclass(frozen=True)
class Exclusion:
    """An attempt at a block that does not count, and why."""

    block: int
    attempt: int
    why: str


@dataclass(frozen=True)
class Pair:
    """The two runs of one block that a question compares."""

    block: int
    treated: Trial
    control: Trial

    @property
    def unequal(self) -> str:
        """Why the two cannot be compared: how their work differs; "" if it does not."""
        one, other = self.treated, self.control
        facts = {
            "tokens": (len(one.token_ids), len(other.token_ids)),
            "dtype": (one.dtype, other.dtype),
            "threads": (one.threads, other.threads),
        }
        differing = [f"{name} {a} against {b}" for name, (a, b) in facts.items() if a != b]
        return f"block {self.block}: {', '.join(differing)}" if differing else ""


@dataclass(frozen=True)
class SameWork:
    """Whether the runs of a question's `pairs` pairs did the same work.

    `unequal` names the pairs that are not compared. `first_divergence` is the lowest index of a differing token id in
    any pair, `in_block` that pair's block; both are None if all ids are equal. `equal_share` is the share of equal ids,
    position by position, over all pairs; None without pairs.
    """

    pairs: int
    unequal: tuple[str, ...]
    first_divergence: int | None
    in_block: int | None
    equal_share: float | None

    @property
    def identical(self) -> bool:
        """Whether every pair has equal token ids."""
        return self.pairs > 0 and self.first_divergence is None


@dataclass(frozen=True)
class BreakdownEffect:
    """Mean seconds per token after the first, by part of the time breakdown, with and without the flag.

    `word` is the part that changed most, by `change_s` seconds per token (negative: less with the flag); None if one
    side has no breakdown. `pairs` counts the pairs.
    """

    treated: dict[str, float]
    control: dict[str, float]
    word: str | None
    change_s: float
    pairs: int


@dataclass(frozen=True)
class ArmFigures:
    """Medians of one arm over its `runs` runs that count: times in seconds, memory in bytes.

    Percentiles are None if there are too few values (`reporting.percentile`); those of ITL are over all `intervals`
    between tokens. `ledger` is mean seconds per token after the first. `unattributed` is the share of the wall time
    that no part explains, None without a breakdown. `others_cpu` is the mean of what other programs took, in cores.
    """

    arm: str
    kind: str
    runs: int
    ttft_s: float
    ttft_p95_s: float | None
    ttft_p99_s: float | None
    tpot_s: float | None
    intervals: int
    itl_p95_s: float | None
    itl_p99_s: float | None
    others_cpu: float
    load_s: float
    compile_s: float
    added_bytes: float
    dtype: str
    threads: int
    ledger: dict[str, float]
    unattributed: float | None
    meets_ttft: bool
    meets_decode_tps: bool | None

    @property
    def unexplained(self) -> bool:
        """Whether too much of the wall time is unattributed."""
        return self.unattributed is not None and self.unattributed > UNATTRIBUTED_LIMIT


def whole_blocks(trials: Sequence[Trial]) -> tuple[tuple[tuple[int, Block], ...], tuple[Exclusion, ...]]:
    """The blocks that count, by number, and the attempts that do not. The first pass is no block.

    An attempt counts if all its runs are there and good. Of two such attempts at a block the last one counts.
    """
    attempts: dict[tuple[int, int], list[Trial]] = {}
    for trial in (trial for trial in trials if trial.block != FIRST_PASS):
        attempts.setdefault((trial.block, trial.attempt), []).append(trial)
    whole: dict[int, Block] = {}
    left_out = []
    for (block, attempt), ran in sorted(attempts.items()):
        good = {trial.arm: trial for trial in ran if not trial.bad}
        wanted = ran[0].block_runs
        if len(good) < wanted:
            left_out.append(Exclusion(block, attempt, _why_not(ran, wanted - len(good), wanted)))
        else:
            whole[block] = good
    return tuple(whole.items()), tuple(left_out)


def _why_not(ran: Sequence[Trial], missing: int, of: int) -> str:
    """Why an attempt does not count."""
    bad = "; ".join(dict.fromkeys(trial.bad for trial in ran if trial.bad))
    return bad or f"not finished: {missing} of {of} arms had not run"


def pairs_of(question: Question, blocks: Sequence[tuple[int, Block]]) -> list[Pair]:
    """The question's two runs of each block that has both."""
    both = {question.treated, question.control}
    return [
        Pair(number, block[question.treated], block[question.control]) for number, block in blocks if both <= set(block)
    ]


def same_work(pairs: Sequence[Pair]) -> SameWork:
    """Whether both runs of each pair did the same work and gave the same tokens."""
    found = [(first_divergence(pair.treated.token_ids, pair.control.token_ids), pair.block) for pair in pairs]
    index, block = min(((at, number) for at, number in found if at is not None), default=(None, None))
    equal = longer = 0
    for pair in pairs:
        one, other = pair.treated.token_ids, pair.control.token_ids
        equal += sum(a == b for a, b in zip(one, other, strict=False))
        longer += max(len(one), len(other))
    unequal = tuple(pair.unequal for pair in pairs if pair.unequal)
    return SameWork(len(pairs), unequal, index, block, equal / longer if longer else None)


def breakdown_effect(pairs: Sequence[Pair]) -> BreakdownEffect:
    """The time breakdown of a decoded token in both runs of `pairs`, and the part that changed most."""
    treated = breakdown_per_token([pair.treated for pair in pairs])
    control = breakdown_per_token([pair.control for pair in pairs])
    both = {**control, **treated} if control and treated else {}
    change = {word: treated.get(word, 0.0) - control.get(word, 0.0) for word in both}
    word = max(change, key=lambda name: abs(change[name]), default=None)
    return BreakdownEffect(treated, control, word, change[word] if word else 0.0, len(pairs))


def breakdown_per_token(trials: Sequence[Trial]) -> dict[str, float]:
    """Mean seconds per token after the first, by part in the order of a step; {} without such tokens."""
    decoded = [trial for trial in trials if len(trial.token_ids) > 1]
    words = [word for word in LEDGER_ORDER if any(word in trial.decode_ledger for trial in decoded)]
    return {
        word: fmean(trial.decode_ledger.get(word, 0.0) / (len(trial.token_ids) - 1) for trial in decoded)
        for word in words
    }


def figures(arm: Arm, trials: Sequence[Trial], service: ServiceLevel) -> ArmFigures:
    """The figures of `arm` from its runs that count, at least one."""
    ttft = [trial.ttft_s for trial in trials]
    tpot = [trial.tpot_s for trial in trials if trial.tpot_s is not None]
    itl = [interval for trial in trials for interval in trial.itl_s]
    ttft_s, tpot_s = median(ttft), median(tpot) if tpot else None
    wall = sum(sum(trial.ledger.values()) for trial in trials)
    unattributed = sum(abs(trial.ledger.get(UNATTRIBUTED, 0.0)) for trial in trials)
    return ArmFigures(
        arm=arm.name,
        kind=arm.kind,
        runs=len(trials),
        ttft_s=ttft_s,
        ttft_p95_s=percentile(ttft, 0.95),
        ttft_p99_s=percentile(ttft, 0.99),
        tpot_s=tpot_s,
        intervals=len(itl),
        itl_p95_s=percentile(itl, 0.95),
        itl_p99_s=percentile(itl, 0.99),
        others_cpu=fmean(trial.others_cpu for trial in trials),
        load_s=median(trial.load_s for trial in trials),
        compile_s=median(trial.compile_s for trial in trials),
        added_bytes=median(trial.added_bytes for trial in trials),
        dtype=trials[-1].dtype,
        threads=trials[-1].threads,
        ledger=breakdown_per_token(trials),
        unattributed=unattributed / wall if wall else None,
        meets_ttft=ttft_s < service.ttft_s,
        meets_decode_tps=1 / tpot_s > service.decode_tps if tpot_s else None,
    )

"""Computes an experiment's findings about each flag from its runs. Pure: no clock, no file, no model.

A ratio is treated / control of one block; below 1 the flag makes it faster. Only whole blocks count. For each metric
the questions of both kinds of arm are one family (Holm), without the checks.

Verdicts are taken at the looks that were fixed before (`Setup.looks`), and at the end. Between two looks the intervals
go on with the data, and the verdict is that of the last look. The arms of a question that is decided for both metrics
may drop out of later blocks. Its p-value at its last look is at least the smallest of all looks, for which the looks
share the level; so the chance of a false verdict stays what it was.

The note "failed" ({arm: reason}) names arms that cannot be run; their questions are "unavailable". The note "fidelity"
({flag: {kind: figures}}) has what the flag does to the logits.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

from splitlearn.arms.compare import KINDS
from splitlearn.events import Kind
from splitlearn.lab import stats
from splitlearn.lab.analysis.pairing import (
    ArmFigures,
    BreakdownEffect,
    Exclusion,
    Pair,
    SameWork,
    ServiceLevel,
    breakdown_effect,
    figures,
    pairs_of,
    same_work,
    whole_blocks,
)
from splitlearn.lab.design import AA, Plan, Question
from splitlearn.lab.records import Setup, Trial
from splitlearn.lab.store import Store

Metric = Literal["ttft_s", "tpot_s"]
METRICS: tuple[Metric, ...] = ("ttft_s", "tpot_s")
METRIC_NAMES: Mapping[Metric, str] = {"ttft_s": "TTFT", "tpot_s": "TPOT"}
# The verdicts beside those of stats.decide.
FAILED, WITHHELD, UNAVAILABLE, NO_PAIRS = "FAILED", "withheld", "unavailable", "no verdict yet"
PASSED, NOT_PASSED = "check passed", "check not passed"
DECIDED = ("faster", "slower", "no measurable effect", FAILED)
SERVICE = ServiceLevel()


@dataclass(frozen=True)
class Row:
    """One question about one metric.

    `treated_s` and `control_s` are medians in seconds over the compared pairs, `noise` the A/A effect of the same kind
    and metric. `reason` is why there is no verdict on speed.
    """

    question: Question
    metric: Metric
    verdict: str
    reason: str
    effect: stats.Effect | None
    more_pairs: int | None
    treated_s: float | None
    control_s: float | None
    noise: stats.Effect | None

    @property
    def decided(self) -> bool:
        """Whether more pairs cannot be expected to change the verdict."""
        return self.verdict in DECIDED

    @property
    def text(self) -> str:
        """The verdict for a table. The A/A row has the reason for withheld ones."""
        if self.verdict == WITHHELD:
            return f"{WITHHELD} (see {AA})"
        if self.reason:
            return f"{self.verdict}: {self.reason}"
        return f"{self.verdict} ({self.more_pairs} more pairs needed)" if self.more_pairs else self.verdict


@dataclass(frozen=True)
class Evidence:
    """What a question's pairs show besides times.

    `fidelity` is the flag's (exact for a check, whose sides have the same flags). `failure` is the broken promise of an
    exact flag, or "". `numbers` is the note on logits: `largest`, `first_divergence`, `perplexity_ratio`.
    """

    question: Question
    fidelity: str
    pairs: tuple[Pair, ...]
    work: SameWork
    ledger: BreakdownEffect
    numbers: Mapping[str, Any]
    failure: str

    def compared(self, metric: Metric) -> list[tuple[int, float, float]]:
        """(block, treated, control) in seconds, of the pairs that did the same work: TPOT, and the quickest TTFT.

        Other programs only ever make a prefill longer, so the quickest of several tells most of the flag.
        """
        values = [
            (p.block, _time_s(p.treated, metric), _time_s(p.control, metric)) for p in self.pairs if not p.unequal
        ]
        return [(block, one, other) for block, one, other in values if one and other]


def _time_s(run: Trial, metric: Metric) -> float | None:
    return min(run.prefills_s) if metric == "ttft_s" else run.tpot_s


@dataclass(frozen=True)
class Noise:
    """The A/A effect of one kind and metric. `withheld` is why it allows no verdicts, or None."""

    kind: Kind
    metric: Metric
    effect: stats.Effect | None
    withheld: str | None


@dataclass(frozen=True)
class Findings:
    """An experiment so far: its setup, every trial, and what follows from them. `blocks` counts whole blocks.

    `drift` is that of the baseline's TPOT from block to block, for each kind; None before two blocks.
    """

    setup: Setup
    trials: tuple[Trial, ...]
    notes: Mapping[str, Any]
    finished: str | None
    service: ServiceLevel
    blocks: int
    left_out: tuple[Exclusion, ...]
    rows: tuple[Row, ...]
    evidence: Mapping[str, Evidence]
    noise: tuple[Noise, ...]
    arms: tuple[ArmFigures, ...]
    drift: Mapping[Kind, stats.Drift | None]

    @property
    def flag_rows(self) -> list[Row]:
        """The rows about flags whose arms can run."""
        return [row for row in self.rows if row.question.flag != AA and row.verdict != UNAVAILABLE]

    @property
    def decided(self) -> bool:
        """Whether every verdict is decided."""
        return all(row.decided for row in self.flag_rows)

    @property
    def open_questions(self) -> list[Question]:
        """The questions about flags with a verdict still to come."""
        return list(dict.fromkeys(row.question for row in self.flag_rows if not row.decided))

    def passed(self, kind: Kind) -> bool:
        """Whether the A/A check of `kind` is passed for every metric."""
        return all(floor.withheld is None for floor in self.noise if floor.kind == kind)

    @property
    def more_pairs(self) -> int | None:
        """The most pairs that any verdict still needs; None if unknown."""
        return max((row.more_pairs for row in self.flag_rows if row.more_pairs), default=None)


def findings_of(store: Store, service: ServiceLevel = SERVICE) -> Findings:
    """The findings so far of the experiment in `store`."""
    return analyse(store.setup, store.trials(), store.notes(), store.finished, service)


def good_blocks(store: Store) -> list[tuple[int, int]]:
    """(block, attempt) of every whole block in `store`."""
    blocks, _ = whole_blocks(store.trials())
    return [(number, next(iter(block.values())).attempt) for number, block in blocks]


def analyse(
    setup: Setup,
    trials: Sequence[Trial],
    notes: Mapping[str, Any],
    finished: str | None = None,
    service: ServiceLevel = SERVICE,
) -> Findings:
    """The findings from `trials`. `finished` is why the experiment ended, None while it runs."""
    runnable = _runnable(setup, notes)
    blocks, left_out = whole_blocks(trials)
    # After the last look; at the end there is one more.
    look = len(blocks) if finished else max((look for look in setup.looks if look <= len(blocks)), default=0)
    runnable_questions = [
        question for question in setup.plan.questions if {question.treated, question.control} <= set(runnable)
    ]
    evidence = {
        question.key: _evidence(setup.plan, question, pairs_of(question, blocks), notes)
        for question in runnable_questions
    }
    noise = tuple(_noise(kind, metric, evidence, setup) for kind in KINDS for metric in METRICS)
    return Findings(
        setup=setup,
        trials=tuple(trials),
        notes=notes,
        finished=finished,
        service=service,
        blocks=len(blocks),
        left_out=left_out,
        rows=_rows(setup, evidence, noise, notes, look),
        evidence=evidence,
        noise=noise,
        arms=tuple(
            figures(setup.plan.arm(name), runs, service)
            for name in runnable
            if (runs := [block[name] for _, block in blocks if name in block])
        ),
        drift={kind: _drift(kind, evidence) for kind in KINDS},
    )


def _runnable(setup: Setup, notes: Mapping[str, Any]) -> list[str]:
    failed = notes.get("failed", {})
    return [arm.name for arm in setup.plan.arms if arm.name not in failed]


def _evidence(plan: Plan, question: Question, pairs: Sequence[Pair], notes: Mapping[str, Any]) -> Evidence:
    fidelity = plan.fidelity(question)
    work = same_work(pairs)
    numbers = notes.get("fidelity", {}).get(question.flag, {}).get(question.kind, {})
    failure = ""
    if fidelity == "exact" and work.first_divergence is not None:
        what = "same flags" if question.flag == AA else "exact flag"
        failure = f"{what}, tokens differ at token {work.first_divergence + 1} of block {work.in_block}"
    return Evidence(question, fidelity, tuple(pairs), work, breakdown_effect(pairs), numbers, failure)


def _noise(kind: Kind, metric: Metric, evidence: Mapping[str, Evidence], setup: Setup) -> Noise:
    found = next((e for e in evidence.values() if e.question.flag == AA and e.question.kind == kind), None)
    effect = _effect(found, metric) if found else None
    withheld = stats.withheld(effect, setup.delta) if effect else "no A/A pairs"
    return Noise(kind, metric, effect, withheld)


def _effect(evidence: Evidence, metric: Metric) -> stats.Effect | None:
    pairs = evidence.compared(metric)
    return (
        stats.effect([one for _, one, _ in pairs], [other for _, _, other in pairs])
        if len(pairs) >= stats.MIN_PAIRS
        else None
    )


def _rows(
    setup: Setup, evidence: Mapping[str, Evidence], noise: Sequence[Noise], notes: Mapping[str, Any], look: int
) -> tuple[Row, ...]:
    now = {metric: _decisions(evidence, metric, setup) for metric in METRICS}
    then = {metric: _decisions(evidence, metric, setup, look) for metric in METRICS}
    floors = {(floor.kind, floor.metric): floor for floor in noise}
    rows = []
    for question in setup.plan.questions:
        for metric in METRICS:
            found, floor = evidence.get(question.key), floors[question.kind, metric]
            if found is None:
                reasons = [notes["failed"].get(name) for name in (question.treated, question.control)]
                reason = next(filter(None, reasons))
                rows.append(Row(question, metric, UNAVAILABLE, reason, None, None, None, None, floor.effect))
            else:
                key = question.key
                rows.append(_row(found, metric, now[metric].get(key), then[metric].get(key), floor))
    return tuple(rows)


def _decisions(
    evidence: Mapping[str, Evidence], metric: Metric, setup: Setup, most: int | None = None
) -> dict[str, stats.Decision]:
    """One family: every question about a flag, of both kinds, that has at least two pairs. Of each the first `most`
    pairs; None for all."""
    family = {}
    for key, found in evidence.items():
        pairs = found.compared(metric)[:most]
        if found.question.flag != AA and len(pairs) >= stats.MIN_PAIRS:
            family[key] = ([one for _, one, _ in pairs], [other for _, _, other in pairs])
    return stats.decide(family, setup.delta, len(setup.looks)) if family else {}


def _row(found: Evidence, metric: Metric, now: stats.Decision | None, then: stats.Decision | None, floor: Noise) -> Row:
    """`now` has the effect over all pairs, `then` the verdict of the last look."""
    effect = now.effect if now else _effect(found, metric)
    verdict, reason = _verdict(found, then, floor, effect)
    pairs = found.compared(metric)
    return Row(
        question=found.question,
        metric=metric,
        verdict=verdict,
        reason=reason,
        effect=effect,
        more_pairs=now.more_pairs if now and verdict == "inconclusive" else None,
        treated_s=median(one for _, one, _ in pairs) if pairs else None,
        control_s=median(other for _, _, other in pairs) if pairs else None,
        noise=floor.effect,
    )


def _verdict(
    found: Evidence, decision: stats.Decision | None, floor: Noise, effect: stats.Effect | None
) -> tuple[str, str]:
    """The verdict and its reason: a broken promise first, then the decision, if the noise floor allows it.

    A check has no decision.
    """
    if found.failure:
        return FAILED, found.failure
    if found.question.flag == AA:
        return (NOT_PASSED, floor.withheld) if floor.withheld else (PASSED, "")
    if decision is None:
        count = len(found.pairs) - len(found.work.unequal)
        return NO_PAIRS, found.work.unequal[0] if found.work.unequal else f"n = {count}"
    beyond = floor.effect is not None and decision.effect.beyond(floor.effect)
    if floor.withheld and decision.verdict != "inconclusive" and not beyond:
        return WITHHELD, floor.withheld
    return decision.verdict, ""


def _drift(kind: Kind, evidence: Mapping[str, Evidence]) -> stats.Drift | None:
    """The drift of the baseline's TPOT, in the order of its runs."""
    found = next((e for e in evidence.values() if e.question.flag == AA and e.question.kind == kind), None)
    runs = sorted((pair.control for pair in found.pairs), key=lambda trial: trial.at_s) if found else []
    values = [trial.tpot_s for trial in runs if trial.tpot_s]
    return stats.drift(values) if len(values) >= stats.MIN_PAIRS else None

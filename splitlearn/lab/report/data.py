"""Findings as tables for pandas and as plain JSON.

Times are in seconds, memory in bytes, ratios treated / control; the columns' names have the units. A missing figure is
empty.
"""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import pandas as pd

from splitlearn.lab.analysis.findings import METRICS, Findings, Row
from splitlearn.lab.analysis.flags_table import flags_table
from splitlearn.lab.published_claims import claim
from splitlearn.lab.stats import Effect


def verdicts(findings: Findings) -> pd.DataFrame:
    """One row for each question and metric."""
    return pd.DataFrame([_verdict(findings, row) for row in findings.rows])


def pairs(findings: Findings) -> pd.DataFrame:
    """One row for each compared pair of each question and metric."""
    rows = [
        (found.question.flag, found.question.kind, block, metric, treated, control, treated / control)
        for found in findings.evidence.values()
        for metric in METRICS
        for block, treated, control in found.compared(metric)
    ]
    return pd.DataFrame(rows, columns=["flag", "kind", "block", "metric", "treated_s", "control_s", "ratio"])


def trials(findings: Findings) -> pd.DataFrame:
    """One row for each run, also those that do not count (`bad` says why).

    The time breakdown of the whole run and of the steps after the first token has columns of its own.
    """
    return pd.DataFrame([_trial(trial.as_json()) for trial in findings.trials])


def arms(findings: Findings) -> pd.DataFrame:
    """One row for each arm; the time breakdown is in seconds per token after the first."""
    rows = [asdict(arm) for arm in findings.arms]
    for row in rows:
        row.update({f"{word}_s_per_token": value for word, value in row.pop("ledger").items()})
    return pd.DataFrame(rows)


def as_json(findings: Findings) -> dict[str, Any]:
    """Everything: the setup, the findings, and each run."""
    return {
        "setup": findings.setup.as_json(),
        "finished": findings.finished,
        "service_level": asdict(findings.service),
        "blocks": findings.blocks,
        "flags_table": flags_table(findings).as_json(),
        "left_out": [asdict(turn) for turn in findings.left_out],
        "verdicts": [_verdict(findings, row) for row in findings.rows],
        "noise": [asdict(floor) for floor in findings.noise],
        "work": {key: asdict(found.work) for key, found in findings.evidence.items()},
        "ledgers": {key: asdict(found.ledger) for key, found in findings.evidence.items()},
        "arms": [asdict(arm) for arm in findings.arms],
        "drift": {kind: asdict(drift) if drift else None for kind, drift in findings.drift.items()},
        "notes": dict(findings.notes),
        "trials": [trial.as_json() for trial in findings.trials],
    }


def _verdict(findings: Findings, row: Row) -> dict[str, Any]:
    found, levels = findings.evidence.get(row.question.key), {arm.arm: arm for arm in findings.arms}
    treated, control = levels.get(row.question.treated), levels.get(row.question.control)
    work, ledger = (found.work, found.ledger) if found else (None, None)
    numbers: Mapping[str, Any] = found.numbers if found else {}
    return {
        "flag": row.question.flag,
        "kind": row.question.kind,
        "metric": row.metric,
        "treated": row.question.treated,
        "control": row.question.control,
        "verdict": row.verdict,
        "reason": row.reason,
        "more_pairs": row.more_pairs,
        **_effect(row.effect),
        "treated_median_s": row.treated_s,
        "control_median_s": row.control_s,
        "noise_low": row.noise.low if row.noise else None,
        "noise_high": row.noise.high if row.noise else None,
        "fidelity": found.fidelity if found else None,
        "same_tokens": work.identical if work else None,
        "first_divergence": work.first_divergence if work else None,
        "equal_tokens_share": work.equal_share if work else None,
        "pairs_left_out": "; ".join(work.unequal) if work else None,
        "logits_largest_difference": numbers.get("largest"),
        "logits_first_divergence": numbers.get("first_divergence"),
        "perplexity_ratio": numbers.get("perplexity_ratio"),
        "ledger_word": ledger.word if ledger else None,
        "ledger_change_s_per_token": ledger.change_s if ledger else None,
        "treated_ttft_met": treated.meets_ttft if treated else None,
        "treated_decode_tps_met": treated.meets_decode_tps if treated else None,
        "control_ttft_met": control.meets_ttft if control else None,
        "control_decode_tps_met": control.meets_decode_tps if control else None,
        "claim": claim(findings, row),
    }


def _effect(effect: Effect | None) -> dict[str, Any]:
    names = ("pairs", "ratio", "low", "high", "level", "p_value")
    return {name: getattr(effect, name) if effect else None for name in names}


def _trial(row: dict[str, Any]) -> dict[str, Any]:
    ledger, decode_ledger = row.pop("ledger"), row.pop("decode_ledger")
    lists = {name: " ".join(map(str, row.pop(name))) for name in ("itl_s", "token_ids")}
    return {
        **row,
        "tokens": len(lists["token_ids"].split()),
        **{f"ledger_{word}_s": value for word, value in ledger.items()},
        **{f"decode_ledger_{word}_s": value for word, value in decode_ledger.items()},
        **lists,
    }

"""What an experiment says, on runs with planted effects: the right rows, the honesty gates, what does not count."""

from dataclasses import replace
from pathlib import Path

import pytest

from splitlearn.lab.analysis.findings import (
    FAILED,
    NOT_PASSED,
    UNAVAILABLE,
    WITHHELD,
    Findings,
    Row,
    analyse,
    good_blocks,
)
from splitlearn.lab.analysis.pairing import ServiceLevel
from splitlearn.lab.design import AA, Arm
from splitlearn.lab.published_claims import CLAIMS, claim, measured
from splitlearn.lab.records import Trial
from splitlearn.lab.report import data
from splitlearn.lab.store import Store
from tests.support.lab_trials import TOKENS, setup, trials

SETUP = setup()
WITHOUT = "without inference_mode, full"


def row(findings: Findings, flag: str, kind: str, metric: str) -> Row:
    found = [r for r in findings.rows if (r.question.flag, r.question.kind, r.metric) == (flag, kind, metric)]
    assert len(found) == 1
    return found[0]


def test_a_planted_effect_is_found_on_its_row_and_on_no_other() -> None:
    findings = analyse(SETUP, trials(SETUP, {(WITHOUT, "tpot_s"): 1.10}), {})
    found = row(findings, "inference_mode", "full", "tpot_s")
    assert found.verdict == "faster"
    assert found.effect is not None
    assert found.effect.ratio == pytest.approx(1 / 1.10, rel=0.01)
    assert found.effect.pairs == 12
    others = [r for r in findings.flag_rows if r is not found]
    assert len(others) == 15
    assert {r.verdict for r in others} == {"no measurable effect"}
    assert findings.decided


def test_prefills_that_were_disturbed_do_not_change_the_ratio_of_ttft() -> None:
    def disturbed(arm: Arm, trial: Trial) -> Trial:
        slow = 3 * trial.ttft_s
        return replace(trial, prefills_s=(slow, trial.ttft_s, slow), ttft_s=slow) if arm.name == WITHOUT else trial

    findings = analyse(SETUP, trials(SETUP, change=disturbed), {})
    assert row(findings, "inference_mode", "full", "ttft_s").verdict == "no measurable effect"
    assert next(arm.ttft_s for arm in findings.arms if arm.arm == WITHOUT) > 0.5, "the table shows the median run"


def test_the_ledger_names_the_part_that_changed() -> None:
    findings = analyse(SETUP, trials(SETUP, {("without use_cache, split", "tpot_s"): 1.5}), {})
    ledger = findings.evidence["use_cache, split"].ledger
    assert ledger.word == "trunk"
    assert ledger.change_s == pytest.approx(-0.015, rel=0.05)
    assert sum(ledger.control.values()) == pytest.approx(0.045, rel=0.05), "the parts sum to the time per token"


def test_questions_of_both_kinds_and_all_flags_are_one_family() -> None:
    findings = analyse(SETUP, trials(SETUP), {})
    levels = {r.effect.level for r in findings.flag_rows if r.effect}
    assert max(levels) <= 1 - 0.05 / 8 + 1e-12, "Holm over eight questions"
    floor = row(findings, AA, "full", "tpot_s").effect
    assert floor is not None
    assert floor.level == 0.95, "the check is not one of them"


def test_an_exact_flag_with_other_tokens_fails_whatever_its_speed() -> None:
    def other(arm: Arm, trial: Trial) -> Trial:
        changed = (*TOKENS[:4], 7, *TOKENS[5:])
        return replace(trial, token_ids=changed) if arm.name == WITHOUT and trial.block == 3 else trial

    findings = analyse(SETUP, trials(SETUP, {(WITHOUT, "tpot_s"): 1.10}, change=other), {})
    for metric in ("ttft_s", "tpot_s"):
        found = row(findings, "inference_mode", "full", metric)
        assert found.verdict == FAILED
        assert found.text == "FAILED: exact flag, tokens differ at token 5 of block 3"
    work = findings.evidence["inference_mode, full"].work
    assert (work.first_divergence, work.in_block) == (4, 3)
    assert work.equal_share == pytest.approx(1 - 1 / (12 * len(TOKENS)))
    assert row(findings, "inference_mode", "split", "tpot_s").verdict == "no measurable effect"


def test_a_rounding_flag_with_other_tokens_is_shown_and_does_not_fail() -> None:
    def other(arm: Arm, trial: Trial) -> Trial:
        return replace(trial, token_ids=(*TOKENS[:-1], 7)) if arm.name.startswith("without use_cache") else trial

    notes = {"fidelity": {"use_cache": {"full": {"largest": 2e-5, "first_divergence": None, "perplexity_ratio": 1.0}}}}
    findings = analyse(SETUP, trials(SETUP, change=other), notes)
    assert row(findings, "use_cache", "full", "tpot_s").verdict == "no measurable effect"
    line = data.verdicts(findings).query("flag == 'use_cache' and kind == 'full' and metric == 'tpot_s'").iloc[0]
    assert not line["same_tokens"]
    assert line["first_divergence"] == len(TOKENS) - 1
    assert line["logits_largest_difference"] == 2e-5


def test_verdicts_are_withheld_where_the_same_arm_differs_from_itself() -> None:
    findings = analyse(SETUP, trials(SETUP, {("baseline again, full", "tpot_s"): 1.05}), {})
    withheld = [r for r in findings.flag_rows if r.verdict == WITHHELD]
    assert {(r.question.kind, r.metric) for r in withheld} == {("full", "tpot_s")}
    assert len(withheld) == 4
    assert all("does not cover 1" in r.reason for r in withheld)
    assert row(findings, AA, "full", "tpot_s").verdict == NOT_PASSED
    assert not findings.decided
    assert row(findings, "use_cache", "full", "ttft_s").verdict == "no measurable effect"


def test_an_inconclusive_verdict_says_how_many_pairs_are_needed() -> None:
    findings = analyse(SETUP, trials(SETUP, noise=0.02), {})
    open_rows = [r for r in findings.flag_rows if r.verdict == "inconclusive"]
    assert open_rows
    assert all(r.more_pairs and f"({r.more_pairs} more pairs needed)" in r.text for r in open_rows)
    assert findings.more_pairs == max(r.more_pairs or 0 for r in open_rows)
    assert not findings.decided


def test_only_whole_blocks_count() -> None:
    made = trials(SETUP)
    bad = [replace(t, bad="other programs used 1.00 cores", tpot_s=9.0) if t.block == 2 else t for t in made]
    again = [replace(t, attempt=2) for t in made if t.block == 2]
    cut = [t for t in bad if not (t.block == 5 and t.arm == WITHOUT)]
    findings = analyse(SETUP, cut + again, {})
    assert findings.blocks == 11
    assert [(turn.block, turn.attempt) for turn in findings.left_out] == [(2, 1), (5, 1)]
    assert "other programs used" in findings.left_out[0].why
    assert "not finished" in findings.left_out[1].why
    pairs = data.pairs(findings)
    assert set(pairs["block"]) == set(range(12)) - {5}
    assert pairs["treated_s"].max() < 1, "nothing of a bad block is in a pair"
    assert len(data.trials(findings)) == len(cut + again), "and every run is kept"


def test_pairs_that_did_not_do_the_same_amount_of_work_are_not_compared() -> None:
    def shorter(arm: Arm, trial: Trial) -> Trial:
        return replace(trial, token_ids=TOKENS[:8]) if arm.name == WITHOUT and trial.block == 1 else trial

    findings = analyse(SETUP, trials(SETUP, change=shorter), {})
    effect = row(findings, "inference_mode", "full", "tpot_s").effect
    assert effect is not None
    assert effect.pairs == 11
    assert findings.evidence["inference_mode, full"].work.unequal == ("block 1: tokens 16 against 8",)


def test_an_arm_that_cannot_run_makes_its_questions_unavailable_and_no_others() -> None:
    made = [replace(t, block_runs=t.block_runs - 1) for t in trials(SETUP) if t.arm != "without use_cache, split"]
    findings = analyse(SETUP, made, {"failed": {"without use_cache, split": "the trunk refused it"}})
    assert findings.blocks == 12
    gone = [r for r in findings.rows if r.verdict == UNAVAILABLE]
    assert {r.question.key for r in gone} == {"use_cache, split"}
    assert gone[0].text == "unavailable: the trunk refused it"
    assert findings.decided


def test_the_ledger_must_explain_the_time() -> None:
    def unexplained(arm: Arm, trial: Trial) -> Trial:
        if not arm.name.startswith("baseline, full"):
            return trial
        return replace(trial, ledger={**trial.ledger, "unattributed": 0.01})

    findings = analyse(SETUP, trials(SETUP, change=unexplained), {})
    assert [arm.arm for arm in findings.arms if arm.unexplained] == ["baseline, full"]


def test_the_service_level_is_judged_against_the_thresholds_given() -> None:
    made = trials(SETUP)
    usual = {arm.arm: (arm.meets_ttft, arm.meets_decode_tps) for arm in analyse(SETUP, made, {}).arms}
    strict = analyse(SETUP, made, {}, service=ServiceLevel(ttft_s=0.1, decode_tps=50)).arms
    assert set(usual.values()) == {(True, True)}
    assert {(arm.meets_ttft, arm.meets_decode_tps) for arm in strict} == {(False, False)}


def test_percentiles_are_given_only_where_there_are_enough_values() -> None:
    arm = analyse(SETUP, trials(SETUP), {}).arms[0]
    assert arm.runs == 12
    assert arm.intervals == 12 * 15
    assert arm.ttft_p95_s is None
    assert arm.itl_p95_s is not None
    assert arm.itl_p99_s is None


def test_an_experiment_that_has_only_begun_says_so() -> None:
    for begun in ([], trials(SETUP, blocks=1)):
        findings = analyse(SETUP, begun, {})
        assert not findings.decided
        assert {r.verdict for r in findings.flag_rows} == {"no verdict yet"}
        assert len(data.verdicts(findings)) == len(findings.rows)


def test_good_blocks_of_a_store_are_the_whole_ones(tmp_path: Path) -> None:
    with Store.create(tmp_path / "experiment.sqlite", SETUP) as store:
        for made in trials(SETUP, blocks=2):
            if made.block == 0 or made.order < 3:
                store.add(made)
        assert good_blocks(store) == [(0, 1)]


def test_claims_stand_in_the_rows_that_they_were_made_about() -> None:
    findings = analyse(SETUP, trials(SETUP), {})
    assert "500 to 1000% faster" in claim(findings, row(findings, "use_cache", "full", "tpot_s"))
    assert "0.75 to 0.85 (15 to 25% sooner" in claim(findings, row(findings, "all flags", "full", "ttft_s"))
    assert "5 to 10% sooner" in claim(findings, row(findings, "all flags", "split", "ttft_s"))
    assert claim(findings, row(findings, "inference_mode", "split", "ttft_s")) == ""
    assert claim(findings, row(findings, AA, "full", "tpot_s")) == ""


def test_beside_each_claim_stands_what_was_measured_of_it_in_the_same_kind_of_arm() -> None:
    findings = analyse(SETUP, trials(SETUP), {})
    said = {(one.kinds, one.metric, one.words.partition(",")[0]): measured(findings, one) for one in CLAIMS}
    cache = row(findings, "use_cache", "split", "tpot_s").effect
    assert cache is not None
    assert f"use_cache, split: {cache.ratio:.2f}" in said[("split",), "tpot_s", "500 to 1000% faster with the KV cache"]
    assert "full" not in said[("split",), "tpot_s", "500 to 1000% faster with the KV cache"]
    assert said[("full",), "memory", "25 to 40% less memory"].startswith("all flags, full: ")

"""The rates that are found in runs, where the runs are made from known rates."""

from dataclasses import replace

import pytest

from splitlearn.arms.report import ArmReport
from splitlearn.client.served import TrunkFacts
from splitlearn.events import Done, Kind, TokenEvent
from splitlearn.link.emulated import Link
from splitlearn.metrics import RunMetrics
from splitlearn.models.plan import SplitPlan
from splitlearn.planning.costs import cut_cost
from splitlearn.planning.fit import rates_of
from tests.planning.test_costs import MB, MODEL, RATES, N

PLAN = SplitPlan(1, 5, N)
TOKENS = 8
PROMPT = RATES.prompt_tokens


def report(
    kind: Kind,
    first: dict[str, float],
    each: dict[str, float],
    peak: float,
    trunk_peak: float = 0,
    overlapped_s: float = 0.0,
) -> ArmReport:
    """An arm whose steps took these parts of the time breakdown."""
    events: list[TokenEvent | Done] = []
    time_s = 0.0
    for number in range(TOKENS):
        ledger = each if number else first
        time_s += sum(ledger.values())
        size = 1000 if number else round(PROMPT * RATES.prompt_token_bytes)
        wire = size if kind == "split" else 0
        beside_s = overlapped_s if number else 0.0
        events.append(TokenEvent((7,), "x", time_s, ledger, bytes_up=wire, bytes_down=wire, overlapped_s=beside_s))
    metrics = RunMetrics.from_events([*events, Done("length", "", PROMPT)])
    assert metrics is not None
    trunk = TrunkFacts(1, 0.0, 100 * MB, round(trunk_peak)) if kind == "split" else None
    return ArmReport(kind, metrics, 0.0, 0.0, RATES.import_bytes, round(peak), "float32", "cpu", 1, None, trunk)


def runs_of(slower: float = 1.0) -> tuple[ArmReport, ArmReport]:
    """The full model and the split `PLAN` on machines with RATES."""
    r, more = RATES, PROMPT - 1
    model = slower * (r.bottom_s + r.top_s + N * r.client_layer_s)
    bottom, top, trunk = r.bottom_s + r.client_layer_s, r.top_s + r.client_layer_s, 4 * r.trunk_layer_s
    full = report(
        "full",
        {"model": model + N * more * r.client_prefill_s, "tokenise": 0.001},
        {"model": model, "sample": 0.001},
        r.client_base_bytes + r.client_weight_ratio * N * 4 * MB,
    )
    split = report(
        "split",
        {
            "bottom": bottom + more * r.client_prefill_s,
            "top": top + more * r.client_prefill_s,
            "trunk": trunk + 4 * more * r.trunk_prefill_s,
            "open": 0.004,
            "wire": 0.006,
        },
        {"bottom": bottom, "trunk": trunk, "top": top, "wire": 0.0015, "sample": 0.0005},
        r.client_base_bytes + r.client_weight_ratio * 2 * 4 * MB,
        r.trunk_base_bytes + r.client_weight_ratio * 4 * 4 * MB,
    )
    return full, split


def test_the_rates_of_runs_are_those_they_were_made_from() -> None:
    full, split = runs_of()
    found = rates_of(MODEL, {"full": [full], "split": [split]}, PLAN, alike=True)
    wanted = replace(
        RATES,
        full_tpot_s=full.metrics.tpot_s or 0.0,
        full_ttft_s=full.metrics.ttft_s,
        full_memory_bytes=full.peak_rss_bytes,
        context=PROMPT + TOKENS,
        trunk_weight_ratio=RATES.client_weight_ratio,
        hop_s=0.0015,
        hop_start_s=0.004 + 0.006,
    )
    for name, value in vars(wanted).items():
        assert getattr(found, name) == pytest.approx(value), name


def test_what_was_run_is_predicted_as_it_ran() -> None:
    full, split = runs_of()
    rates = rates_of(MODEL, {"full": [full], "split": [split]}, PLAN, alike=True)
    cost = cut_cost(MODEL, rates, Link(), rates.context, PLAN.start, PLAN.end)
    assert cost.tpot_s == pytest.approx(split.metrics.tpot_s)
    assert cost.ttft_s == pytest.approx(split.metrics.ttft_s)
    assert cost.client_memory_bytes == pytest.approx(split.peak_rss_bytes)
    assert split.trunk is not None
    assert cost.trunk_memory_bytes == pytest.approx(split.trunk.peak_rss_bytes)


def test_work_beside_a_trunk_that_slows_both_down_is_predicted_as_it_ran() -> None:
    full, in_turn = runs_of()
    steps = len(in_turn.metrics.itl_s)
    each = {word: spent / steps for word, spent in in_turn.metrics.decode_ledger.items()}
    beside = {**each, "trunk": each["trunk"] - 0.0015, "top": each["top"] + 0.0005}
    split = report("split", in_turn.metrics.ledger, beside, 0, overlapped_s=0.002)
    found = {"full": [full], "split": [split], "in_turn": [in_turn]}
    rates = rates_of(MODEL, found, PLAN, alike=True)
    assert (rates.overlapped_s, rates.overlap_share) == pytest.approx((0.0015, 0.001 / 0.0015))
    assert rates.trunk_layer_s == pytest.approx(RATES.trunk_layer_s)
    assert rates.client_layer_s == pytest.approx(RATES.client_layer_s)
    cost = cut_cost(MODEL, rates, Link(), rates.context, PLAN.start, PLAN.end)
    assert cost.tpot_s == pytest.approx(split.metrics.tpot_s)


def test_disturbed_runs_change_nothing() -> None:
    full, split = runs_of()
    disturbed, _ = runs_of(slower=5)
    quiet = rates_of(MODEL, {"full": [full], "split": [split]}, PLAN, alike=True)
    three = [disturbed, full, disturbed]
    assert rates_of(MODEL, {"full": three, "split": [split]}, PLAN, alike=True) == quiet


def test_a_trunk_of_other_flags_or_machines_keeps_weights_in_its_own_way() -> None:
    full, split = runs_of()
    rates = rates_of(MODEL, {"full": [full], "split": [split]}, PLAN, alike=False)
    assert rates.trunk_base_bytes == pytest.approx(100 * MB)
    cost = cut_cost(MODEL, rates, Link(), rates.context, PLAN.start, PLAN.end)
    assert split.trunk is not None
    assert cost.trunk_memory_bytes == pytest.approx(split.trunk.peak_rss_bytes)

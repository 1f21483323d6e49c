"""What a cut costs by the measured rates: properties of the formulas, on records alone."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitlearn.link.emulated import Link
from splitlearn.planning.advice import advise
from splitlearn.planning.anatomy import Anatomy, Layer, Mlp
from splitlearn.planning.costs import CutCost, Rates, best, cut_costs, pareto

N = 6
MB = 10**6
LAYER = Layer(0, "GQA", 4, 2, 16, 16, None, Mlp(True, "silu", 96, 1, 1), "RMSNorm", 1 * MB, 1 * MB, 0, 64)
MODEL = Anatomy(
    "tiny", "llama", "LlamaForCausalLM", "float32", 64, 1000, 512, "rotary", (), True,
    tuple(replace(LAYER, number=number) for number in range(N)), 0, 64, 2 * MB, 0, 0, 2 * MB,
)  # fmt: skip
RATES = Rates(
    client_layer_s=0.004, trunk_layer_s=0.001, bottom_s=0.001, top_s=0.005, around_s=0.002,
    overlapped_s=0.0, overlap_share=1.0,
    client_prefill_s=0.0004, trunk_prefill_s=0.0001, start_s=0.01, bytes_up=1000.0, bytes_down=1000.0,
    prompt_token_bytes=256.0, prompt_tokens=20, context=50, client_base_bytes=300.0 * MB, client_weight_ratio=1.5,
    trunk_base_bytes=200.0 * MB, trunk_weight_ratio=1.0, import_bytes=250 * MB, full_tpot_s=0.032, full_ttft_s=0.1,
    full_memory_bytes=336 * MB,
)  # fmt: skip
NEAR = Link()


def by_range(rates: Rates = RATES, link: Link = NEAR, context: int = 50) -> dict[tuple[int, int], CutCost]:
    return {(cost.start, cost.end): cost for cost in cut_costs(MODEL, rates, link, context)}


def test_every_cut_has_its_costs_once() -> None:
    assert len(cut_costs(MODEL, RATES, NEAR, 50)) == N * (N + 1) // 2 == len(by_range())


def test_tpot_is_the_sum_of_client_trunk_and_the_rest() -> None:
    assert by_range()[2, 4].tpot_s == pytest.approx(0.001 + 0.005 + 4 * 0.004 + 2 * 0.001 + 0.002)


def test_a_link_adds_its_round_trip_and_its_transfer_to_each_token() -> None:
    near, far = by_range()[2, 4], by_range(link=Link(rtt_ms=50, up_mbit=8, down_mbit=4))[2, 4]
    assert far.tpot_s - near.tpot_s == pytest.approx(0.05 + 0.001 + 0.002)


def test_the_first_token_takes_a_second_round_trip() -> None:
    near, far = by_range()[2, 4], by_range(link=Link(rtt_ms=50))[2, 4]
    assert far.ttft_s - near.ttft_s == pytest.approx(0.1)


def test_what_overlaps_hides_the_trunk_and_never_more() -> None:
    some = by_range(replace(RATES, overlapped_s=0.001))[2, 4].tpot_s
    much = by_range(replace(RATES, overlapped_s=1.0))[2, 4].tpot_s
    assert by_range()[2, 4].tpot_s - some == pytest.approx(0.001)
    assert by_range()[2, 4].tpot_s - much == pytest.approx(2 * 0.001)


def test_beside_a_trunk_on_the_same_processors_less_is_hidden_than_beside_the_link() -> None:
    shared = replace(RATES, overlapped_s=0.0015, overlap_share=0.4)
    assert by_range()[2, 4].tpot_s - by_range(shared)[2, 4].tpot_s == pytest.approx(0.4 * 0.0015)
    far = Link(rtt_ms=1)
    hidden = by_range(link=far)[2, 4].tpot_s - by_range(shared, link=far)[2, 4].tpot_s
    assert hidden == pytest.approx(0.001 + 0.4 * 0.0005)


def test_a_layer_at_the_client_takes_memory_there_and_none_at_the_trunk() -> None:
    found = by_range()
    assert found[2, 4].client_memory_bytes - found[2, 5].client_memory_bytes == pytest.approx(1.5 * 4 * MB)
    assert found[2, 5].trunk_memory_bytes - found[2, 4].trunk_memory_bytes == pytest.approx(4 * MB)


def test_longer_contexts_take_the_kv_cache_on_both_sides() -> None:
    short, long = by_range(context=50)[2, 4], by_range(context=150)[2, 4]
    assert long.client_memory_bytes - short.client_memory_bytes == 4 * 64 * 4 * 100
    assert long.trunk_memory_bytes - short.trunk_memory_bytes == 2 * 64 * 4 * 100
    assert long.trunk_kv_bytes == 2 * 64 * 4 * 150


def test_a_layer_of_several_sizes_counts_by_what_it_multiplies() -> None:
    uneven = (replace(LAYER, matmul_parameters=3 * MB), *MODEL.layers[1:])
    found = {(cost.start, cost.end): cost for cost in cut_costs(replace(MODEL, layers=uneven), RATES, NEAR, 50)}
    slow, quick = found[0, 1].tpot_s, found[5, 6].tpot_s
    assert slow < quick  # the trunk, which is the faster machine, has the heavy layer


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=30), st.integers(0, 10))
def test_the_front_holds_what_nothing_beats_and_the_best_is_on_it(figures: list[tuple[int, int]], limit: int) -> None:
    some = by_range()[0, 1]
    found = [replace(some, tpot_s=float(tpot), client_memory_bytes=float(memory)) for tpot, memory in figures]
    front = pareto(found)
    for each in found:
        no_worse = [
            other
            for other in front
            if other.tpot_s <= each.tpot_s and other.client_memory_bytes <= each.client_memory_bytes
        ]
        assert no_worse
        assert (each in front) == (no_worse == [each] * len(no_worse))
    chosen = best(found, limit)
    fits = [each.tpot_s for each in found if each.client_memory_bytes <= limit]
    assert (chosen is None) == (not fits)
    if chosen is not None:
        assert chosen in front
        assert chosen.tpot_s == min(fits)


def test_a_faster_trunk_near_by_is_said_to_help_and_one_far_away_is_not() -> None:
    near = advise(cut_costs(MODEL, RATES, NEAR, 50), RATES)
    assert near.helps
    assert (near.fastest.start, near.fastest.end) == (0, N)
    assert near.does_it_help.startswith("Splitting is faster here")
    assert "[0, 6)" in near.does_it_help
    assert "32.0 ms" in near.does_it_help
    far = advise(cut_costs(MODEL, RATES, Link(rtt_ms=50), 50), RATES)
    assert not far.helps
    assert far.does_it_help.startswith("Splitting is not faster here: the full model alone takes 32.0 ms")


def test_a_busy_machine_decides_nothing_unless_the_difference_is_large() -> None:
    busy = replace(RATES, others_cpu=1.5)
    open_ = advise(cut_costs(MODEL, replace(busy, full_tpot_s=0.016), NEAR, 50), replace(busy, full_tpot_s=0.016))
    assert open_.helps is None
    assert "open: other programs used 1.5 cores meanwhile" in open_.does_it_help
    assert advise(cut_costs(MODEL, busy, NEAR, 50), busy).helps is True
    assert advise(cut_costs(MODEL, busy, Link(rtt_ms=50), 50), busy).helps is False


def test_a_difference_within_the_error_of_the_prediction_is_left_open_on_a_quiet_machine_too() -> None:
    for full_s, helps in ((1.1, None), (0.9, None), (1.2, True), (0.8, False)):
        fastest = min(cost.tpot_s for cost in cut_costs(MODEL, RATES, NEAR, 50))
        found = advise(cut_costs(MODEL, RATES, NEAR, 50), replace(RATES, full_tpot_s=full_s * fastest))
        assert found.helps is helps
        assert ("predictions may be 15% off" in found.does_it_help) == (helps is None)


def test_a_client_too_small_is_told_what_the_least_is() -> None:
    found = cut_costs(MODEL, RATES, NEAR, 50)
    fits = advise(found, RATES, 306 * MB)
    assert fits.chosen is not None
    assert "For a client of 306 MB, cut at [0, 6)" in fits.where_to_cut
    none = advise(found, RATES, 100 * MB)
    assert none.chosen is None
    assert "No cut fits a client of 100 MB: the least is 300 MB" in none.where_to_cut
    assert "libraries take 250 MB: they alone take more" in none.where_to_cut
    assert "libraries take 250 MB. A smaller model" in advise(found, RATES, 280 * MB).where_to_cut

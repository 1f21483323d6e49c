"""Routes through several machines: their costs by hand, and the search against all routes that there are."""

import random
from collections.abc import Iterator
from dataclasses import replace
from itertools import accumulate, combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from splitlearn.config import Objective
from splitlearn.errors import InputError
from splitlearn.link.emulated import Link
from splitlearn.planning.network import Device, Network, Work, work_of
from splitlearn.planning.route import Route, Span, predict
from splitlearn.planning.search import OBJECTIVES, best_split, rank
from tests.planning.test_costs import MODEL

MB = 10**6
CLIENT = Device("laptop", 100 * MB, 10 * MB, 1.0, layer_s=0.004, prefill_s=0.0004, step_s=0.006, start_s=0.01)
NEAR = replace(CLIENT, name="desk", layer_s=0.001, prefill_s=0.0001, step_s=0.001, start_s=0.0)
FAR = replace(NEAR, name="rack", layer_s=0.0005)
LINKS = {
    (0, 1): Link(rtt_ms=10, up_mbit=8, down_mbit=4),
    (0, 2): Link(rtt_ms=30, up_mbit=8, down_mbit=4),
    (1, 2): Link(rtt_ms=4, up_mbit=80, down_mbit=80),
}
WORK = work_of(MODEL, prompt_tokens=21, context=100)
CHAIN = (Span(1, 1, 3), Span(2, 3, 5))
ROW_BITS = 8 * (64 * 4 + 70)


def network(*, forward: bool = True) -> Network:
    return Network((CLIENT, NEAR, FAR), LINKS, forward)


def test_a_token_goes_to_each_server_in_turn_and_back_from_the_last_one() -> None:
    found = predict(WORK, network(), CHAIN)
    computing = 0.006 + 2 * 0.004 + (0.001 + 2 * 0.001) + (0.001 + 2 * 0.0005)
    wire = (0.005 + ROW_BITS / 8e6) + (0.002 + ROW_BITS / 80e6) + (0.015 + ROW_BITS / 4e6)
    assert found.tpot_s == pytest.approx(computing + wire)


def test_where_the_client_sends_answers_on_they_take_its_own_links() -> None:
    forwarding, driven = (predict(WORK, network(forward=each), CHAIN) for each in (True, False))
    extra = (0.005 + ROW_BITS / 4e6) + (0.015 + ROW_BITS / 8e6) - (0.002 + ROW_BITS / 80e6)
    assert driven.tpot_s - forwarding.tpot_s == pytest.approx(extra)


def test_the_first_token_opens_all_sessions_at_once_and_carries_the_prompt() -> None:
    one = predict(WORK, network(), (Span(1, 1, 5),))
    both = predict(WORK, network(), CHAIN)
    opening = {share.where: share.first_s for share in both.breakdown}["open sessions"]
    assert 0.03 < opening < 0.035  # of the slowest link, not of both
    prompt_s = 20 * (2 * 0.0004 + 4 * 0.0001)
    assert one.ttft_s - one.tpot_s > 0.01 + 0.01 + prompt_s


def test_the_breakdown_sums_to_the_times() -> None:
    for spans in ((), CHAIN, (Span(2, 0, 6),)):
        found = predict(WORK, network(), spans)
        assert sum(share.token_s for share in found.breakdown) == pytest.approx(found.tpot_s)
        assert sum(share.first_s for share in found.breakdown) == pytest.approx(found.ttft_s)


def test_what_overlaps_hides_layers_and_links_and_never_messages() -> None:
    def tpot_s(overlapped_s: float) -> float:
        hiding = replace(CLIENT, overlapped_s=overlapped_s)
        return predict(WORK, Network((hiding, NEAR, FAR), LINKS), CHAIN).tpot_s

    assert tpot_s(0.0) - tpot_s(0.003) == pytest.approx(0.003)
    assert tpot_s(9.0) == pytest.approx(0.006 + 2 * 0.004 + NEAR.step_s + FAR.step_s)


def test_memory_is_libraries_weights_and_the_kv_cache_of_its_own_layers() -> None:
    client, desk, rack = predict(WORK, network(), CHAIN).uses
    weights, kv = 4 * MB, 64 * 4 * 100
    around = (2 * MB + 64) * 4
    assert client.needed_bytes == 10 * MB + around + 2 * (weights + kv)
    assert desk.needed_bytes == rack.needed_bytes == 10 * MB + 2 * (weights + kv)


def test_the_slowest_machine_or_link_bounds_the_tokens_of_many_sessions() -> None:
    found = predict(WORK, network(), CHAIN)
    assert found.slowest == "laptop" and found.tokens_per_s == pytest.approx(1 / (0.006 + 2 * 0.004))
    narrow = {**LINKS, (1, 2): Link(up_mbit=0.01, down_mbit=1000)}
    found = predict(WORK, Network((CLIENT, NEAR, FAR), narrow), CHAIN)
    assert found.slowest == "desk > rack" and found.tokens_per_s == pytest.approx(1e4 / ROW_BITS)


def test_a_link_that_is_missing_is_an_error_that_names_both_machines() -> None:
    some = {pair: link for pair, link in LINKS.items() if pair != (1, 2)}
    with pytest.raises(InputError, match="between desk and rack"):
        Network((CLIENT, NEAR, FAR), some)
    Network((CLIENT, NEAR, FAR), some, forward=False)  # the client's own links are enough


def test_a_server_that_would_only_cost_time_is_left_out() -> None:
    slow = replace(NEAR, layer_s=0.1)
    found = best_split(WORK, Network((CLIENT, slow, FAR), LINKS), "tpot")
    assert found is not None and {span.device for span in found.spans} <= {2}


def test_nothing_fits_where_no_machine_has_the_memory() -> None:
    small = tuple(replace(each, memory_bytes=11 * MB) for each in (CLIENT, NEAR, FAR))
    assert best_split(WORK, Network(small, LINKS), "memory") is None


def every_route(work: Work, some: Network) -> Iterator[Route]:
    """All of them: each subset of the servers in order with each choice of ranges."""
    servers = range(1, len(some.devices))
    for count in range(1, len(some.devices)):
        for chosen in combinations(servers, count):
            for bounds in combinations(range(work.n_layers + 1), count + 1):
                yield predict(work, some, tuple(map(Span, chosen, bounds, bounds[1:])))


def random_case(seed: int) -> tuple[Work, Network]:
    """Small machines and models: with a strategy for each figure, a thousand cases take ten seconds more."""
    draw = random.Random(seed)
    n, count = draw.randint(1, 6), draw.randint(1, 4)

    def sums() -> tuple[float, ...]:
        return tuple(accumulate((draw.randint(1, 3) for _ in range(n)), initial=0.0))

    def device(number: int) -> Device:
        memory, base, ratio = draw.randint(4, 20), draw.randint(0, 2), draw.choice([0.5, 1.0])
        layer, prefill, step, start, overlapped = (draw.randint(0, 9) * 1e-3 for _ in range(5))
        return Device(str(number), memory, base, ratio, layer, prefill, step, start, overlapped)

    def link() -> Link:
        up, down = (draw.choice([0.01, 0.1, 1.0, None]) for _ in range(2))
        return Link(draw.randint(0, 9), 0, up, down)

    links = {pair: link() for pair in combinations(range(count), 2)}
    work = Work(sums(), sums(), sums(), draw.randint(0, 2), draw.randint(1, 100), draw.randint(1, 20))
    return work, Network(tuple(map(device, range(count))), links, draw.random() < 0.5)


@settings(max_examples=1000)
@given(st.integers(0, 2**32), st.sampled_from(OBJECTIVES))
def test_the_search_equals_brute_force(seed: int, objective: Objective) -> None:
    work, some = random_case(seed)
    fitting = [rank(route, objective) for route in every_route(work, some) if route.fits]
    found = best_split(work, some, objective)
    if found is None:
        assert not fitting
    else:
        assert rank(found, objective)[0] == pytest.approx(min(fitting)[0])

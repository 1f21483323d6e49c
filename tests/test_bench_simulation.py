"""The simulation of clients and servers behind docs/scale.md, where what must come out can be told by hand."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.simulation import Costs, Scenario, between, simulate
from splitlearn.link.emulated import Link
from splitlearn.loadtest.lengths import Lengths
from splitlearn.loadtest.plan import LoadTest
from splitlearn.scheduling.scheduler import Limits

COSTS = Costs([(1, 0.010), (9, 0.018)], [(16, 0.020), (32, 0.030)], step_s=0.001, open_s=0.002, row_bytes=1000)
LOAD = LoadTest(("one", "two"), clients=1, duration_s=5.0, answers=Lengths("uniform", 10, 10))
LIMITS = Limits(shared=True, gather_s=0.010, prompt_tokens=64)
ALONE = Scenario(LOAD, (16, 16), Link(rtt_ms=20))


def test_between_the_points_a_cost_is_on_their_lines_and_beyond_them_on_the_last() -> None:
    assert [between([(1, 1.0), (3, 2.0), (5, 6.0)], at) for at in (1, 2, 3, 4, 7)] == [1.0, 1.5, 2.0, 4.0, 10.0]


def test_a_client_alone_pays_forward_link_and_its_own_time_for_each_token() -> None:
    found = simulate(ALONE, COSTS, LIMITS)
    assert found.tpot.mean_s == pytest.approx(0.010 + 0.001 + 0.020)
    assert found.ttft.mean_s == pytest.approx(0.002 + 0.020 + 0.020 + 0.001 + 0.020)
    assert found.done == found.offered and not found.failed


def test_bandwidth_counts_by_the_bytes_of_a_step_each_way() -> None:
    slow = simulate(replace(ALONE, link=Link(rtt_ms=20, up_mbit=1.0)), COSTS, LIMITS)
    assert slow.tpot.mean_s == pytest.approx(0.031 + 8 * COSTS.row_bytes / 1e6)


@given(st.integers(2, 12))
def test_clients_of_servers_of_their_own_have_what_one_alone_has(clients: int) -> None:
    load = replace(LOAD, clients=clients, duration_s=1.0)
    found = simulate(replace(ALONE, load=load, replicas=clients), COSTS, LIMITS)
    assert found.tpot.mean_s == pytest.approx(0.031)


@given(st.integers(1, 24), st.integers(1, 3), st.integers(0, 9))
def test_no_token_comes_sooner_than_alone_and_no_server_gives_more_than_its_forwards(
    clients: int, replicas: int, seed: int
) -> None:
    load = replace(LOAD, clients=clients, seed=seed, duration_s=2.0, answers=None, max_new_tokens=32)
    found = simulate(replace(ALONE, load=load, replicas=replicas), COSTS, LIMITS)
    assert found.tpot.mean_s is not None and found.tpot.mean_s >= 0.031 - 1e-9
    share = -(-clients // replicas)
    assert found.tps_system <= replicas * share / COSTS.forward_s(share, 0) + 1e-9
    assert found.done == found.offered


def test_a_server_passes_the_messages_of_its_clients_one_after_another() -> None:
    load = replace(LOAD, clients=4, duration_s=0.1)  # one request each
    free = simulate(replace(ALONE, load=load), replace(COSTS, step_s=0.0), LIMITS)
    together = simulate(replace(ALONE, load=load), COSTS, LIMITS)
    assert free.tpot.mean_s is not None and together.tpot.mean_s is not None
    # Of four answers at once, the mean one waits for 1.5 others, at the server alone.
    assert together.tpot.mean_s - free.tpot.mean_s >= COSTS.step_s + 1.5 * COSTS.step_s / 4 - 1e-4

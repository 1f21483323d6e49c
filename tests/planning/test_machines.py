"""What devices.yaml leaves out is measured: by a server of a tiny model here, and by records of known rates."""

from dataclasses import replace

import pytest

from splitlearn import config
from splitlearn.checkpoints.folder import ModelFiles
from splitlearn.client.served import describe
from splitlearn.errors import InputError
from splitlearn.link.emulated import Link
from splitlearn.planning import anatomy
from splitlearn.planning.costs import cut_cost
from splitlearn.planning.devices import DeviceEntry, DevicesFile, network_of
from splitlearn.planning.machines import client_figures, measured, trunk_figures
from splitlearn.planning.network import work_of
from splitlearn.planning.probe import Waits, facts_of
from splitlearn.planning.route import Span, predict
from splitlearn.runtime.progress import silent
from splitlearn.wire import trunk_pb2 as pb
from tests.planning.test_costs import MB, MODEL, RATES, N
from tests.support.trunk import PLAN, TrunkHere, settings

GIVEN = DeviceEntry(memory="1GB", base="10MB", weight_ratio=1, decode_ms=4, prefill_ms=0.4, step_ms=6, start_ms=10)  # type: ignore[arg-type]


def test_a_server_is_measured_with_its_link_and_what_is_given_stays(here: TrunkHere, files: ModelFiles) -> None:
    file = DevicesFile(devices={"laptop": GIVEN, "desk": DeviceEntry(address=here.address, decode_ms=7)}, forward=False)
    model = anatomy.read(files, "float32")
    found, row_bytes = measured(file, config.parse(settings(files)), "none", model, 32, silent)
    desk = found.devices["desk"]
    assert found.devices["laptop"] == GIVEN
    assert (desk.decode_ms, desk.threads, row_bytes) == (7, 1, files.facts.hidden_size * 4)
    assert desk.memory and desk.base and desk.weight_ratio is not None
    network = network_of(found)
    assert network.links[0, 1].rtt_ms >= 0 and network.links[0, 1].up_mbit
    said = describe(here.address, costs=True).costs
    assert said.decode_s > 0 and said.memory_bytes > said.base_bytes


def test_costs_are_told_where_they_are_asked_for(here: TrunkHere) -> None:
    said = describe(here.address)
    assert not said.HasField("costs") and (said.start, said.end) == (PLAN.start, PLAN.end)


def test_a_machine_without_an_address_is_not_measured(files: ModelFiles) -> None:
    file = DevicesFile(devices={"laptop": GIVEN, "desk": DeviceEntry()})
    found, row_bytes = measured(file, config.parse(settings(files)), "none", MODEL, 32, silent)
    assert (found, row_bytes) == (file, None)


def described(**costs: float) -> pb.Description:
    return pb.Description(start=2, end=4, n_layers=6, threads=2, costs=pb.Costs(**costs))  # type: ignore[arg-type]


def test_what_a_client_waits_is_layers_link_and_the_rest() -> None:
    said = described(decode_s=0.01, prefill_s=0.001, memory_bytes=9 * MB, base_bytes=MB, weight_bytes=2 * MB)
    found = facts_of(said, Link(rtt_ms=2), Waits(first_s=0.08, step_s=0.015, row_bytes=64), prompt_tokens=51)
    assert found.step_s == pytest.approx(0.015 - 0.01 - 0.002)
    assert found.start_s == pytest.approx(0.08 - 0.01 - 50 * 0.001 - 0.002 - found.step_s)
    assert found.link.rtt_ms == 2


def test_the_round_trip_is_at_most_what_a_step_leaves_for_it() -> None:
    found = facts_of(described(decode_s=0.01), Link(rtt_ms=9), Waits(0.05, 0.014, 64), prompt_tokens=2)
    assert found.link.rtt_ms == pytest.approx(4) and found.step_s == 0


def test_a_server_that_has_computed_nothing_with_its_own_flags_is_named() -> None:
    with pytest.raises(InputError, match=r"flags.*\[2, 4\)"):
        facts_of(described(), Link(), Waits(0.05, 0.014, 64), prompt_tokens=2)


@pytest.mark.parametrize(("overlapped_s", "share"), [(0.001, 1.0), (0.001, 0.4), (1.0, 0.4)])
def test_the_figures_of_two_runs_predict_as_the_costs_of_cuts_do(overlapped_s: float, share: float) -> None:
    rates = replace(RATES, overlapped_s=overlapped_s, overlap_share=share, hop_s=0.0012, hop_start_s=0.007)
    devices = {
        name: {**figures, "memory": "1GB", "base": f"{figures['base'] / MB}MB"}
        for name, figures in (("laptop", client_figures(MODEL, rates)), ("trunk", trunk_figures(rates)))
    }
    link = {"between": ["laptop", "trunk"], "rtt_ms": 0.0, "up_mbit": None, "down_mbit": None}
    network = network_of(config.checked(DevicesFile, {"devices": devices, "links": [link]}, "key"))
    work = work_of(MODEL, RATES.prompt_tokens, RATES.context)
    for start, end in ((0, N), (1, 3), (2, 6)):
        found = predict(work, network, (Span(1, start, end),))
        cost = cut_cost(MODEL, rates, Link(), RATES.context, start, end)
        assert found.tpot_s == pytest.approx(cost.tpot_s)
        assert found.ttft_s == pytest.approx(cost.ttft_s)

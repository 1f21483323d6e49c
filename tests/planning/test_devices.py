"""devices.yaml: what it must say, and what is chosen and printed from it."""

import json
import re
from pathlib import Path

import pytest
import yaml

from splitlearn.config import Config, parse
from splitlearn.errors import InputError
from splitlearn.link.emulated import Link
from splitlearn.planning.choice import Choice, choose, config_lines, path, sentence
from splitlearn.planning.devices import DevicesFile, load, network_of
from splitlearn.planning.network import work_of
from splitlearn.planning.route import predict
from tests.planning.test_costs import MODEL
from tests.planning.test_search import CHAIN, network

DEVICE = {"memory": "90MB", "base": "10MB", "weight_ratio": 1, "decode_ms": 4, "prefill_ms": 0.4, "step_ms": 6}
CLIENT: dict[str, object] = {**DEVICE, "start_ms": 10}
SERVER: dict[str, object] = {**CLIENT, "decode_ms": 0.5, "step_ms": 1, "address": "desk:50051"}
NEAR: dict[str, object] = {"between": ["laptop", "desk"], "rtt_ms": 2, "up_mbit": 100, "down_mbit": None}
WORK = work_of(MODEL, prompt_tokens=20, context=100)


def read(folder: Path, devices: dict[str, object], *links: dict[str, object]) -> DevicesFile:
    path = folder / "devices.yaml"
    path.write_text(yaml.safe_dump({"devices": devices, "links": list(links)}, sort_keys=False))
    return load(path)


def chosen(folder: Path, devices: dict[str, object], *links: dict[str, object]) -> Choice:
    return choose(WORK, network_of(read(folder, devices, *links)), "tpot")


def test_the_first_device_is_the_client_and_a_link_reads_both_ways(tmp_path: Path) -> None:
    turned = {**NEAR, "between": ["desk", "laptop"], "up_mbit": None, "down_mbit": 100}
    for link in (NEAR, turned):
        network = network_of(read(tmp_path, {"laptop": CLIENT, "desk": SERVER}, link))
        assert [device.name for device in network.devices] == ["laptop", "desk"]
        assert network.links == {(0, 1): Link(2, 0, 100, None)}


@pytest.mark.parametrize("figure", ["base", "weight_ratio", "decode_ms", "prefill_ms", "step_ms", "start_ms"])
def test_a_figure_that_is_missing_is_an_error_that_names_it_and_its_device(figure: str, tmp_path: Path) -> None:
    some = {name: value for name, value in SERVER.items() if name != figure}
    with pytest.raises(InputError, match=rf"devices\.desk\.{figure}.*--measure"):
        network_of(read(tmp_path, {"laptop": CLIENT, "desk": some}, NEAR))


@pytest.mark.parametrize(
    ("devices", "link", "words"),
    [
        ({"laptop": {**CLIENT, "memory": "much"}}, None, ["devices.laptop.memory", "300MB"]),
        ({"laptop": {}}, None, ["devices.laptop.memory", "--measure"]),
        ({"laptop": {**CLIENT, "speed": 1}}, None, ["devices.laptop.speed", "decode_ms"]),
        ({"laptop": {**CLIENT, "decode_ms": 0}}, None, ["devices.laptop.decode_ms"]),
        ({"laptop": {**CLIENT, "step_ms": -1}}, None, ["devices.laptop.step_ms"]),
        ({"laptop": {**CLIENT, "address": "nowhere"}}, None, ["devices.laptop.address"]),
        ({}, None, ["devices"]),
        ({"laptop": CLIENT, "desk": SERVER}, {**NEAR, "between": ["laptop", "dusk"]}, ["links.0.between", "desk"]),
        ({"laptop": CLIENT, "desk": SERVER}, {**NEAR, "rtt_ms": -1}, ["links.0.rtt_ms", "0 to"]),
        (
            {"laptop": CLIENT, "desk": SERVER},
            {"between": ["laptop", "desk"], "rtt_ms": 1},
            ["links.0.up_mbit", "no default"],
        ),
    ],
)
def test_what_cannot_be_used_is_named(
    devices: dict[str, object], link: dict[str, object] | None, words: list[str], tmp_path: Path
) -> None:
    with pytest.raises(InputError) as refused:
        network_of(read(tmp_path, devices, *([link] if link else [])))
    for word in words:
        assert word in str(refused.value)


def test_one_machine_alone_is_named_where_it_is_faster(tmp_path: Path) -> None:
    quick = {**CLIENT, "decode_ms": 0.1}
    found = chosen(tmp_path, {"laptop": quick, "desk": SERVER}, NEAR)
    assert found.best is found.alone
    assert sentence(found).startswith("One machine alone is better: TPOT 6.6 ms with laptop alone")
    assert config_lines(found, found.alone) == ""


def test_a_split_is_named_where_it_is_faster_or_needed(tmp_path: Path) -> None:
    devices: dict[str, object] = {"laptop": CLIENT, "desk": SERVER}
    assert sentence(chosen(tmp_path, devices, NEAR)).startswith("Splitting is better")
    small = {**CLIENT, "memory": "30MB"}
    found = chosen(tmp_path, {"laptop": small, "desk": SERVER}, NEAR)
    assert "laptop alone needs 42 MB and has 30 MB" in sentence(found)
    assert found.best is not None and path(found, found.best) == "laptop > desk [0, 6) > laptop"


def test_what_is_open_by_the_error_of_predictions_is_called_about_the_same(tmp_path: Path) -> None:
    alike = {**SERVER, "decode_ms": 3.8, "step_ms": 0}
    assert sentence(chosen(tmp_path, {"laptop": CLIENT, "desk": alike}, NEAR)).startswith("About the same")


def test_where_nothing_fits_the_sentence_says_what_is_short(tmp_path: Path) -> None:
    small = {**CLIENT, "memory": "11MB"}
    found = chosen(tmp_path, {"laptop": small, "desk": {**SERVER, "memory": "11MB"}}, NEAR)
    assert found.best is None and sentence(found).startswith("Nothing fits: laptop alone needs")


def test_the_json_has_all_that_is_said(tmp_path: Path) -> None:
    found = chosen(tmp_path, {"laptop": CLIENT, "desk": SERVER}, NEAR)
    said = json.loads(json.dumps(found.as_json()))
    assert said["says"] == sentence(found) and said["best"] == said["split"] and said["alone"]["fits"]
    assert sum(share["token_s"] for share in said["best"]["breakdown"]) == pytest.approx(said["best"]["tpot_s"])


def test_the_lines_to_paste_are_settings(tmp_path: Path) -> None:
    small = {**CLIENT, "memory": "30MB"}
    found = chosen(tmp_path, {"laptop": small, "desk": SERVER}, NEAR)
    assert found.best is not None
    client, server = config_lines(found, found.best).split("# desk, a trunk server\n")
    for lines in (client, server):
        assert (parse(yaml.safe_load(lines)).cut.start, parse(yaml.safe_load(lines)).cut.end) == (0, 6)
    assert parse(yaml.safe_load(client)).trunk.address == ("desk:50051",)
    assert parse(yaml.safe_load(server)).trunk == Config().trunk


@pytest.mark.parametrize("forward", [True, False])
def test_the_lines_of_a_chain_are_settings_of_the_client_and_of_each_server(forward: bool) -> None:
    machines = network(forward=forward)
    lines = config_lines(choose(WORK, machines, "tpot"), predict(WORK, machines, CHAIN))
    client, *servers = (parse(yaml.safe_load(each)) for each in re.split(r"(?m)^# .+ trunk server$", lines))
    assert [(link.layers, link.address) for link in client.trunk.chain] == [
        ((1, 3), ("desk:50051",)),
        ((3, 5), ("rack:50051",)),
    ]
    assert client.trunk.forward is forward
    assert [(server.cut.start, server.cut.end) for server in servers] == [(1, 3), (3, 5)]
    assert [server.server.forward_to.addresses for server in servers] == [("rack:50051",) if forward else (), ()]

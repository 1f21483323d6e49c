"""One parser for every address that a person writes, and one rule for what is loopback."""

import pytest

from splitlearn import address, config
from splitlearn.address import Address, is_loopback
from splitlearn.errors import InputError


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("host:50051", "host:50051"),
        (" Trunk.Example.:1 ", "trunk.example:1"),
        ("trunk_1:65535", "trunk_1:65535"),
        ("127.0.0.1:50051", "127.0.0.1:50051"),
        ("[::1]:50051", "[::1]:50051"),
        ("[0:0:0:0:0:0:0:1]:50051", "[::1]:50051"),
        ("[FE80::1%eth0]:50051", "[fe80::1%eth0]:50051"),
        ("bücher.example:50051", "xn--bcher-kva.example:50051"),
    ],
)
def test_an_address_is_read_as_it_is_meant_and_reads_back(text: str, meant: str) -> None:
    found = Address.parse(text)
    assert str(found) == meant
    assert Address.parse(meant) == found
    assert config.parse({"trunk": {"address": text}}).trunk.address == (meant,)


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("http://host:50051", "host:50051"),
        ("https://user:secret@host:50051/path?query", "host:50051"),
        ("grpc://[::1]:50051", "[::1]:50051"),
        ("dns:///host:50051", "host:50051"),
        ("::1:50051", "[::1]:50051"),
        ("::1:5005", "[::1]:5005"),
        ("fe80::1%eth0", "[fe80::1%eth0]:50051"),
    ],
)
def test_what_is_nearly_an_address_is_refused_and_the_error_says_what_was_meant(text: str, meant: str) -> None:
    with pytest.raises(InputError) as caught:
        config.with_trunk(config.Config(), text)
    assert caught.value.field == "trunk.address"
    assert f"expected {meant!r}" in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        *("", ":50051", "host", "host:", "host:0", "host:65536", "host:abc", "host:+80", "host:８０", "host: 80"),
        *("ho st:80", "host\n:80", "user@host:80", "host:80/x", "host:80:90", "unix:/tmp/trunk", "[127.0.0.1]:80"),
        *("[::1]", "[::1", "a..b:80", "-a:80", "127.1:80", "0x7f.1:80", "256.0.0.1:80", "faß.de:80", "http://host"),
        *("[fe80::1%a/b]:80", "a:1,", "a:1,,b:2", ["a:1", "http://b:2"], "embedded,a:1", "a:1,A.:1", f"{'a' * 64}:80"),
    ],
)
def test_what_is_no_address_is_refused_in_one_line(text: object) -> None:
    with pytest.raises(InputError, match=r"^trunk\.address: .* cannot be used; expected [^\n]*$"):
        config.parse({"trunk": {"address": text}})


@pytest.mark.parametrize("field", ["server.host", "server.metrics_host", "ui.host"])
def test_a_host_that_is_listened_on_is_a_name_or_an_ip_address_alone(field: str) -> None:
    section, key = field.split(".")
    for text, meant in (("[::1]", "::1"), ("::", "::"), ("LocalHost.", "localhost"), (" 10.0.0.5 ", "10.0.0.5")):
        assert config.parse({section: {key: text}}).model_dump()[section][key] == meant
    for wrong in ("", "http://host", "host:80", "[::1]:80", "127.1", "a b", "unix:/tmp/x", "::1%a b"):
        with pytest.raises(InputError, match=rf"^{section}\.{key}: .*expected a host name or an IP address"):
            config.parse({section: {key: wrong}})


def test_an_ipv6_address_has_brackets_before_a_port_and_in_a_url() -> None:
    assert address.joined("::1", 7860) == "[::1]:7860"
    assert address.url("::1", 7860) == "http://[::1]:7860"
    assert address.url("fe80::1%eth0", 7860) == "http://[fe80::1%25eth0]:7860"
    assert address.url("localhost", 7860) == "http://localhost:7860"


@pytest.mark.parametrize(
    "name", ["127.0.0.1", "127.8.0.1", "::1", "[::1]", "::ffff:127.0.0.1", "localhost", "LOCALHOST."]
)
def test_loopback_is_what_only_this_machine_reaches(name: str) -> None:
    assert is_loopback(name)


@pytest.mark.parametrize(
    "name",
    ["0.0.0.0", "::", "", "::ffff:0.0.0.0", "10.0.0.5", "fe80::1%eth0", "127.0.0.1.example.org", "127.1", "[::1"],
)
def test_all_interfaces_other_machines_and_nonsense_are_not_loopback(name: str) -> None:
    assert not is_loopback(name)


@pytest.mark.parametrize(
    ("found", "here"),
    [
        (["127.0.0.1"], "127.0.0.1"),
        (["::1", "127.0.1.1"], "127.0.1.1"),
        (["127.0.0.1", "192.168.1.5"], None),
        (["192.168.1.5"], None),
        ([], None),
    ],
)
def test_a_name_is_loopback_when_all_its_addresses_are_and_stands_for_one_of_them(
    found: list[str], here: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(*_: object, **__: object) -> list[tuple[object, ...]]:
        return [(0, 0, 0, "", (each, 0)) for each in found]

    monkeypatch.setattr("socket.getaddrinfo", answer)
    assert address.loopback("trunk.test") == here

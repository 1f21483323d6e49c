"""What a server says that cannot listen where it is told to; and IPv6 works wherever there is some."""

import os
import socket
import urllib.request

import pytest

from server.monitoring import exposition
from splitlearn import address, config
from splitlearn.client.served import describe
from splitlearn.errors import SetupError
from splitlearn.runtime import ports
from tests.conftest import TinyFactory
from tests.support.trunk import serve_here


def _has_ipv6() -> bool:
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            return True
    except OSError:
        return False


IPV6 = pytest.mark.skipif(not _has_ipv6(), reason="this machine has no IPv6 loopback")


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", pytest.param("::1", marks=IPV6)])
def test_a_port_is_taken_only_where_another_program_listens(host: str) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, 0), family=family) as taken:
        port = taken.getsockname()[1]
        wanted = rf"^ui\.port: cannot listen on {address.joined(host, port)}: another program".replace("[", r"\[")
        with pytest.raises(SetupError, match=wanted):
            ports.check("ui.", host, port)
    assert ports.check("ui.", host, port) == port
    assert ports.check("ui.", host, 0) > 0


@pytest.mark.parametrize("host", ["192.0.2.77", pytest.param("2001:db8::77", marks=IPV6)])
def test_an_address_of_another_machine_is_not_blamed_on_another_program(host: str) -> None:
    with pytest.raises(SetupError, match=r"^server\.metrics_host: .*no network interface of this machine") as caught:
        ports.check("server.metrics_", host, 0)
    assert "program" not in str(caught.value)


def test_a_name_without_an_address_is_said_to_have_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr("socket.getaddrinfo", unknown)
    with pytest.raises(SetupError, match=r"^server\.host: cannot listen on trunk\.test:1: the name cannot be resolved"):
        ports.check("server.", "trunk.test", 1)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may listen on every port")
def test_a_low_port_is_said_to_need_another_user() -> None:
    with pytest.raises(SetupError, match=r"^ui\.port: .*may not listen on that port"):
        ports.check("ui.", "127.0.0.1", 1)


@IPV6
@pytest.mark.parametrize("host", ["::1", "[::1]"])
def test_a_trunk_serves_over_ipv6_and_is_reached_at_the_address_that_it_says(
    host: str, tiny_model: TinyFactory
) -> None:
    files = tiny_model()
    with serve_here(files, host=host) as here:
        assert here.address.startswith("[::1]:")
        assert describe(here.address).model == files.name
        (found,) = config.with_trunk(config.Config(), here.address.upper()).trunk.address
        assert found == here.address
        limits = config.parse({"server": {"metrics_host": host, "metrics_port": 0}}).server
        where = exposition.listen(here.runtime.metrics, limits)
        with urllib.request.urlopen(f"http://{where}/metrics", timeout=30) as answer:
            assert b"splitlearn" in answer.read()

"""A company's proxy is used for what is far away, never for this machine; one that cannot be used stops nothing."""

import os
import subprocess
import sys
import urllib.request
from importlib.util import find_spec

import httpx
import pytest
import yaml

from splitlearn.client.served import describe
from splitlearn.runtime import proxies
from tests.conftest import TinyFactory
from tests.support import ROOT
from tests.support.trunk import serve_here

NOWHERE = "http://127.0.0.1:9"  # nobody listens there: who asks it fails at once


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """None for proxies to begin with; what a test sets, and what `settle` changes, goes with the test."""
    monkeypatch.setattr(os, "environ", os.environ.copy())
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        del os.environ[name]


@pytest.mark.parametrize("name", ["HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"])
@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]", "page.corp"])
def test_this_machine_is_not_asked_for_through_a_proxy_and_the_others_are(name: str, host: str) -> None:
    os.environ[name] = NOWHERE
    proxies.settle("page.corp")
    with httpx.Client() as client:
        assert client._transport_for_url(httpx.URL(f"http://{host}:7860/")) is client._transport
        assert client._transport_for_url(httpx.URL("http://hub.example/")) is not client._transport
    if host != "[::1]":
        assert urllib.request.proxy_bypass(host)


@pytest.mark.parametrize("name", ["NO_PROXY", "no_proxy"])
def test_what_is_excepted_already_stays_excepted(name: str) -> None:
    os.environ.update({"HTTPS_PROXY": NOWHERE, name: ".corp, 10.0.0.1"})
    proxies.settle("page.example")
    proxies.settle("page.example")
    assert os.environ[name] == ".corp,10.0.0.1,localhost,127.0.0.1,::1,page.example"
    assert [each for each in os.environ if each.lower() == "no_proxy"] == [name]


@pytest.mark.parametrize("value", ["*", " * "])
def test_a_star_excepts_everything_already(value: str) -> None:
    os.environ.update({"HTTP_PROXY": NOWHERE, "NO_PROXY": value})
    proxies.settle()
    assert os.environ["NO_PROXY"] == value


def test_without_a_proxy_nothing_is_set() -> None:
    before = dict(os.environ)
    proxies.settle("page.example")
    assert os.environ == before


@pytest.mark.parametrize("value", ["socks5://u:secret@h:1", "socks://h:1", "ftp://h:1", "http://h:abc", " http://h:1"])
def test_a_proxy_that_cannot_be_used_is_left_out_by_name_and_the_others_stay(
    value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if value.startswith("socks5") and find_spec("socksio"):
        pytest.skip("socks can be used here")
    os.environ.update({"ALL_PROXY": value, "HTTPS_PROXY": NOWHERE})
    proxies.settle()
    httpx.Client().close()
    assert "ALL_PROXY" not in os.environ and os.environ["HTTPS_PROXY"] == NOWHERE
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: ALL_PROXY is not used: ") and "secret" not in line


@pytest.mark.parametrize("entry", ["[::1]", "fd00::/8", "a:b:c"])
def test_an_exception_that_httpx_cannot_read_is_left_out(entry: str) -> None:
    os.environ["NO_PROXY"] = f"a.corp,{entry}"
    proxies.settle()
    httpx.Client().close()
    assert os.environ["NO_PROXY"] == "a.corp,localhost,127.0.0.1,::1"


@pytest.mark.parametrize("name", ["http_proxy", "https_proxy", "grpc_proxy"])
def test_a_trunk_is_reached_beside_a_proxy(name: str, tiny_model: TinyFactory) -> None:
    os.environ[name] = NOWHERE
    os.putenv(name, NOWHERE)  # gRPC reads the process's own
    try:
        with serve_here(tiny_model()) as here:
            assert describe(here.address).n_layers == 6
    finally:
        os.unsetenv(name)


def test_health_checks_of_the_containers_ask_no_proxy() -> None:
    services = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]
    for name in ("trunk", "app"):
        check = services[name]["healthcheck"]["test"][1].replace("50051", "1").replace("7860", "1")
        away = {**os.environ, "http_proxy": "http://proxy.invalid:3128", "HTTP_PROXY": "http://proxy.invalid:3128"}
        said = subprocess.run(
            ["sh", "-c", check.replace("python", sys.executable, 1)], env=away, capture_output=True, text=True
        )
        assert said.returncode and "refused" in said.stderr, said.stderr  # by the port itself, not by a proxy

"""API keys of `splitlearn serve`, over TLS and beyond loopback: who may ask, and how much."""

import asyncio
import socket
import ssl
from collections.abc import AsyncGenerator, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest

from splitlearn.access.network import Names
from splitlearn.access.quota import Account, Quota
from splitlearn.access.tokens import Token, digest
from splitlearn.checkpoints.folder import ModelFiles
from splitlearn.cli import main as command_line
from splitlearn.events import TokenEvent
from splitlearn.openai_api.answers import Found
from splitlearn.openai_api.failures import ApiError
from splitlearn.openai_api.keys import metered
from tests.conftest import TinyFactory
from tests.support.openai_server import START_S, USED, serve
from tests.support.pki import Authority
from tests.support.tokens import ANN, BOB, entry, written
from tests.support.trunk import eventually

EVE, SLOW = "secret-of-eve", "secret-of-slow"
COMPLETIONS = "/v1/completions"


@pytest.fixture(scope="module")
def files(tiny_model: TinyFactory) -> ModelFiles:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"), "authority")


@pytest.fixture(scope="module")
def trusting(authority: Authority) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=str(authority.certificate))


@pytest.fixture(scope="module")
def client(
    files: ModelFiles, authority: Authority, trusting: ssl.SSLContext, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[httpx.Client]:
    """A client of a server on all addresses; it sends no key by itself."""
    folder = tmp_path_factory.mktemp("keys")
    keys = written(
        folder,
        entry("ann", ANN, sessions=1, tokens_per_second=1e6),
        entry("bob", BOB, tokens_per_second=1e6),
        entry("eve", EVE, expires=datetime.now(UTC) - timedelta(seconds=1)),
        entry("slow", SLOW, tokens_per_second=0.01),
    )
    tls = authority.issue("localhost").settings()
    api = {"host": "0.0.0.0", "tls": tls, "tokens": str(keys), "allowed_hosts": ["api.example"]}
    with (
        serve(str(files.folder), folder, trusting, api=api) as url,
        httpx.Client(base_url=url, timeout=START_S, verify=trusting) as opened,
    ):
        yield opened


def test_what_was_computed_for_one_key_is_not_reused_for_another(client: httpx.Client, files: ModelFiles) -> None:
    model = f"{files.folder.name}:full?flags={USED},prefix_cache"
    request = asked(files, model=model, prompt="The sky is blue because " * 8, max_tokens=2)
    found = []
    for key in (ANN, BOB, ANN):
        answer = client.post(COMPLETIONS, json=request, headers=bearer(key)).raise_for_status().json()
        found.append(answer["usage"]["prompt_tokens_details"]["cached_tokens"] > 0)
    assert found == [False, False, True]


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def asked(files: ModelFiles, **changes: Any) -> dict[str, Any]:
    prompt = {"model": f"{files.folder.name}:split", "prompt": "The sky is", "temperature": 0, "ignore_eos": True}
    return {**prompt, "max_tokens": 4, **changes}


SHOWN: dict[str, list[tuple[str, str]]] = {
    "nothing": [],
    "an empty header": [("Authorization", "")],
    "a wrong key": list(bearer("secret-of-nobody").items()),
    "a part of a key": list(bearer(ANN[:-1]).items()),
    "its digest": list(bearer(digest(ANN)).items()),
    "an expired key": list(bearer(EVE).items()),
    "another scheme": [("Authorization", f"Basic {ANN}")],
    "two keys": [*bearer(EVE).items(), *bearer(ANN).items()],
}
ASKED = [("GET", "/v1/models"), ("POST", COMPLETIONS), ("GET", "/docs"), ("GET", "/openapi.json"), ("PUT", "/nowhere")]


@pytest.mark.parametrize("shown", SHOWN)
def test_without_a_valid_key_every_path_but_health_gives_the_same_answer(shown: str, client: httpx.Client) -> None:
    answers = [client.request(method, path, headers=SHOWN[shown], content=b"x" * 8) for method, path in ASKED]
    assert {answer.status_code for answer in answers} == {401}
    assert {answer.headers["www-authenticate"] for answer in answers} == {"Bearer"}
    (error,) = {tuple(sorted(answer.json()["error"].items(), key=str)) for answer in answers}
    assert dict(error)["code"] == "invalid_api_key"
    assert client.get("/health").status_code == 200


def test_a_valid_key_lets_in_by_each_of_the_servers_names(client: httpx.Client, files: ModelFiles) -> None:
    for host in (None, "api.example", "192.0.2.7:8000"):
        headers = {**bearer(BOB), **({"Host": host} if host else {})}
        assert client.post(COMPLETIONS, json=asked(files), headers=headers).status_code == 200
    wrong = client.get("/v1/models", headers={**bearer(BOB), "Host": "attacker.example"})
    assert wrong.json()["error"]["code"] == "wrong_host"


def test_a_key_has_so_many_requests_at_once_and_others_are_not_touched(
    client: httpx.Client, files: ModelFiles, trusting: ssl.SSLContext
) -> None:
    def answer(key: str) -> httpx.Response:
        return client.post(COMPLETIONS, json=asked(files), headers=bearer(key))

    wanted = answer(BOB).json()["choices"]
    with socket.create_connection((client.base_url.host, client.base_url.port or 0)) as plain:
        first = trusting.wrap_socket(plain, server_hostname="localhost")
        first.sendall(
            f"POST {COMPLETIONS} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {ANN}\r\n"
            "Content-Length: 9\r\nContent-Type: application/json\r\nExpect: 100-continue\r\n\r\n".encode()
        )
        assert b" 100 " in first.recv(100)  # it is in, and the server waits for its body
        refused = answer(ANN)
        assert refused.json()["error"]["code"] == "token_sessions"
        assert int(refused.headers["retry-after"]) > 0
        assert client.get("/v1/models", headers=bearer(ANN)).status_code == 200
        assert answer(BOB).json()["choices"] == wanted
        first.close()
    assert eventually(lambda: answer(ANN).status_code == 200)


def test_a_key_that_used_up_its_rate_is_told_when_to_come_again(client: httpx.Client, files: ModelFiles) -> None:
    assert client.post(COMPLETIONS, json=asked(files), headers=bearer(SLOW)).status_code == 200
    for stream in (False, True):
        refused = client.post(COMPLETIONS, json=asked(files, stream=stream), headers=bearer(SLOW))
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "token_rate")
        assert int(refused.headers["retry-after"]) > 60
    assert client.post(COMPLETIONS, json=asked(files), headers=bearer(BOB)).status_code == 200


def test_a_client_that_leaves_pays_for_what_was_computed() -> None:
    account = Account(Token.model_validate(entry("ann", ANN, tokens_per_second=1.0)))

    async def found() -> AsyncGenerator[Found, None]:
        yield TokenEvent((1, 2), "ab", 0.1, {})
        yield TokenEvent((3,), "c", 0.2, {})

    async def leave() -> None:
        items = metered(found(), Quota("ann", account), "a prompt of forty characters, which is 10")
        await anext(items)
        await items.aclose()

    asyncio.run(leave())
    assert 9 < account.bucket.debt_s() <= 11
    account.bucket.charge(60)
    with pytest.raises(ApiError, match="used its tokens per second"):
        asyncio.run(leave())


@pytest.mark.parametrize(
    ("settings", "missing"),
    [("", "api.tls is not set"), ("  tls: {{certificate: {0}, key: {1}}}", "api.tokens is not set")],
)
def test_beyond_loopback_it_does_not_start_without_tls_and_keys(
    settings: str, missing: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pair = Authority(tmp_path, "authority").issue("localhost")
    (tmp_path / "config.yaml").write_text(f"api:\n  host: 0.0.0.0\n{settings.format(pair.certificate, pair.key)}\n")
    assert command_line.main(["serve", "--config", str(tmp_path / "config.yaml")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    for words in (missing, "api.host: '0.0.0.0'", "api.tls with api.tokens", "127.0.0.1", "--allow-open"):
        assert words in line


@pytest.mark.parametrize(
    ("host", "own", "others"),
    [
        ("127.0.0.1", ["localhost:8000", "[::1]:8000", "127.0.0.1", "API.example."], ["192.0.2.7", "evil.example", ""]),
        ("0.0.0.0", ["192.0.2.7", "[2001:db8::1]:1"], ["evil.example", "a b", "x:y", "[::1", "localhost:8000:1"]),
        ("192.0.2.7", ["192.0.2.7:8000"], ["192.0.2.8"]),
    ],
)
def test_a_server_knows_its_own_names(host: str, own: list[str], others: list[str]) -> None:
    names = Names(host, ["api.Example"])
    assert [name for name in own if not names.has(name)] == []
    assert [name for name in others if names.has(name)] == []
